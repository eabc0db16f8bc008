//! Cancellation of a job: how it learns that it must stop, and how it can request that itself.

use std::{
    fmt,
    future::{self, Future},
    sync::Arc,
    time::Duration,
};

use tokio::{runtime::Handle, time::Instant};

use crate::outcome::CancelReason;

use self::context::with_current;

mod blocking;
mod context;
#[cfg(test)]
mod races;
mod spare;

pub use self::blocking::spawn_blocking;
pub(crate) use self::{
    context::{Companion, JobContext, Limit, Request, Stopping, enter},
    spare::JobHandle,
};

/// Waits until the current job is told to stop.
///
/// Shorthand for [`Cancellation::current()`]`.cancelled()`. The job is looked up when the function is
/// *called*, so the future may be moved to a child task. Outside of a job it is pending for ever.
///
/// A job is told to stop when its time limit passes, when its caller is gone, at shutdown, and when
/// [`Cancellation::cancel`] is called. It then has the layer's [`grace`](crate::SentinelLayer::grace) (none
/// by default) before it is aborted. A job that returns within its grace has completed.
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
/// Cancel safe: once the job is told to stop, every later call resolves at once.
pub fn cancelled() -> impl Future<Output = ()> + Send + 'static {
    told(with_current(Arc::clone))
}

/// Returns the time left until the current job's time limit; `None` without a limit, and outside of a job.
///
/// Use it for the time limit of a call that the job makes, such as a request. It is zero once the limit has
/// passed: the job is then being stopped, and has at most its [grace](crate::SentinelLayer::grace).
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
    with_current(|job| job.time_left()).flatten()
}

/// Handle to the stop of one job, which can be cloned and passed to child tasks.
///
/// Child tasks do not inherit the job's context, so take [`Cancellation::current`] before `tokio::spawn`. The
/// handle says that the job *is told to stop*, not that it has ended. If a job simply returns, its handles
/// stay pending.
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
    /// Runtime whose clock measures the job's limit, also if the handle is used elsewhere.
    runtime: Option<Handle>,
}

impl Cancellation {
    /// Returns the handle of the current job.
    ///
    /// Outside of a job the handle has no effect: [`cancelled`](Self::cancelled) is pending for ever and
    /// [`cancel`](Self::cancel) does nothing.
    pub fn current() -> Self {
        Self {
            context: with_current(Arc::clone),
            runtime: Handle::try_current().ok(),
        }
    }

    /// Waits until the job is told to stop; see [`cancelled`].
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: once the job is told to stop, every later call resolves at once.
    pub fn cancelled(&self) -> impl Future<Output = ()> + Send + 'static {
        told(self.context.clone())
    }

    /// Returns whether the job was told to stop.
    pub fn is_cancelled(&self) -> bool {
        self.context.as_ref().is_some_and(|job| job.is_told())
    }

    /// Requests that the sentinel stops the job, with `reason`.
    ///
    /// The job goes through the same steps as at its time limit: it is told to stop, has its grace, and is
    /// aborted. The first cause wins: a job that is already being stopped keeps its cause. A job that has
    /// ended, or that returns during these steps, is not affected. Nor is a job whose own panic makes the
    /// request, by a guard that the panic drops. If the job catches that panic, the request counts like any
    /// other. But if the job then panics once more in the same poll, only the [panic hook](crate::panic_hook)
    /// can tell the two panics apart; without it the job has panicked.
    pub fn cancel(&self, reason: CancelReason) {
        if let Some(job) = &self.context {
            job.ask(reason, self.now());
        }
    }

    fn now(&self) -> Instant {
        // Fails in a thread that is about to end, like any attempt to enter a runtime.
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
