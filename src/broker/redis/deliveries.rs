//! [`Deliveries`], the stream of a consumer's jobs.

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

use super::{Delivery, SubscriptionError, channel::Channel, link::Link, reader::release};
use crate::{
    broker::ending::Ending,
    consumer::{Probing, Subscription},
};

/// Stream of the deliveries to one consumer of a group.
///
/// [`ConsumerGroup::connect`](super::ConsumerGroup::connect) creates it. It reads in its own task, and only
/// as much as its places allow: unsettled deliveries are never more than [`prefetch`](Self::prefetch).
///
/// # Closing
///
/// [`poll_stop`](Subscription::poll_stop) reads nothing more. It gives back the deliveries that were not yet
/// taken from the stream, without a charge. Those of a read that is still open follow.
///
/// [`poll_close`](Subscription::poll_close) gives back all entries of this consumer at once. Deliveries that
/// were not yet taken from the stream are not charged; those that were taken and are unsettled are charged
/// with the one delivery. Settle the running jobs first: their settlements are refused from then on. Dropping
/// the stream does the same, in the background.
///
/// If the connection is lost, the entries stay pending on the server, and another consumer reclaims them
/// after [`min_idle`](super::ConsumerGroup::min_idle).
#[must_use = "a subscription that is dropped is closed"]
pub struct Deliveries {
    incoming: UnboundedReceiver<Delivery>,
    close: Option<oneshot::Sender<Vec<String>>>,
    /// Gives back the deliveries that nobody had taken at the stop.
    stopping: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    /// Ids of these deliveries; the close gives back those that are left.
    unseen: Vec<String>,
    reader: JoinHandle<Result<(), SubscriptionError>>,
    /// End of the reader.
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

    /// Returns the greatest number of unsettled deliveries.
    pub fn prefetch(&self) -> usize {
        self.prefetch
    }

    /// Returns tower's concurrency limit of the same number, to be placed outside the sentinel.
    pub fn gate(&self) -> ConcurrencyLimitLayer {
        ConcurrencyLimitLayer::new(self.prefetch)
    }

    /// Returns the name under which the server knows this consumer.
    pub fn consumer(&self) -> &str {
        &self.channel.link.consumer
    }

    pub(super) fn link(&self) -> &Arc<Link> {
        &self.channel.link
    }

    fn begin_close(&mut self) {
        let Some(close) = self.close.take() else {
            return;
        };
        self.channel.link.closed.store(true, Ordering::Release);
        self.take_unread();
        self.stopping = None;
        // The reader may have ended for another reason.
        drop(close.send(mem::take(&mut self.unseen)));
    }

    /// Takes nothing more from the reader, which then reads nothing more; returns the deliveries that had
    /// come.
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
            // A reader that ended without a result went down with its runtime.
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
            // If there are no more, it was stopped, or the reader is about to end, which wakes this task.
            let Some(delivery) = ready!(self.incoming.poll_recv(cx)) else {
                return Poll::Pending;
            };
            // It waited here for so long that another consumer has it by now, or will have it.
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

    /// Counts the entries that are new for the group, delayed ones that are due, and those that were read and not taken;
    /// and those that are pending for this consumer. It takes the rights `+xinfo|groups`, `+xpending`, `+xrange` and
    /// `+zcount`.
    fn probe(&self) -> Option<Probing> {
        let received = self.incoming.len();
        Some(Box::pin(Arc::clone(self.link()).probe(received)))
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
