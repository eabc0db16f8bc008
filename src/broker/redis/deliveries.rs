//! [`Deliveries`]: the stream of what a consumer of a group is given.

use std::{
    fmt,
    future::Future,
    mem,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll, ready},
    time::Duration,
};

use futures_util::Stream;
use tokio::{
    sync::{mpsc::UnboundedReceiver, oneshot},
    task::JoinHandle,
};
use tower::limit::ConcurrencyLimitLayer;

use super::{Delivery, SubscriptionError, channel::Channel, reader::release};
use crate::{broker::ending::Ending, consumer::Subscription};

/// The deliveries to one consumer of a group.
///
/// Made by [`ConsumerGroup::connect`](super::ConsumerGroup::connect). It reads in a task of its own,
/// and only as much as may be unanswered: what was read and not settled is never more than
/// [`prefetch`](Self::prefetch).
///
/// # Closing
///
/// [`poll_stop`](Subscription::poll_stop) reads nothing more, and gives back what was read and not yet
/// taken from the stream, without a delivery counted; what a read that is under way still brings
/// follows.
///
/// [`poll_close`](Subscription::poll_close) gives back at once whatever this consumer has: what was
/// read and not yet taken from the stream without a delivery counted, what was handed out and not
/// answered with the one that it had. Settle what is running first: its settlement is refused from
/// then on. To drop the stream does the same, in the background.
///
/// If the connection is lost, the entries stay pending on the server, and another consumer reclaims
/// them after [`min_idle`](super::ConsumerGroup::min_idle).
#[must_use = "a subscription that is dropped is closed"]
pub struct Deliveries {
    incoming: UnboundedReceiver<Delivery>,
    close: Option<oneshot::Sender<Vec<String>>>,
    /// Gives back what nobody had taken when it was stopped.
    stopping: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    /// What that was; the close gives back what is left of it.
    unseen: Vec<String>,
    reader: JoinHandle<Result<(), SubscriptionError>>,
    /// How the reader ended.
    ended: Option<Ending<SubscriptionError>>,
    channel: Arc<Channel>,
    prefetch: usize,
    min_idle: Duration,
}

impl Deliveries {
    pub(super) fn new(
        incoming: UnboundedReceiver<Delivery>,
        close: oneshot::Sender<Vec<String>>,
        reader: JoinHandle<Result<(), SubscriptionError>>,
        channel: Arc<Channel>,
        prefetch: usize,
        min_idle: Duration,
    ) -> Self {
        Self {
            incoming,
            close: Some(close),
            stopping: None,
            unseen: Vec::new(),
            reader,
            ended: None,
            channel,
            prefetch,
            min_idle,
        }
    }

    /// Returns how many deliveries may be unanswered.
    pub fn prefetch(&self) -> usize {
        self.prefetch
    }

    /// Returns the gate that goes with it: a concurrency limit of the same number.
    pub fn gate(&self) -> ConcurrencyLimitLayer {
        ConcurrencyLimitLayer::new(self.prefetch)
    }

    /// Returns the name under which the server knows this consumer.
    pub fn consumer(&self) -> &str {
        &self.channel.link.consumer
    }

    fn begin_close(&mut self) {
        let Some(close) = self.close.take() else {
            return;
        };
        self.channel.link.closed.store(true, Ordering::Release);
        self.take_unread();
        self.stopping = None;
        // The reader may have ended for a reason of its own.
        drop(close.send(mem::take(&mut self.unseen)));
    }

    /// Takes nothing more from the reader, which reads nothing more then; returns what had come.
    fn take_unread(&mut self) -> Vec<Delivery> {
        self.incoming.close();
        let unread: Vec<_> = std::iter::from_fn(|| self.incoming.try_recv().ok()).collect();
        let unseen = unread.iter().map(|delivery| delivery.id().to_owned());
        self.unseen.extend(unseen);
        unread
    }

    /// Waits for the end of the reader.
    fn poll_ended(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.ended.is_none() {
            // A reader that is gone without a word went down with its runtime.
            let ended = ready!(Pin::new(&mut self.reader).poll(cx))
                .unwrap_or(Err(SubscriptionError::Disconnected(None)));
            self.channel.link.closed.store(true, Ordering::Release);
            self.ended = Some(Ending::new(ended));
        }
        Poll::Ready(())
    }
}

impl Stream for Deliveries {
    type Item = Result<Delivery, SubscriptionError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.poll_ended(cx).is_ready() {
            return Poll::Ready(self.ended.as_mut().and_then(Ending::next));
        }
        loop {
            // When there are no more, it was stopped, or the reader is about to end, which wakes this
            // task.
            let Some(delivery) = ready!(self.incoming.poll_recv(cx)) else {
                return Poll::Pending;
            };
            // It waited here for so long that it is another consumer's by now, or will be.
            if delivery.asked_at().elapsed() >= self.min_idle {
                self.channel.link.free.add_permits(1);
                continue;
            }
            return Poll::Ready(Some(Ok(delivery)));
        }
    }
}

impl Subscription for Deliveries {
    type Job = Delivery;
    type Error = SubscriptionError;

    fn poll_closed(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), SubscriptionError>> {
        ready!(self.poll_ended(cx));
        Poll::Ready(self.ended.as_ref().map_or(Ok(()), Ending::result))
    }

    fn poll_stop(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.close.is_some() && !self.incoming.is_closed() {
            let unread = self.take_unread();
            self.stopping = Some(Box::pin(release(unread)));
        }
        if let Some(stopping) = &mut self.stopping {
            ready!(stopping.as_mut().poll(cx));
            self.stopping = None;
        }
        Poll::Ready(())
    }

    fn prefetch(&self) -> Option<usize> {
        Some(self.prefetch())
    }

    fn is_gone(&self) -> bool {
        self.channel.link.is_stale()
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.begin_close();
        self.poll_ended(cx)
    }
}

impl Drop for Deliveries {
    fn drop(&mut self) {
        self.begin_close();
    }
}

impl fmt::Debug for Deliveries {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Deliveries")
            .field("channel", &self.channel)
            .field("prefetch", &self.prefetch)
            .finish_non_exhaustive()
    }
}
