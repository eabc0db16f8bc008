//! [`Deliveries`]: the deliveries of one consumer.

use std::{
    fmt,
    future::ready as resolved,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use futures_util::Stream;
use tokio::time::Instant;
use tower::limit::ConcurrencyLimitLayer;

use super::{
    delivery::Delivery,
    error::SubscriptionError,
    state::{Declared, End, Next},
};
use crate::{
    consumer::{ProbeError, Probing, Subscription},
    time::Timer,
    waiters::Waiter,
};

/// The [`Subscription`] of one consumer: a stream of its deliveries, over its own channel.
///
/// A job is delivered when the stream is polled. At most [`prefetch`](Self::prefetch) jobs are unsettled at a
/// time; after that many, the stream waits for a settlement.
///
/// Dropping it closes the channel, like the end of a process: unsettled jobs go back to the queue, and their
/// tags are stale.
///
/// # Panics
///
/// While a job of the queue is delayed or has a lease, a stream that has to wait panics if it is polled
/// outside of a tokio runtime with time enabled.
#[must_use = "nothing is delivered unless the stream is polled"]
pub struct Deliveries<P> {
    queue: Arc<Declared<P>>,
    channel: usize,
    prefetch: usize,
    /// Timer until the next job is due. Kept for reuse.
    timer: Option<Timer>,
    /// `true` once the stream has returned its last item, or was stopped.
    is_over: bool,
    /// Waits for a job.
    next: Waiter,
    /// Waits for the end of the channel, perhaps in another task.
    closed: Waiter,
}

impl<P> Deliveries<P> {
    pub(super) fn new(queue: &Arc<Declared<P>>, channel: usize, prefetch: usize) -> Self {
        Self {
            queue: Arc::clone(queue),
            channel,
            prefetch,
            timer: None,
            is_over: false,
            next: Waiter::default(),
            closed: Waiter::default(),
        }
    }

    /// Returns the number of jobs that may be unsettled at a time.
    pub fn prefetch(&self) -> usize {
        self.prefetch
    }

    /// Returns tower's concurrency limit with the number of the prefetch, to be put outside of the sentinel.
    ///
    /// So the two numbers can't differ. With a lower limit, delivered jobs would wait unprocessed. A higher
    /// limit would never be reached.
    pub fn gate(&self) -> ConcurrencyLimitLayer {
        ConcurrencyLimitLayer::new(self.prefetch)
    }

    /// Waits until `at`.
    fn poll_until(&mut self, at: Instant, cx: &mut Context<'_>) -> Poll<()> {
        let timer = self.timer.get_or_insert_with(|| Timer::until(Some(at)));
        timer.reset(at);
        let polled = timer.poll(cx);
        polled.expect("a job of the queue has a time, which takes a tokio runtime with timers")
    }
}

impl<P: Clone> Stream for Deliveries<P> {
    type Item = Result<Delivery<P>, SubscriptionError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if self.is_over {
                return Poll::Ready(None);
            }
            let step = self.queue.server.lock().next(self.channel, None);
            let mut next = step.finish();
            if let Next::Wait(_) = next {
                // Not before it is needed: most polls find a job.
                self.next.register(cx.waker());
                let step = self
                    .queue
                    .server
                    .lock()
                    .next(self.channel, Some(&self.next));
                next = step.finish();
            }
            match next {
                Next::Job(taken, address) => {
                    let delivery = Delivery::new(&self.queue, taken, address);
                    return Poll::Ready(Some(Ok(delivery)));
                }
                Next::Ended(end) => {
                    self.is_over = true;
                    if end == End::Lost {
                        return Poll::Ready(Some(Err(SubscriptionError::Disconnected)));
                    }
                }
                Next::Wait(None) => return Poll::Pending,
                Next::Wait(Some(at)) => ready!(self.poll_until(at, cx)),
            }
        }
    }
}

impl<P: Clone> Subscription for Deliveries<P> {
    type Job = Delivery<P>;
    type Error = SubscriptionError;

    fn poll_closed(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), SubscriptionError>> {
        self.closed.register(cx.waker());
        let mut state = self.queue.server.lock();
        let end = state.poll_closed(self.channel, &self.closed);
        drop(state);
        match end {
            None => Poll::Pending,
            Some(End::GivenUp) => Poll::Ready(Ok(())),
            Some(End::Lost) => Poll::Ready(Err(SubscriptionError::Disconnected)),
        }
    }

    /// Ends the stream; ready at once.
    fn poll_stop(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        // No job is buffered: a job is delivered when the stream is polled.
        self.is_over = true;
        Poll::Ready(())
    }

    fn prefetch(&self) -> Option<usize> {
        Some(self.prefetch())
    }

    fn is_gone(&self) -> bool {
        self.queue.server.lock().is_closed(self.channel)
    }

    /// Counts the jobs that are ready, and those that this channel holds; resolves at once.
    fn probe(&self) -> Option<Probing> {
        let step = self.queue.server.lock().probe(self.channel);
        let probe = step.finish().map_err(ProbeError::new);
        Some(Box::pin(resolved(probe)))
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        let step = self.queue.server.lock().close(self.channel);
        step.finish();
        Poll::Ready(())
    }
}

// The timer is boxed.
impl<P> Unpin for Deliveries<P> {}

impl<P> Drop for Deliveries<P> {
    fn drop(&mut self) {
        let step = self.queue.server.lock().forget(self.channel);
        step.finish();
    }
}

impl<P> fmt::Debug for Deliveries<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Deliveries")
            .field("queue", &self.queue.config.name)
            .field("prefetch", &self.prefetch)
            .finish_non_exhaustive()
    }
}
