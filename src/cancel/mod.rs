//! How a job learns that it is to stop, and how it can ask for it.

use std::{
    fmt,
    future::{self, Future},
    sync::Arc,
    time::Duration,
};

use tokio::{runtime::Handle, time::Instant};

use crate::outcome::CancelReason;

use self::context::CURRENT;

mod blocking;
mod context;
mod spare;

pub use self::blocking::spawn_blocking;
pub(crate) use self::{
    context::{Companion, JobContext, Limit, Request, Stopping},
    spare::JobHandle,
};

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
            job.ask(reason, self.now());
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
