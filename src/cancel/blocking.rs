//! [`spawn_blocking`]: work of a job that blocks its thread, on a thread of its own.

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

/// Runs `work`, which blocks its thread, on one of tokio's threads for that; the job awaits it.
///
/// It is [`tokio::task::spawn_blocking`] for the inside of a job, whose limit it does not outlive
/// unseen:
///
/// - `work` is given the job's [`Cancellation`], to ask between two steps
///   [whether it is to stop](Cancellation::is_cancelled). [`Cancellation::current`] is the same one in
///   there, and the span is that of the caller.
/// - While it goes on, the job is not [stopped](crate::outcome::TimedOut::stopped): after its abort it is waited
///   for, up to the layer's [`stop_wait`](crate::SentinelLayer::stop_wait). After that it counts towards
///   [`max_abandoned`](crate::SentinelLayer::max_abandoned), also if the job returned without awaiting it.
/// - Work that has not begun when the future is dropped never does.
///
/// Outside of a job nothing stops it, and its cancellation is that of no job.
///
/// # Panics
///
/// Panics outside of a tokio runtime. A panic of `work` goes on in the future.
///
/// # Cancel safety
///
/// To drop the future does not stop work that has begun: nothing can.
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
        // Its place is counted to the end, and what it returns is dropped quietly if it is too late.
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

/// Work that has not begun, for the thread that begins it; withdrawn by whoever drops it first.
struct Slot<F>(Arc<Mutex<Option<(F, Option<Blocked>)>>>);

impl<F> Slot<F> {
    fn take(&self) -> Option<(F, Option<Blocked>)> {
        // In a statement of its own: nothing is dropped while it is locked.
        let mut slot = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        slot.take()
    }
}

impl<F> Drop for Slot<F> {
    fn drop(&mut self) {
        drop(self.take().map(Quiet::new));
    }
}

/// A thread that is blocked for a job, until it is dropped.
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
