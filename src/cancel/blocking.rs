//! [`spawn_blocking`]: a job's work that blocks its thread, on another thread.

use std::{
    future::{self, Future},
    panic::resume_unwind,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::task;
use tracing::Span;

use crate::{
    cancel::{Cancellation, JobContext},
    outcome::{Quiet, catch},
    telemetry::GuardedSpan,
};

/// Runs blocking `work` on one of tokio's threads for blocking work; the job awaits it.
///
/// It is [`tokio::task::spawn_blocking`] for use inside a job. The sentinel knows if the work outlives the
/// limit of the job:
///
/// - `work` gets the job's [`Cancellation`]. Between two steps it can check [whether to
///   stop](Cancellation::is_cancelled). Inside of `work`, [`Cancellation::current`] is the same one, and the
///   span is that of the caller.
/// - While the work goes on, the job is not [stopped](crate::outcome::TimedOut::stopped). After its abort the
///   sentinel waits for it, up to the layer's [`stop_wait`](crate::SentinelLayer::stop_wait). After that the
///   job counts towards [`max_abandoned`](crate::SentinelLayer::max_abandoned), also if it returned without
///   awaiting the work.
/// - Work that has not begun when the future is dropped never begins.
///
/// Outside of a job nothing stops the work, and its cancellation belongs to no job.
///
/// # Panics
///
/// Panics outside of a tokio runtime. A panic of `work` continues in the future.
///
/// # Cancel safety
///
/// Dropping the future does not stop work that has begun: nothing can.
///
/// # Examples
///
/// ```
/// use std::{convert::Infallible, thread, time::Duration};
/// use tower::{Service, ServiceExt, service_fn};
/// use tower_layer::Layer;
/// use tower_sentinel::{Outcome, Report, SentinelLayer, spawn_blocking};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// let job = service_fn(|pages: std::sync::Arc<u32>| async move {
///     let printed = spawn_blocking(move |cancellation| {
///         let is_on = |_: &u32| !cancellation.is_cancelled();
///         (0..*pages)
///             .take_while(is_on)
///             .inspect(|_| thread::sleep(Duration::from_millis(1)))
///             .count()
///     });
///     Ok::<_, Infallible>(printed.await)
/// });
/// let policy = service_fn(|report: Report<_, usize, Infallible>| async move {
///     Ok::<_, Infallible>(report.outcome)
/// });
/// let mut sentinel = SentinelLayer::new(policy)
///     .timeout(Duration::from_millis(50))
///     .layer(job);
///
/// let outcome = sentinel.ready().await.unwrap().call(1_000_000.into()).await.unwrap();
/// let Outcome::TimedOut(timed_out) = outcome else { panic!("{outcome:?}") };
/// assert!(timed_out.stopped()); // the closure too
/// # }
/// ```
#[track_caller]
pub fn spawn_blocking<F, R>(work: F) -> impl Future<Output = R> + Send + 'static
where
    F: FnOnce(Cancellation) -> R + Send + 'static,
    R: Send + 'static,
{
    let job = Cancellation::current();
    let span = GuardedSpan::new(Span::current());
    let blocked = job.job().map(|job| Blocked::new(Arc::clone(job)));
    let slot = Slot(Arc::new(Mutex::new(Some((work, blocked)))));
    let begun = Slot(Arc::clone(&slot.0));
    let task = task::spawn_blocking(move || {
        // The thread counts as blocked until the end. A result that comes too late is dropped quietly.
        let (work, _blocked) = begun.take()?;
        let _entered = span.enter();
        Some(Quiet::new(catch(|| match job.job().cloned() {
            Some(context) => context.run(|| work(job)),
            None => work(job),
        })))
    });
    async move {
        let withdrawn = slot;
        let ended = task.await;
        drop(withdrawn);
        match ended.map(|result| result.map(Quiet::into_inner)) {
            Ok(Some(Ok(result))) => result,
            Ok(Some(Err(panic))) => panic.resume(),
            Ok(None) => unreachable!("work is withdrawn by the drop of its future"),
            Err(error) => match error.try_into_panic() {
                Ok(payload) => resume_unwind(payload),
                // The runtime has ended, and the job with it.
                Err(_cancelled) => future::pending().await,
            },
        }
    }
}

/// Work that has not begun. The thread takes it to begin it; it is withdrawn if the future is dropped first.
struct Slot<F>(Arc<Mutex<Option<(F, Option<Blocked>)>>>);

impl<F> Slot<F> {
    fn take(&self) -> Option<(F, Option<Blocked>)> {
        // In a separate statement, so that nothing is dropped while the lock is held.
        let mut slot = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        slot.take()
    }
}

impl<F> Drop for Slot<F> {
    fn drop(&mut self) {
        drop(self.take().map(Quiet::new));
    }
}

/// Mark of a thread that is blocked for a job, until it is dropped.
struct Blocked(Arc<JobContext>);

impl Blocked {
    fn new(job: Arc<JobContext>) -> Self {
        job.block();
        Self(job)
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        self.0.unblock();
    }
}
