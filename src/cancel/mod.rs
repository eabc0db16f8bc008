//! How a job learns that it is to stop, and how it can ask for it.

use std::{
    cell::{Cell, RefCell},
    fmt,
    future::{self, Future},
    ops::Deref,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering},
    },
    task::{Poll, Waker},
    thread,
    time::Duration,
};

use futures_util::task::AtomicWaker;
use tokio::{runtime::Handle, sync::Notify, task::futures::TaskLocalFuture, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    outcome::{CancelReason, Panic, drop_quietly, guard},
    panic_hook,
};

mod blocking;

pub use self::blocking::spawn_blocking;

tokio::task_local! {
    static CURRENT: Arc<JobContext>;
}

/// Waits until the current job is told to stop.
///
/// Shorthand for [`Cancellation::current()`]`.cancelled()`: the job is looked up when the
/// function is *called*, so the future may be moved to a child task. Outside a job it is pending
/// for ever.
///
/// A job is told when its time limit passes, when its caller is gone, at shutdown, and when
/// [`Cancellation::cancel`] is called. It then has the layer's
/// [`grace`](crate::SentinelLayer::grace) (none by default) before it is aborted. A job that
/// returns within its grace has completed.
///
/// # Examples
///
/// ```
/// use std::{convert::Infallible, time::Duration};
/// use tower::{Service, ServiceExt, service_fn};
/// use tower_layer::Layer;
/// use tower_sentinel::{Outcome, Report, SentinelLayer};
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() {
/// let job = service_fn(|_id: std::sync::Arc<u64>| async {
///     tower_sentinel::cancelled().await; // the limit has passed: tidy up and say how far it got
///     Ok::<_, Infallible>("half of it")
/// });
/// let policy = service_fn(|report: Report<_, &'static str, Infallible>| async move {
///     Ok::<_, Infallible>(report.outcome)
/// });
/// let mut sentinel = SentinelLayer::new(policy)
///     .timeout(Duration::from_secs(1))
///     .grace(Duration::from_secs(5))
///     .layer(job);
///
/// let outcome = sentinel.ready().await.unwrap().call(1.into()).await.unwrap();
/// assert!(matches!(outcome, Outcome::Completed("half of it")));
/// # }
/// ```
///
/// # Cancel safety
///
/// Cancel safe: once told, every later call resolves at once.
pub fn cancelled() -> impl Future<Output = ()> + Send + 'static {
    told(CURRENT.try_with(Arc::clone).ok())
}

/// Returns how much of the current job's time limit is left; `None` without a limit, and outside a job.
///
/// For a limit of its own that a job gives to what it calls, such as a request. Zero once the limit has
/// passed: the job is being stopped then, and has its [grace](crate::SentinelLayer::grace) at most.
///
/// ```
/// use std::{convert::Infallible, sync::Arc, time::Duration};
/// use tower::{Layer, ServiceExt, service_fn};
/// use tower_sentinel::{Outcome, Report, SentinelLayer, cancel::time_left};
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() {
/// let job = service_fn(|_id: Arc<u64>| async {
///     tokio::time::sleep(Duration::from_secs(10)).await;
///     Ok::<_, Infallible>(time_left())
/// });
/// let policy = service_fn(|report: Report<_, Option<Duration>, Infallible>| async move {
///     Ok::<_, Infallible>(report.outcome)
/// });
/// let sentinel = SentinelLayer::new(policy).timeout(Duration::from_secs(30)).layer(job);
///
/// let outcome = sentinel.oneshot(Arc::new(7)).await.unwrap();
/// let Outcome::Completed(Some(left)) = outcome else { panic!("{outcome:?}") };
/// assert_eq!(left, Duration::from_secs(20));
/// assert_eq!(time_left(), None); // this is no job
/// # }
/// ```
pub fn time_left() -> Option<Duration> {
    CURRENT.try_with(|job| job.time_left()).ok().flatten()
}

/// A handle on the stopping of one job, to be cloned and handed to its child tasks.
///
/// Child tasks do not inherit the job's context, so take [`Cancellation::current`] before
/// `tokio::spawn`. The handle says that the job *is told to stop*, not that it has ended: a job
/// that simply returns leaves its handles pending.
///
/// # Examples
///
/// ```
/// use std::convert::Infallible;
/// use tower::{Service, ServiceExt, service_fn};
/// use tower_layer::Layer;
/// use tower_sentinel::{
///     Outcome, Report, SentinelLayer, cancel::Cancellation, outcome::CancelReason,
/// };
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// let job = service_fn(|_id: std::sync::Arc<u64>| async {
///     let cancellation = Cancellation::current();
///     tokio::spawn(async move { cancellation.cancel(CancelReason::LeaseLost) });
///     std::future::pending::<Result<(), Infallible>>().await
/// });
/// let policy = service_fn(|report: Report<_, (), Infallible>| async move {
///     let Outcome::Cancelled(cancelled) = report.outcome else { panic!("{report:?}") };
///     Ok::<_, Infallible>(cancelled.reason())
/// });
/// let mut sentinel = SentinelLayer::new(policy).layer(job);
///
/// let reason = sentinel.ready().await.unwrap().call(1.into()).await.unwrap();
/// assert_eq!(reason, CancelReason::LeaseLost);
/// # }
/// ```
#[derive(Clone)]
pub struct Cancellation {
    context: Option<Arc<JobContext>>,
    /// Whose clock the job's limit is measured by, wherever the handle is used.
    runtime: Option<Handle>,
}

impl Cancellation {
    /// Returns the handle of the job that is running here.
    ///
    /// Outside a job the handle is inert: [`cancelled`](Self::cancelled) is pending for ever and
    /// [`cancel`](Self::cancel) does nothing.
    pub fn current() -> Self {
        Self {
            context: CURRENT.try_with(Arc::clone).ok(),
            runtime: Handle::try_current().ok(),
        }
    }

    /// Waits until the job is told to stop; see [`cancelled`].
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: once told, every later call resolves at once.
    pub fn cancelled(&self) -> impl Future<Output = ()> + Send + 'static {
        told(self.context.clone())
    }

    /// Returns whether the job was told to stop.
    pub fn is_cancelled(&self) -> bool {
        self.context.as_ref().is_some_and(|job| job.is_told())
    }

    /// Asks the sentinel to stop the job, for `reason`.
    ///
    /// The job goes down the same ladder as at its time limit: told, grace, abort. The first
    /// cause wins: a job that is already being stopped keeps its cause. A job that has ended, or
    /// returns on the way down, is not affected; nor is one whose panic makes the request, by a
    /// guard that it drops. A panic that the job catches makes a request like any other; but where
    /// the job panics once more in the same poll, only the [panic hook](crate::panic_hook) tells the
    /// two apart, and without it the job has panicked.
    pub fn cancel(&self, reason: CancelReason) {
        if let Some(job) = &self.context {
            let is_current = || {
                CURRENT
                    .try_with(|it| Arc::ptr_eq(it, job))
                    .is_ok_and(|it| it)
            };
            let request = Request {
                reason,
                at: self.now(),
                unwinding: thread::panicking() && is_current(),
            };
            if job.request.set(Some(request)).is_ok() {
                if request.unwinding && PHASE.get() == Phase::Polled {
                    PHASE.set(Phase::Unwinding);
                    panic_hook::ask();
                }
                guard(|| job.supervisor.wake());
            }
        }
    }

    fn now(&self) -> Instant {
        // Fails in a thread that is about to end, as does any entry of a runtime.
        let can_enter = !Handle::try_current().is_err_and(|it| it.is_thread_local_destroyed());
        let runtime = self.runtime.as_ref().filter(|_| can_enter);
        let _clock = runtime.map(Handle::enter);
        Instant::now()
    }

    /// Returns the job, if there is one.
    pub(crate) fn job(&self) -> Option<&Arc<JobContext>> {
        self.context.as_ref()
    }
}

async fn told(job: Option<Arc<JobContext>>) {
    match job {
        Some(job) => job.token().cancelled().await,
        None => future::pending().await,
    }
}

impl fmt::Debug for Cancellation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cancellation")
            .field("in_job", &self.context.is_some())
            .field("is_cancelled", &self.is_cancelled())
            .finish()
    }
}

/// The first `cancel` of a job.
#[derive(Clone, Copy)]
pub(crate) struct Request {
    pub(crate) reason: CancelReason,
    pub(crate) at: Instant,
    /// Whether a destructor of the job made it, in a panic that unwinds.
    pub(crate) unwinding: bool,
}

/// What it means for a job that does not return by itself that it is being stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stopping {
    /// It will have timed out.
    TimeLimit,
    /// It will have been cancelled.
    Cancelled,
    /// It will have been cancelled, unless it ends by the panic that made the request.
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

/// What a job and its supervisor share. One is allocated for every job, so it stays small.
#[derive(Default)]
pub(crate) struct JobContext {
    /// The first `cancel`; later ones are ignored. `None` in it: a panic came before any.
    request: OnceLock<Option<Request>>,
    /// Made when the job asks for it or is told, so most jobs never pay for it. There is no flag
    /// beside it that could disagree: told *is* a cancelled token.
    token: OnceLock<CancellationToken>,
    /// Set before the job is told.
    stopping: OnceLock<Stopping>,
    /// Whether the service is called: decided once, by the job or by its supervisor. Then, whether
    /// the job ended by the panic that made the request.
    start: AtomicU8,
    supervisor: AtomicWaker,
    limit: Limit,
    /// Made for the first of them.
    beside: OnceLock<Box<Beside>>,
}

/// When the time of a job is over; `None` for one without a limit.
#[derive(Clone, Copy, Default)]
pub(crate) struct Limit {
    pub(crate) due: Option<Instant>,
    /// The same once it is kept alive.
    pub(crate) kept_alive: Option<Instant>,
}

const UNDECIDED: u8 = 0;
const STARTED: u8 = 1;
const REFUSED: u8 = 2;
const UNWOUND: u8 = 3;

/// What a thread does with a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// It polls the job. A panic that the job caught in an earlier poll is not the one that ends it.
    Polled,
    /// It polls the job, and a destructor has asked for the stop in a panic that unwinds.
    Unwinding,
    /// It drops the job before its end. A panic is one on the way down.
    Dropped,
}

thread_local! {
    static PHASE: Cell<Phase> = const { Cell::new(Phase::Polled) };
}

/// What runs beside a job.
#[derive(Default)]
struct Beside {
    /// Whether the broker is asked for more time.
    kept_alive: AtomicBool,
    companions: Mutex<Companioned>,
    /// How many closures block a thread for the job.
    blocking: AtomicUsize,
    /// Told when there is none any more.
    unblocked: Notify,
}

/// `None`: the job has its outcome.
struct Companioned(Option<Companions>);

impl Default for Companioned {
    fn default() -> Self {
        Self(Some(Vec::new()))
    }
}

type Companions = Vec<Arc<dyn Companion>>;

/// What runs beside a job and must be over before the job is settled.
pub(crate) trait Companion: Send + Sync {
    /// Ends it: once this returns it does nothing any more. Never waits for the job.
    fn stop(&self);
}

impl JobContext {
    /// Makes this the current job of `work`.
    pub(crate) fn run<R>(self: Arc<Self>, work: impl FnOnce() -> R) -> R {
        CURRENT.sync_scope(self, work)
    }

    /// Makes this the current job of `future`, in each poll and in its destructor.
    pub(crate) fn scope<F: Future>(self: Arc<Self>, future: F) -> TaskLocalFuture<Arc<Self>, F> {
        CURRENT.scope(self, future)
    }

    /// Has no request count any more in the current job, for it has ended by `panic`.
    pub(crate) fn close_current(panic: &Panic) {
        // Fails outside of a job.
        let _closed = CURRENT.try_with(|job| {
            // Fails where a request came first.
            let _closed = job.request.set(None);
            if PHASE.get() == Phase::Unwinding && panic.has_asked() != Some(false) {
                job.start.store(UNWOUND, Ordering::Release);
            }
        });
    }

    /// Forgets the panics that a job caught in earlier polls.
    pub(crate) fn begin_poll() {
        PHASE.set(Phase::Polled);
    }

    /// Runs `drop`, which drops a job before its end, and does not panic.
    pub(crate) fn dropping<R>(drop: impl FnOnce() -> R) -> R {
        // A job may be dropped within another one.
        let outer = PHASE.replace(Phase::Dropped);
        let result = drop();
        PHASE.set(outer);
        result
    }

    /// Returns whether the job ended by the panic in which the first request was made.
    pub(crate) fn has_unwound(&self) -> bool {
        self.start.load(Ordering::Acquire) == UNWOUND
    }

    /// Returns whether this job, which is dropped here, will have failed: timed out, or panicked,
    /// if it `has_panicked`.
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

    /// Returns the first `cancel`; wakes `supervisor` when it comes later.
    #[inline]
    pub(crate) fn poll_request(&self, supervisor: &Waker) -> Option<Request> {
        self.supervisor.register(supervisor);
        self.request()
    }

    #[inline]
    pub(crate) fn request(&self) -> Option<Request> {
        self.request.get().copied().flatten()
    }

    /// Tells the job to stop. The first `stopping` counts.
    pub(crate) fn tell(&self, stopping: Stopping) {
        let _first = self.stopping.set(stopping);
        // It is cancelled before it wakes those who wait: wakers of the job's own.
        guard(|| self.token().cancel());
    }

    /// Returns why the job is being stopped, if it is, or is about to be.
    pub(crate) fn stopping(&self) -> Option<Stopping> {
        let decided = self.stopping.get().copied();
        decided.or_else(|| self.request().map(Stopping::from))
    }

    /// Notes that the broker is asked for more time while the job runs.
    pub(crate) fn keep_alive(&self) {
        self.beside().kept_alive.store(true, Ordering::Relaxed);
    }

    /// Returns whether the broker was asked for more time.
    pub(crate) fn is_kept_alive(&self) -> bool {
        let beside = self.beside.get();
        beside.is_some_and(|beside| beside.kept_alive.load(Ordering::Relaxed))
    }

    /// Stops `companion` when this job has its outcome, or at once if it has.
    ///
    /// One that nobody else holds any more is over, and is let go: a job may have many, each in its
    /// turn.
    pub(crate) fn accompany(&self, companion: Arc<dyn Companion>) {
        if let Some(companions) = &mut self.companions().0 {
            companions.retain(|it| Arc::strong_count(it) > 1);
            companions.push(companion);
            return;
        }
        companion.stop();
    }

    /// Returns how much of the job's time is left.
    fn time_left(&self) -> Option<Duration> {
        let Limit { due, kept_alive } = self.limit;
        let due = match self.is_kept_alive() {
            true => kept_alive,
            false => due,
        };
        Some(due?.saturating_duration_since(Instant::now()))
    }

    /// Stops all companions, because the job has its outcome.
    #[inline]
    pub(crate) fn dismiss(&self, stopped: bool) {
        // Only a job that still runs can bring another one.
        if stopped && self.beside.get().is_none() {
            return;
        }
        let companions = self.companions().0.take();
        let companions = companions.into_iter().flatten();
        companions.for_each(|companion| guard(|| companion.stop()));
    }

    fn companions(&self) -> MutexGuard<'_, Companioned> {
        let companions = &self.beside().companions;
        // Nothing panics while the lock is held.
        companions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn beside(&self) -> &Beside {
        self.beside.get_or_init(Box::default)
    }

    /// Begins the current job; returns whether it may.
    #[inline]
    pub(crate) fn start_current() -> bool {
        let start = |job: &Arc<Self>| {
            let order = Ordering::Relaxed;
            let start = job.start.compare_exchange(UNDECIDED, STARTED, order, order);
            start.is_ok()
        };
        // Invariant: a job is polled in its scope.
        CURRENT.try_with(start).is_ok_and(|may| may)
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
        self.beside().blocking.fetch_add(1, Ordering::AcqRel);
    }

    /// Counts the end of such a closure.
    pub(crate) fn unblock(&self) {
        let beside = self.beside();
        if beside.blocking.fetch_sub(1, Ordering::AcqRel) == 1 {
            beside.unblocked.notify_waiters();
            guard(|| self.supervisor.wake());
        }
    }

    /// Returns whether a closure of the job's blocks a thread.
    #[inline]
    pub(crate) fn is_blocking(&self) -> bool {
        let beside = self.beside.get();
        beside.is_some_and(|beside| beside.blocking.load(Ordering::Acquire) > 0)
    }

    /// Ready when no closure of the job's blocks a thread; wakes `supervisor` then.
    pub(crate) fn poll_blocking(&self, supervisor: &Waker) -> Poll<()> {
        if self.is_blocking() {
            self.supervisor.register(supervisor);
        }
        match self.is_blocking() {
            true => Poll::Pending,
            false => Poll::Ready(()),
        }
    }

    /// Waits until no closure of the job's blocks a thread.
    pub(crate) async fn unblocked(&self) {
        while self.is_blocking() {
            let unblocked = self.beside().unblocked.notified();
            // Begun before it is asked again, so that no end is missed.
            if self.is_blocking() {
                unblocked.await;
            }
        }
    }

    fn is_told(&self) -> bool {
        self.token
            .get()
            .is_some_and(CancellationToken::is_cancelled)
    }

    fn token(&self) -> &CancellationToken {
        self.token.get_or_init(CancellationToken::new)
    }
}

/// The supervisor's hold on the context of its job, which serves again afterwards.
pub(crate) struct JobHandle(
    // `None` only in the destructor.
    Option<Arc<JobContext>>,
);

thread_local! {
    /// The contexts of jobs that are over: a steady flow of jobs allocates none.
    static SPARE: RefCell<Vec<Arc<JobContext>>> = const { RefCell::new(Vec::new()) };
}

/// How many contexts a thread keeps: enough for the jobs that end between two calls.
const MOST_SPARE: usize = 16;

impl JobHandle {
    /// Takes a context that no other job has, or has had to any effect.
    #[inline]
    pub(crate) fn new(limit: Limit) -> Self {
        let spare = SPARE.try_with(|spare| spare.borrow_mut().pop());
        let mut context = spare.ok().flatten().unwrap_or_default();
        // Invariant: a spare context has no other owner.
        if let Some(unique) = Arc::get_mut(&mut context) {
            unique.limit = limit;
        }
        Self(Some(context))
    }
}

impl Deref for JobHandle {
    type Target = Arc<JobContext>;

    #[inline]
    fn deref(&self) -> &Arc<JobContext> {
        // Invariant: only the destructor empties it.
        self.0.as_ref().expect("a handle has a context")
    }
}

impl Drop for JobHandle {
    /// Keeps the context, unless the job or a [`Cancellation`] still holds it.
    fn drop(&mut self) {
        let Some(mut context) = self.0.take() else {
            return;
        };
        let Some(unique) = Arc::get_mut(&mut context) else {
            // A handle may live long; the caller's waker is of no use to it.
            drop_quietly(context.supervisor.take());
            return;
        };
        // Now, and not with the next job, so that the caller's waker is let go. And before the
        // list is borrowed: a waker is foreign code.
        guard(|| *unique = JobContext::default());
        // Without effect in a thread that is about to end.
        let _ended = SPARE.try_with(|spare| {
            let mut spare = spare.borrow_mut();
            if spare.len() < MOST_SPARE {
                spare.push(context);
            }
        });
    }
}
