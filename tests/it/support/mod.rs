//! Scripted jobs and policies, and a recorder of a policy's reports.

pub(crate) mod log;
pub(crate) mod subscription;
pub(crate) mod tag;

use std::{
    fmt,
    future::{Future, pending},
    panic::resume_unwind,
    pin::{Pin, pin},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll, Wake, ready},
    thread::{self, Thread},
    time::Duration,
};

use futures_util::future::BoxFuture;
use tokio::{
    runtime::{Builder, Handle, Runtime},
    task::{coop, yield_now},
    time::{Sleep, sleep},
};
use tower::{Service, ServiceExt};
use tower_sentinel::{
    Job, Outcome, Report, SentinelError, TimeLimit,
    cancel::Cancellation,
    outcome::{CancelReason, OutcomeKind},
};

/// Time that a job works if its fate does not come at once.
pub(crate) const WORK: Duration = Duration::from_secs(1);

/// Time that a job blocks its thread, unless it waits to be released.
pub(crate) const BLOCK: Duration = Duration::from_secs(1);

/// The error of a job, and of a policy that refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refused;

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("refused")
    }
}

impl std::error::Error for Refused {}

// === jobs ===

/// Behaviour of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    Value,
    Error,
    PanicInCall,
    /// Before its first await.
    PanicFirst,
    /// After an await.
    PanicLater,
    /// Hangs, and panics in `Drop` when it is aborted.
    PanicInDrop,
    Hang,
    /// Blocks its thread, then awaits for ever.
    BlockFirst,
    /// Blocks its thread after an await, then returns a value.
    BlockLater,
    CancelsItself,
    /// Hangs; whoever runs it cancels the shutdown token.
    Shutdown,
    /// Hangs; whoever runs it ends its runtime.
    RuntimeEnds,
}

/// A job with a scripted fate.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Work {
    pub(crate) fate: Fate,
    pub(crate) limit: TimeLimit,
}

impl Work {
    pub(crate) fn new(fate: Fate) -> Self {
        let limit = TimeLimit::Inherit;
        Self { fate, limit }
    }
}

impl Job for Work {
    type Tag = Fate;

    fn tag(&self) -> Fate {
        self.fate
    }

    fn time_limit(&self) -> TimeLimit {
        self.limit
    }
}

/// Runs [`Work`] as its fate will have it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Worker {
    pub(crate) thread: Arc<Blocked>,
}

impl Service<Work> for Worker {
    type Response = ();
    type Error = Refused;
    type Future = BoxFuture<'static, Result<(), Refused>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Refused>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, Work { fate, .. }: Work) -> Self::Future {
        if fate == Fate::PanicInCall {
            raise("in call");
        }
        let thread = Arc::clone(&self.thread);
        Box::pin(async move {
            match fate {
                Fate::PanicInCall => unreachable!(),
                Fate::PanicFirst => raise("before the first await"),
                Fate::PanicInDrop => {
                    let _bomb = Bomb;
                    pending().await
                }
                Fate::Hang | Fate::Shutdown | Fate::RuntimeEnds => pending().await,
                Fate::BlockFirst => {
                    thread.block();
                    pending().await
                }
                Fate::BlockLater => {
                    yield_now().await;
                    thread.block();
                    Ok(())
                }
                Fate::Value | Fate::Error | Fate::PanicLater | Fate::CancelsItself => {
                    sleep(WORK).await;
                    match fate {
                        Fate::Value => Ok(()),
                        Fate::Error => Err(Refused),
                        Fate::PanicLater => raise("after an await"),
                        _ => {
                            Cancellation::current().cancel(CancelReason::Requested);
                            pending().await
                        }
                    }
                }
            }
        })
    }
}

/// A place where jobs block their thread.
#[derive(Debug, Default)]
pub(crate) struct Blocked {
    /// `true` if the thread waits for `release`; if not, it comes back by itself, after [`BLOCK`].
    pub(crate) until_released: bool,
    entered: AtomicBool,
    released: AtomicBool,
}

impl Blocked {
    pub(crate) fn until_released() -> Arc<Self> {
        Arc::new(Self {
            until_released: true,
            ..Self::default()
        })
    }

    pub(crate) fn block(&self) {
        self.entered.store(true, Ordering::SeqCst);
        if !self.until_released {
            return thread::sleep(BLOCK);
        }
        let step = Duration::from_millis(1);
        // Bounded: a test that fails must not hang in the runtime's destructor too.
        for _ in 0..20_000 {
            if self.released.load(Ordering::SeqCst) {
                break;
            }
            thread::sleep(step);
        }
    }

    pub(crate) fn entered(&self) -> bool {
        self.entered.load(Ordering::SeqCst)
    }

    pub(crate) fn release(&self) {
        self.released.store(true, Ordering::SeqCst);
    }
}

/// Panics, without a word on standard error: hundreds of them would bury the one that counts.
pub(crate) fn raise(message: &'static str) -> ! {
    resume_unwind(Box::new(message))
}

/// Panics when dropped.
#[derive(Debug)]
pub(crate) struct Bomb;

impl Drop for Bomb {
    fn drop(&mut self) {
        raise("in a destructor");
    }
}

/// Counts events, and the drops of its guards.
#[derive(Clone, Debug, Default)]
pub(crate) struct Count(Arc<AtomicUsize>);

/// Adds one to a [`Count`] when dropped.
#[derive(Debug)]
pub(crate) struct Guard(Count);

impl Count {
    pub(crate) fn get(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }

    pub(crate) fn add(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    pub(crate) fn guard(&self) -> Guard {
        Guard(self.clone())
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.add();
    }
}

// === policies ===

/// Behaviour of a policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Plan {
    Ok,
    Error,
    PanicInReadiness,
    PanicInCall,
    PanicInFuture,
    SlowReadiness,
    ReadinessError,
    NeverReady,
    Hang,
}

impl Plan {
    pub(crate) const ALL: [Plan; 9] = [
        Plan::Ok,
        Plan::Error,
        Plan::PanicInReadiness,
        Plan::PanicInCall,
        Plan::PanicInFuture,
        Plan::SlowReadiness,
        Plan::ReadinessError,
        Plan::NeverReady,
        Plan::Hang,
    ];
}

/// A policy with a scripted plan, that returns the report it was given.
#[derive(Debug)]
pub(crate) struct Script {
    plan: Plan,
    /// Time that it takes, so that a caller can drop while it settles; zero: no timer is made.
    pause: Duration,
    recorder: Recorder,
    readiness: Option<Pin<Box<Sleep>>>,
}

impl Clone for Script {
    fn clone(&self) -> Self {
        Self {
            readiness: None,
            recorder: self.recorder.clone(),
            ..*self
        }
    }
}

impl<Tag, T, E> Service<Report<Tag, T, E>> for Script
where
    Tag: Send + 'static,
    T: Send + 'static,
    E: Send + 'static,
{
    type Response = Report<Tag, T, E>;
    type Error = Refused;
    type Future = BoxFuture<'static, Result<Report<Tag, T, E>, Refused>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Refused>> {
        self.recorder.log(|log| log.asked += 1);
        let wait = match self.plan {
            Plan::Ok | Plan::Error | Plan::PanicInFuture | Plan::Hang => Duration::ZERO,
            // These end without a future of their own, so they take their time here.
            Plan::PanicInReadiness | Plan::PanicInCall | Plan::ReadinessError => self.pause,
            Plan::SlowReadiness => 2 * self.pause,
            Plan::NeverReady => return Poll::Pending,
        };
        if !wait.is_zero() {
            let sleep = self.readiness.get_or_insert_with(|| Box::pin(sleep(wait)));
            ready!(sleep.as_mut().poll(cx));
        }
        match self.plan {
            Plan::PanicInReadiness => raise("in the policy's readiness"),
            Plan::ReadinessError => Poll::Ready(Err(Refused)),
            _ => Poll::Ready(Ok(())),
        }
    }

    fn call(&mut self, report: Report<Tag, T, E>) -> Self::Future {
        let seen = Seen::from(&report.outcome);
        self.recorder.log(|log| log.reports.push(seen));
        if self.plan == Plan::PanicInCall {
            raise("in the policy's call");
        }
        let Self { plan, pause, .. } = *self;
        Box::pin(async move {
            if !pause.is_zero() {
                sleep(pause).await;
            }
            match plan {
                Plan::Error => Err(Refused),
                Plan::PanicInFuture => raise("in the policy's future"),
                Plan::Hang => pending().await,
                _ => Ok(report),
            }
        })
    }
}

// === observations ===

/// Summary of an outcome, without its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) kind: OutcomeKind,
    pub(crate) stopped: Option<bool>,
    pub(crate) reason: Option<CancelReason>,
    /// `true` if there is a panic in it, attached or the outcome itself.
    pub(crate) panic: bool,
}

impl Seen {
    pub(crate) fn completed() -> Self {
        Self::from(&Outcome::<(), ()>::Completed(()))
    }

    pub(crate) fn failed() -> Self {
        Self::from(&Outcome::<(), ()>::Failed(()))
    }

    pub(crate) fn panicked() -> Self {
        Self {
            kind: OutcomeKind::Panicked,
            panic: true,
            ..Self::completed()
        }
    }

    pub(crate) fn timed_out(stopped: bool) -> Self {
        Self {
            kind: OutcomeKind::TimedOut,
            stopped: Some(stopped),
            ..Self::completed()
        }
    }

    pub(crate) fn cancelled(reason: CancelReason, stopped: bool) -> Self {
        Self {
            kind: OutcomeKind::Cancelled,
            stopped: Some(stopped),
            reason: Some(reason),
            panic: false,
        }
    }

    pub(crate) fn with_panic(self, panic: bool) -> Self {
        Self { panic, ..self }
    }
}

impl<T, E> From<&Outcome<T, E>> for Seen {
    fn from(outcome: &Outcome<T, E>) -> Self {
        let (stopped, reason, panic) = match outcome {
            Outcome::Completed(_) | Outcome::Failed(_) => (None, None, false),
            Outcome::Panicked(_) => (None, None, true),
            Outcome::TimedOut(it) => (Some(it.stopped()), None, it.panic().is_some()),
            Outcome::Cancelled(it) => {
                let reason = Some(it.reason());
                (Some(it.stopped()), reason, it.panic().is_some())
            }
        };
        Self {
            kind: outcome.kind(),
            stopped,
            reason,
            panic,
        }
    }
}

/// Response to a caller, without its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    Ok,
    Policy,
    PolicyPanicked,
    PolicyTimedOut,
}

impl<E: fmt::Debug, P: fmt::Debug> From<&SentinelError<E, P>> for Answer {
    fn from(error: &SentinelError<E, P>) -> Self {
        match error {
            SentinelError::Policy(_) => Answer::Policy,
            SentinelError::PolicyPanicked(_) => Answer::PolicyPanicked,
            SentinelError::PolicyTimedOut(_) => Answer::PolicyTimedOut,
            other => panic!("a call cannot fail with {other:?}"),
        }
    }
}

/// Record of the reports to the policies that it made.
#[derive(Clone, Debug, Default)]
pub(crate) struct Recorder(Arc<Mutex<Log>>);

#[derive(Debug, Default)]
struct Log {
    asked: usize,
    reports: Vec<Seen>,
    unsettled: Vec<Answer>,
}

impl Recorder {
    /// Returns a policy that responds at once.
    pub(crate) fn policy(&self) -> Script {
        self.scripted(Plan::Ok, Duration::ZERO)
    }

    pub(crate) fn scripted(&self, plan: Plan, pause: Duration) -> Script {
        Script {
            plan,
            pause,
            recorder: self.clone(),
            readiness: None,
        }
    }

    /// Returns a hook for `on_unsettled`.
    pub(crate) fn unsettled<E: fmt::Debug>(
        &self,
    ) -> impl Fn(SentinelError<E, Refused>) + Clone + Send + Sync + use<E> {
        let recorder = self.clone();
        move |error| recorder.log(|log| log.unsettled.push(Answer::from(&error)))
    }

    /// Returns the number of polls of a policy for its readiness.
    pub(crate) fn asked(&self) -> usize {
        self.log(|log| log.asked)
    }

    /// Returns the report of each call of a policy.
    pub(crate) fn reports(&self) -> Vec<Seen> {
        self.log(|log| log.reports.clone())
    }

    /// Returns the errors that nobody waited for.
    pub(crate) fn unsettled_errors(&self) -> Vec<Answer> {
        self.log(|log| log.unsettled.clone())
    }

    fn log<R>(&self, f: impl FnOnce(&mut Log) -> R) -> R {
        f(&mut self.0.lock().unwrap())
    }
}

// === driving ===

/// A job that is all in the service: `Arc` makes it its own tag.
pub(crate) type Unit = Arc<()>;

/// Makes `sentinel` ready and calls it.
pub(crate) async fn call<S, J>(sentinel: &mut S, job: J) -> Result<S::Response, S::Error>
where
    S: Service<J>,
{
    sentinel.ready().await?.call(job).await
}

/// Waits until nothing is left to do on `runtime`: no job, and no settlement in the background.
pub(crate) async fn idle(runtime: &Handle) {
    until(|| runtime.metrics().num_alive_tasks() == 0).await;
}

/// Waits, by the clock of this runtime, until `done`.
pub(crate) async fn until(done: impl Fn() -> bool) {
    // Short steps at first, for real time; longer ones then, for hours of virtual time.
    for step in 1..1_000 {
        if done() {
            return;
        }
        sleep(Duration::from_millis(step)).await;
    }
    panic!("waited for minutes");
}

/// Lets each task of `runtime`, a current-thread one that nobody drives, run until it waits.
pub(crate) fn turn(runtime: &Runtime) {
    let turn = || {
        runtime.block_on(async {
            for _ in 0..8 {
                yield_now().await;
            }
        });
    };
    thread::scope(|scope| scope.spawn(turn).join().unwrap());
}

pub(crate) fn current_thread() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// Returns a runtime whose time is paused.
pub(crate) fn paused_time() -> Runtime {
    let mut runtime = Builder::new_current_thread();
    runtime.enable_all().start_paused(true).build().unwrap()
}

/// Polls `future` on this thread alone, without a tokio runtime.
pub(crate) fn block_on<F: Future>(future: F) -> F::Output {
    struct Unpark(Thread);

    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }

    assert!(Handle::try_current().is_err());
    let waker = Arc::new(Unpark(thread::current())).into();
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(output) => return output,
            Poll::Pending => thread::park(),
        }
    }
}

/// Uses up all that the current task may do before it has to yield to others.
pub(crate) fn exhaust_budget(cx: &mut Context<'_>) {
    while coop::has_budget_remaining() {
        let _ = pin!(coop::consume_budget()).poll(cx);
    }
}

/// Waits, by the clock of the wall, until `done`; for runtimes that this thread does not drive.
pub(crate) fn wait_until(done: impl Fn() -> bool) -> bool {
    (0..1_000).any(|_| {
        thread::sleep(Duration::from_millis(2));
        done()
    })
}
