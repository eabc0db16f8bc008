//! [`JobContext`], the part of a job that it shares with its supervisor.

use std::{
    cell::{Cell, RefCell},
    mem,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering},
    },
    task::{Poll, Waker},
    thread,
    time::Duration,
};

use futures_util::task::AtomicWaker;
use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    outcome::{CancelReason, Panic, guard},
    panic_hook,
};

thread_local! {
    /// The job of the code that runs on this thread.
    ///
    /// Not a task-local of tokio: that has a future of its own type around each type of job.
    static CURRENT: RefCell<Option<Arc<JobContext>>> = const { RefCell::new(None) };
}

/// Makes the job in `slot`, if there is one, the current one until the returned guard is dropped.
pub(crate) fn enter(slot: &mut Option<Arc<JobContext>>) -> Current<'_> {
    swap(slot);
    Current(slot)
}

/// Guard of [`enter`], which brings the outer job back.
pub(crate) struct Current<'a>(&'a mut Option<Arc<JobContext>>);

impl Drop for Current<'_> {
    fn drop(&mut self) {
        swap(self.0);
    }
}

fn swap(slot: &mut Option<Arc<JobContext>>) {
    // Without effect in a thread that is about to end.
    let _ended = CURRENT.try_with(|current| mem::swap(&mut *current.borrow_mut(), slot));
}

/// Calls `f`, which runs no foreign code, with the current job; `None` outside of a job.
pub(super) fn with_current<R>(f: impl FnOnce(&Arc<JobContext>) -> R) -> Option<R> {
    let called = CURRENT.try_with(|current| current.borrow().as_ref().map(f));
    called.ok().flatten()
}

/// First `cancel` of a job.
#[derive(Clone, Copy)]
pub(crate) struct Request {
    pub(crate) reason: CancelReason,
    pub(crate) at: Instant,
    /// `true` if a destructor of the job made it while a panic unwinds.
    pub(crate) unwinding: bool,
}

/// Meaning of a stop for a job that does not return by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stopping {
    /// The job will have timed out.
    TimeLimit,
    /// The job will have been cancelled.
    Cancelled,
    /// The job will have been cancelled, unless it ends by the panic that made the request.
    Unwinding,
}

impl From<Request> for Stopping {
    fn from(request: Request) -> Self {
        match request.unwinding {
            true => Stopping::Unwinding,
            false => Stopping::Cancelled,
        }
    }
}

/// State shared by a job and its supervisor. One is allocated for every job, so it stays small.
#[derive(Default)]
pub(crate) struct JobContext {
    /// State of the start: whether the service is called is decided once, by the job or by its supervisor.
    /// Later also whether the job ended by the panic that made the request.
    start: AtomicU8,
    pub(super) supervisor: AtomicWaker,
    pub(super) limit: Limit,
    /// Made for the first part of it, so most jobs never pay for it.
    extra: OnceLock<Box<Extra>>,
}

/// Time at which the limit of a job passes; `None` for a job without a limit.
#[derive(Clone, Copy, Default)]
pub(crate) struct Limit {
    pub(crate) due: Option<Instant>,
    /// The same for a job that is kept alive.
    pub(crate) kept_alive: Option<Instant>,
}

const UNDECIDED: u8 = 0;
const STARTED: u8 = 1;
const REFUSED: u8 = 2;
const UNWOUND: u8 = 3;

/// Use that a thread makes of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The thread polls the job. A panic that the job caught in an earlier poll is not the one that ends it.
    Polled,
    /// The thread polls the job, and a destructor has requested the stop while a panic unwinds.
    Unwinding,
    /// The thread drops the job before its end. A panic is one during the stop.
    Dropped,
}

thread_local! {
    static PHASE: Cell<Phase> = const { Cell::new(Phase::Polled) };
}

/// State of a job that is stopped or can learn of it, or that has something run beside it.
#[derive(Default)]
struct Extra {
    /// The first `cancel`; later ones are ignored. `Some(None)`: a panic came before any.
    request: OnceLock<Option<Request>>,
    /// Made when the job asks for it or is told to stop. A cancelled token *means* told to stop: no separate
    /// flag could disagree with it.
    token: OnceLock<CancellationToken>,
    /// Set before the job is told to stop.
    stopping: OnceLock<Stopping>,
    /// `true` once the broker is asked for more time.
    kept_alive: AtomicBool,
    companions: Mutex<Companioned>,
    /// Number of closures that block a thread for the job.
    blocking: AtomicUsize,
    /// Notified when no closure is left.
    unblocked: Notify,
}

/// Companions of a job; `None` once the job has its outcome.
struct Companioned(Option<Companions>);

impl Default for Companioned {
    fn default() -> Self {
        Self(Some(Vec::new()))
    }
}

type Companions = Vec<Arc<dyn Companion>>;

/// Companion of a job: it runs beside the job, and must be over before the job is settled.
pub(crate) trait Companion: Send + Sync {
    /// Ends it. Once this returns, the companion does nothing any more. It never waits for the job.
    fn stop(&self);
}

impl JobContext {
    /// Makes this the current job of `work`.
    pub(crate) fn run<R>(self: Arc<Self>, work: impl FnOnce() -> R) -> R {
        let mut slot = Some(self);
        let _current = enter(&mut slot);
        work()
    }

    /// Ignores all later requests in the current job, which has ended by `panic`.
    pub(crate) fn close_current(panic: &Panic) {
        let _closed = with_current(|job| {
            // Fails if a request came first.
            let _closed = job.extra().request.set(None);
            if PHASE.get() == Phase::Unwinding && panic.has_asked() != Some(false) {
                job.start.store(UNWOUND, Ordering::Release);
            }
        });
    }

    /// Forgets panics that a job caught in earlier polls.
    #[inline]
    pub(crate) fn begin_poll() {
        PHASE.set(Phase::Polled);
    }

    /// Runs `drop`, which drops a job before its end and does not panic.
    pub(crate) fn dropping<R>(drop: impl FnOnce() -> R) -> R {
        // A job may be dropped inside another one.
        let outer = PHASE.replace(Phase::Dropped);
        let result = drop();
        PHASE.set(outer);
        result
    }

    /// Returns whether the job ended by the panic in which the first request was made.
    pub(crate) fn has_unwound(&self) -> bool {
        self.start.load(Ordering::Acquire) == UNWOUND
    }

    /// Returns whether this job, which is dropped here, will have failed: by a timeout, or by a panic if it
    /// `has_panicked`.
    pub(crate) fn fails(&self, has_panicked: bool) -> bool {
        match (self.stopping(), PHASE.get()) {
            (Some(Stopping::TimeLimit), _) => true,
            (Some(Stopping::Cancelled), _) | (_, Phase::Dropped) => false,
            (Some(Stopping::Unwinding), phase) => {
                let unwinds = thread::panicking() && phase == Phase::Unwinding;
                self.has_unwound() || unwinds && panic_hook::has_asked() != Some(false)
            }
            (None, _) => has_panicked,
        }
    }

    /// Returns the first `cancel`; wakes `supervisor` if it comes later.
    #[inline]
    pub(crate) fn poll_request(&self, supervisor: &Waker) -> Option<Request> {
        self.supervisor.register(supervisor);
        self.request()
    }

    #[inline]
    pub(crate) fn request(&self) -> Option<Request> {
        self.extra.get()?.request.get().copied().flatten()
    }

    /// Tells the job to stop. Only the first `stopping` counts.
    pub(crate) fn tell(&self, stopping: Stopping) {
        let _first = self.extra().stopping.set(stopping);
        // The token is cancelled before it wakes its waiters, whose wakers belong to the job.
        guard(|| self.token().cancel());
    }

    /// Returns the meaning of the stop, if the job is being stopped or is about to be.
    pub(crate) fn stopping(&self) -> Option<Stopping> {
        let decided = self.extra.get()?.stopping.get().copied();
        decided.or_else(|| self.request().map(Stopping::from))
    }

    /// Notes that the broker is asked for more time while the job runs.
    pub(crate) fn keep_alive(&self) {
        self.extra().kept_alive.store(true, Ordering::Relaxed);
    }

    /// Returns whether the broker was asked for more time.
    #[inline]
    pub(crate) fn is_kept_alive(&self) -> bool {
        let extra = self.extra.get();
        extra.is_some_and(|extra| extra.kept_alive.load(Ordering::Relaxed))
    }

    /// Stops `companion` when this job has its outcome, or at once if it has one already.
    ///
    /// A companion that nobody else holds is over, and is released: a job may have many, one after the other.
    pub(crate) fn accompany(&self, companion: Arc<dyn Companion>) {
        if let Some(companions) = &mut self.companions().0 {
            companions.retain(|it| Arc::strong_count(it) > 1);
            companions.push(companion);
            return;
        }
        companion.stop();
    }

    /// Requests the stop, at the time `at`, unless another request came first.
    pub(crate) fn ask(self: &Arc<Self>, reason: CancelReason, at: Instant) {
        let is_current = || with_current(|it| Arc::ptr_eq(it, self)) == Some(true);
        let request = Request {
            reason,
            at,
            unwinding: thread::panicking() && is_current(),
        };
        if self.extra().request.set(Some(request)).is_ok() {
            if request.unwinding && PHASE.get() == Phase::Polled {
                PHASE.set(Phase::Unwinding);
                panic_hook::ask();
            }
            guard(|| self.supervisor.wake());
        }
    }

    /// Returns the end of the job's time limit.
    #[inline]
    pub(crate) fn due(&self) -> Option<Instant> {
        match self.is_kept_alive() {
            true => self.limit.kept_alive,
            false => self.limit.due,
        }
    }

    /// Returns the time that the job has left.
    pub(crate) fn time_left(&self) -> Option<Duration> {
        Some(self.due()?.saturating_duration_since(Instant::now()))
    }

    /// Stops all companions, because the job has its outcome.
    #[inline]
    pub(crate) fn dismiss(&self, stopped: bool) {
        // Only a job that still runs can add another one.
        if stopped && self.extra.get().is_none() {
            return;
        }
        let companions = self.companions().0.take();
        let companions = companions.into_iter().flatten();
        companions.for_each(|companion| guard(|| companion.stop()));
    }

    fn companions(&self) -> MutexGuard<'_, Companioned> {
        let companions = &self.extra().companions;
        // Nothing panics while the lock is held.
        companions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn extra(&self) -> &Extra {
        self.extra.get_or_init(Box::default)
    }

    /// Starts the current job; returns whether it may start.
    #[inline]
    pub(crate) fn start_current() -> bool {
        let start = |job: &Arc<Self>| {
            let order = Ordering::Relaxed;
            let start = job.start.compare_exchange(UNDECIDED, STARTED, order, order);
            start.is_ok()
        };
        // Invariant: a job is polled in its scope.
        with_current(start) == Some(true)
    }

    /// Returns whether the job has started; if it has not, it never will.
    #[inline]
    pub(crate) fn has_started(&self) -> bool {
        let order = Ordering::Relaxed;
        let refused = self
            .start
            .compare_exchange(UNDECIDED, REFUSED, order, order);
        matches!(refused, Err(STARTED | UNWOUND))
    }

    /// Counts a closure that blocks a thread for this job.
    pub(crate) fn block(&self) {
        self.extra().blocking.fetch_add(1, Ordering::AcqRel);
    }

    /// Counts the end of such a closure.
    pub(crate) fn unblock(&self) {
        let extra = self.extra();
        if extra.blocking.fetch_sub(1, Ordering::AcqRel) == 1 {
            extra.unblocked.notify_waiters();
            guard(|| self.supervisor.wake());
        }
    }

    /// Returns whether a closure of the job blocks a thread.
    #[inline]
    pub(crate) fn is_blocking(&self) -> bool {
        let extra = self.extra.get();
        extra.is_some_and(|extra| extra.blocking.load(Ordering::Acquire) > 0)
    }

    /// Waits until no closure of the job blocks a thread; wakes `supervisor` then.
    pub(crate) fn poll_blocking(&self, supervisor: &Waker) -> Poll<()> {
        if self.is_blocking() {
            self.supervisor.register(supervisor);
        }
        match self.is_blocking() {
            true => Poll::Pending,
            false => Poll::Ready(()),
        }
    }

    /// Waits until no closure of the job blocks a thread.
    pub(crate) async fn unblocked(&self) {
        while self.is_blocking() {
            let unblocked = self.extra().unblocked.notified();
            // Created before the second check, so that no end is missed.
            if self.is_blocking() {
                unblocked.await;
            }
        }
    }

    pub(crate) fn is_told(&self) -> bool {
        let token = self.extra.get().and_then(|extra| extra.token.get());
        token.is_some_and(CancellationToken::is_cancelled)
    }

    pub(super) fn token(&self) -> &CancellationToken {
        self.extra().token.get_or_init(CancellationToken::new)
    }
}
