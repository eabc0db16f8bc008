//! The ticker of one job: asks the broker for more time until it is stopped.

use std::{
    future::{Future, poll_fn},
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use tokio::time::{Instant, sleep_until, timeout};
use tracing::Span;

use crate::{
    backoff::Delays,
    cancel::{Cancellation, Companion},
    outcome::{CancelReason, catch, drop_quietly, guard, print},
    settle::{Lease, Settle},
    telemetry::GuardedSpan,
    time::deadline,
};

/// When a ticker asks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rhythm {
    /// From one keep-alive to the next.
    pub(crate) interval: Duration,
    /// How long one may take.
    pub(crate) try_timeout: Duration,
}

impl Rhythm {
    /// The pauses after keep-alives that failed.
    fn pauses(self) -> Delays {
        let least = |part: u32| (self.interval / part).max(Duration::from_nanos(1));
        Delays::new(least(8)..=least(2))
    }
}

/// A ticker, as its task, its job's future and its job's supervisor share it.
///
/// Whoever polls it holds the lock, and whoever stops it takes its future away under that lock. So
/// once `stop` returns no keep-alive is being polled, and none ever will.
pub(crate) struct Ticker {
    /// Set before the lock is asked for: a task that is woken at once would otherwise take it
    /// again, and again, before whoever waits for it.
    stopped: AtomicBool,
    // `None` once it is stopped, or has ended.
    beat: Mutex<Option<Beat>>,
}

struct Beat {
    /// Ends when the lease is lost.
    future: Pin<Box<dyn Future<Output = ()> + Send>>,
    /// The job's; let go with the ticker, so that it closes with the job.
    span: GuardedSpan,
    /// That of the task, which is to end.
    waker: Waker,
}

impl Ticker {
    pub(crate) fn new<Tag>(tag: Tag, rhythm: Rhythm) -> Arc<Self>
    where
        Tag: Settle + Send + Sync + 'static,
    {
        let beat = Beat {
            future: Box::pin(tick(tag, rhythm, Instant::now())),
            span: GuardedSpan::new(Span::current()),
            waker: Waker::noop().clone(),
        };
        Arc::new(Self {
            stopped: AtomicBool::new(false),
            beat: Mutex::new(Some(beat)),
        })
    }

    /// Returns the task of this ticker; a lost lease stops `job`.
    pub(crate) fn run(self: Arc<Self>, job: Cancellation) -> impl Future<Output = ()> + Send {
        // Made before the first poll, which a runtime that has ended never comes to.
        let task = Task(self);
        async move {
            if let Some(span) = poll_fn(|cx| task.0.poll(cx)).await {
                // Without the lock: it wakes the supervisor, who may want to stop this ticker.
                job.cancel(CancelReason::LeaseLost);
                let _entered = span.enter();
                guard(|| tracing::warn!("the broker gave a job to somebody else"));
            }
        }
    }

    /// Ready with the span of the job if the lease is lost, and without if the ticker is stopped.
    fn poll(&self, cx: &mut Context<'_>) -> Poll<Option<GuardedSpan>> {
        if self.stopped.load(Ordering::Relaxed) {
            return Poll::Ready(None);
        }
        let mut slot = self.lock();
        let Some(beat) = &mut *slot else {
            return Poll::Ready(None);
        };
        let polled = {
            let _entered = beat.span.enter();
            beat.future.as_mut().poll(cx)
        };
        if polled.is_pending() {
            beat.waker.clone_from(cx.waker());
            return Poll::Pending;
        }
        Poll::Ready(slot.take().map(|beat| beat.span))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Beat>> {
        // What is left behind by a panic is only ever dropped.
        self.beat.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The hold of a task on its ticker.
struct Task(Arc<Ticker>);

impl Drop for Task {
    /// Tells of a ticker that goes no further though nobody has stopped it.
    fn drop(&mut self) {
        if self.0.stopped.load(Ordering::Relaxed) {
            return;
        }
        let beat = self.0.lock().take();
        let Some(Beat { future, span, .. }) = beat else {
            return;
        };
        let _entered = span.enter();
        drop_quietly(future);
        guard(|| {
            tracing::error!(
                "a job is not kept alive any more: the runtime of the keep-alive has no timers, or has ended"
            );
        });
    }
}

impl Companion for Ticker {
    fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
        // In a statement of its own: the lock is not held while the future is dropped.
        let beat = self.lock().take();
        let Some(beat) = beat else {
            return;
        };
        let Beat {
            future,
            span,
            waker,
        } = beat;
        {
            let _entered = span.enter();
            drop_quietly(future);
        }
        guard(|| waker.wake());
    }
}

/// Stops its ticker when it is dropped.
pub(crate) struct Stopping(pub(crate) Arc<Ticker>);

impl Drop for Stopping {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// Keeps a delivery alive until its lease is lost.
async fn tick<Tag: Settle>(tag: Tag, rhythm: Rhythm, mut last: Instant) {
    let mut failures = 0;
    loop {
        match failures {
            // From the start of the last one: how long it took is not added to the interval.
            0 => wait_until(deadline(last, rhythm.interval)).await,
            _ => wait_until(deadline(Instant::now(), rhythm.pauses().nth(failures))).await,
        }
        last = Instant::now();
        match keep_alive(&tag, rhythm.try_timeout).await {
            Some(Lease::Held) => failures = 0,
            Some(Lease::Lost) => {
                // Its destructor must not keep the loss from the job.
                drop_quietly(tag);
                return;
            }
            None => failures = failures.saturating_add(1),
        }
    }
}

async fn wait_until(due: Option<Instant>) {
    match due {
        Some(due) => sleep_until(due).await,
        None => std::future::pending().await,
    }
}

/// Asks once; says in an event why there is no answer.
async fn keep_alive<Tag: Settle>(tag: &Tag, limit: Duration) -> Option<Lease> {
    let asked = match catch(|| Box::pin(tag.keep_alive())) {
        Err(panic) => Err(panic),
        Ok(mut asking) => {
            let answer = poll_fn(|cx| match catch(|| asking.as_mut().poll(cx)) {
                Ok(polled) => polled.map(Ok),
                Err(panic) => Poll::Ready(Err(panic)),
            });
            let answer = timeout(limit, answer).await;
            drop_quietly(asking);
            match answer {
                Ok(answer) => answer.map(Some),
                Err(_elapsed) => Ok(None),
            }
        }
    };
    match asked {
        Ok(Some(Ok(lease))) => return Some(lease),
        Ok(Some(Err(error))) => {
            let printed = print("error", &error);
            drop_quietly(error);
            guard(|| tracing::warn!(error = printed, "a keep-alive failed"));
        }
        Ok(None) => guard(|| tracing::warn!(?limit, "a keep-alive got no answer in time")),
        Err(panic) => {
            guard(|| tracing::error!(panic = panic.message(), "a keep-alive panicked"));
        }
    }
    None
}
