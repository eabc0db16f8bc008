//! [`Ticker`] of one job, which asks the broker for more time until it is stopped.

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

/// Schedule of a ticker.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Schedule {
    /// Time from one keep-alive to the next.
    pub(crate) interval: Duration,
    /// Time limit of one keep-alive.
    pub(crate) try_timeout: Duration,
}

impl Schedule {
    /// Returns the pauses after keep-alives that failed.
    fn pauses(self) -> Delays {
        let least = |part: u32| (self.interval / part).max(Duration::from_nanos(1));
        Delays::new(least(8)..=least(2))
    }
}

/// A ticker, shared by its task, the job's future and the job's supervisor.
///
/// It is polled under the lock, and `stop` takes its future away under the same lock. So once `stop`
/// returns, no keep-alive is being polled, and none ever will be.
pub(crate) struct Ticker {
    /// Set before the stop waits for the lock. Otherwise a task that is woken at once could take the lock
    /// again and again, before the stop gets it.
    stopped: AtomicBool,
    // `None` once stopped or ended.
    tick: Mutex<Option<Tick>>,
}

struct Tick {
    /// Ends when the lease is lost.
    future: Pin<Box<dyn Future<Output = ()> + Send>>,
    /// The job's span. It is dropped with the ticker, so that it closes with the job.
    span: GuardedSpan,
    /// The waker of the task, to end it.
    waker: Waker,
}

impl Ticker {
    pub(crate) fn new<Tag>(tag: Tag, schedule: Schedule) -> Arc<Self>
    where
        Tag: Settle + Send + Sync + 'static,
    {
        let tick = Tick {
            future: Box::pin(tick(tag, schedule, Instant::now())),
            span: GuardedSpan::new(Span::current()),
            waker: Waker::noop().clone(),
        };
        Arc::new(Self {
            stopped: AtomicBool::new(false),
            tick: Mutex::new(Some(tick)),
        })
    }

    /// Returns the task of this ticker, which cancels `job` if the lease is lost.
    pub(crate) fn run(self: Arc<Self>, job: Cancellation) -> impl Future<Output = ()> + Send {
        // Made before the first poll, since a runtime that has ended never polls.
        let task = Task(self);
        async move {
            if let Some(span) = poll_fn(|cx| task.0.poll(cx)).await {
                // Without the lock: this wakes the supervisor, which may stop this ticker.
                job.cancel(CancelReason::LeaseLost);
                let _entered = span.enter();
                guard(|| tracing::warn!("lease lost: the broker gave the job to another worker"));
            }
        }
    }

    /// Polls the ticker: ready with the job's span if the lease is lost, and with `None` if it is stopped.
    fn poll(&self, cx: &mut Context<'_>) -> Poll<Option<GuardedSpan>> {
        if self.stopped.load(Ordering::Relaxed) {
            return Poll::Ready(None);
        }
        let mut slot = self.lock();
        let Some(tick) = &mut *slot else {
            return Poll::Ready(None);
        };
        let polled = {
            let _entered = tick.span.enter();
            tick.future.as_mut().poll(cx)
        };
        if polled.is_pending() {
            tick.waker.clone_from(cx.waker());
            return Poll::Pending;
        }
        Poll::Ready(slot.take().map(|tick| tick.span))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Tick>> {
        // After a panic the content is only dropped.
        self.tick.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Guard that the ticker's task holds.
struct Task(Arc<Ticker>);

impl Drop for Task {
    /// Reports a ticker that ends although nobody has stopped it.
    fn drop(&mut self) {
        if self.0.stopped.load(Ordering::Relaxed) {
            return;
        }
        let tick = self.0.lock().take();
        let Some(Tick { future, span, .. }) = tick else {
            return;
        };
        let _entered = span.enter();
        drop_quietly(future);
        guard(|| {
            tracing::error!("keep-alive ended: its runtime has ended, or has no timers");
        });
    }
}

impl Companion for Ticker {
    fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
        // In a separate statement, so that the lock is not held while the future is dropped.
        let tick = self.lock().take();
        let Some(tick) = tick else {
            return;
        };
        let Tick {
            future,
            span,
            waker,
        } = tick;
        {
            let _entered = span.enter();
            drop_quietly(future);
        }
        guard(|| waker.wake());
    }
}

/// Guard that stops its ticker when it is dropped.
pub(crate) struct TickerGuard(pub(crate) Arc<Ticker>);

impl Drop for TickerGuard {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// Keeps a delivery alive until its lease is lost.
async fn tick<Tag: Settle>(tag: Tag, schedule: Schedule, mut last: Instant) {
    let mut failures = 0;
    loop {
        match failures {
            // From the start of the last one, so that its duration is not added to the interval.
            0 => wait_until(deadline(last, schedule.interval)).await,
            _ => wait_until(deadline(Instant::now(), schedule.pauses().nth(failures))).await,
        }
        last = Instant::now();
        match keep_alive(&tag, schedule.try_timeout).await {
            Some(Lease::Held) => failures = 0,
            Some(Lease::Lost) => {
                // A panic of its destructor must not hide the loss from the job.
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

/// Asks the broker once; `None` if that failed, which is an event.
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
            guard(|| tracing::warn!(error = printed, "keep-alive failed"));
        }
        Ok(None) => guard(|| tracing::warn!(?limit, "keep-alive timed out")),
        Err(panic) => {
            guard(|| tracing::error!(panic = panic.message(), "keep-alive panicked"));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use crate::{
        keep_alive::ticker::*,
        race::{race, wait},
    };

    #[test]
    fn a_ticker_is_polled_no_more_once_its_stop_returns_and_its_task_ends() {
        race(
            || {
                let is_over = Arc::new(AtomicBool::new(false));
                let seen = Arc::clone(&is_over);
                let future = Box::pin(poll_fn(move |cx| {
                    assert!(!seen.load(Ordering::Acquire));
                    if fastrand::bool() {
                        cx.waker().wake_by_ref();
                    }
                    Poll::Pending
                }));
                let tick = Tick {
                    future,
                    span: GuardedSpan::new(Span::none()),
                    waker: Waker::noop().clone(),
                };
                let ticker = Ticker {
                    stopped: AtomicBool::new(false),
                    tick: Mutex::new(Some(tick)),
                };
                (ticker, is_over)
            },
            |(ticker, is_over)| {
                ticker.stop();
                is_over.store(true, Ordering::Release);
            },
            |(ticker, _)| assert!(wait(|cx| ticker.poll(cx)).is_none()),
            |(ticker, _)| assert!(ticker.lock().is_none()),
        );
    }
}
