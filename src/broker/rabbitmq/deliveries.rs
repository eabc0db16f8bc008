//! [`Deliveries`], the stream of jobs from one channel.

use std::{
    collections::VecDeque,
    fmt,
    future::Future,
    mem,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
};

use futures_util::Stream;
use lapin::{Channel, Connection, Consumer, message::Delivery as Received};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tower::limit::ConcurrencyLimitLayer;

use super::{
    acks::Acks,
    delivery::Delivery,
    error::SubscriptionError,
    kind::QueueKind,
    leaving::{cancel, close, flush, stop},
    message::{Link, Reading},
    moves::Moves,
    probe::probe,
    publisher::Publisher,
};
use crate::{
    broker::ending::Ending,
    consumer::{ProbeError, Probing, Subscription},
};

/// Stream of the jobs of one subscription, over its own channel: a [`Subscription`].
///
/// [`poll_stop`](Subscription::poll_stop) cancels the consumer at the server, which then delivers to others.
/// It gives back with `basic.nack` the jobs that were received and not taken. They are charged if a
/// [release](crate::_guide::rabbitmq#counts) is charged; on a quorum queue, all servers charge the end of the
/// channel.
///
/// [`poll_close`](Subscription::poll_close) lets a quorum queue carry out the last acks before it closes the
/// channel, since the close would discard them. To do so it cancels the consumer and waits for the
/// confirmation, or after a stop waits until 100 ms after the last settlement.
///
/// Each of their requests waits for the server for 5 s at most, for example if the queue has no leader. The
/// server carries out a late one as soon as it can.
///
/// Dropping it closes the channel at once: unsettled jobs are redelivered, and their tags are stale.
#[must_use = "jobs wait unsettled unless the stream is polled"]
pub struct Deliveries {
    channel: Channel,
    consumer: Consumer,
    connection: Arc<Connection>,
    link: Arc<Link>,
    prefetch: u16,
    /// Jobs received and not taken yet, at most the prefetch.
    received: VecDeque<(Received, Instant)>,
    /// Moves of suspects into this queue, and the wait for them before the next job is taken.
    moves: Option<Moves>,
    moving: Option<Step>,
    end: Option<Ending<SubscriptionError>>,
    /// Cancels the consumer, for us or in response to a cancel by the server.
    stopping: Option<Step>,
    closing: Option<Step>,
}

enum Step {
    Begun(Pin<Box<dyn Future<Output = ()> + Send>>),
    Done,
}

impl Step {
    fn new(step: impl Future<Output = ()> + Send + 'static) -> Self {
        Self::Begun(Box::pin(step))
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Self::Begun(step) = self {
            ready!(step.as_mut().poll(cx));
            *self = Self::Done;
        }
        Poll::Ready(())
    }
}

impl Deliveries {
    pub(super) fn new(
        channel: Channel,
        consumer: Consumer,
        connection: Arc<Connection>,
        publisher: Publisher,
        moves: Option<Moves>,
        prefetch: u16,
        reading: Reading,
    ) -> Self {
        let link = Arc::new(Link {
            publisher: Arc::new(publisher),
            reading,
            is_over: CancellationToken::new(),
            is_cancelled: AtomicBool::new(false),
            acks: Arc::new(Acks::new(channel.clone())),
        });
        Self {
            channel,
            consumer,
            connection,
            link,
            prefetch,
            received: VecDeque::new(),
            moves,
            moving: None,
            end: None,
            stopping: None,
            closing: None,
        }
    }

    /// Returns the greatest number of unsettled jobs at a time.
    pub fn prefetch(&self) -> usize {
        self.prefetch.into()
    }

    /// Returns tower's concurrency limit of the same number, to be placed outside the sentinel.
    pub fn gate(&self) -> ConcurrencyLimitLayer {
        ConcurrencyLimitLayer::new(self.prefetch())
    }

    /// Waits for the next message from the client; `None` once the stream has ended.
    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<Option<(Received, Instant)>> {
        if self.end.is_some() {
            return Poll::Ready(None);
        }
        let reason = match ready!(Pin::new(&mut self.consumer).poll_next(cx)) {
            Some(Ok(received)) => return Poll::Ready(Some((received, Instant::now()))),
            Some(Err(error)) => SubscriptionError::new(self.link.publisher.queue(), error),
            None => self.reason_of_cancel(),
        };
        match reason {
            SubscriptionError::Cancelled { .. } => self.answer_cancel(cx),
            _ => self.give_up(),
        }
        self.end = Some(Ending::new(Err(reason)));
        Poll::Ready(None)
    }

    /// Lets the server forget a consumer that it has cancelled, as lapin sends no response.
    ///
    /// After a consumer timeout on 4.3 the server would go on to deliver to it, and so to nobody, once all
    /// overdue jobs are acked.
    fn answer_cancel(&mut self, cx: &mut Context<'_>) {
        self.link.is_cancelled.store(true, Ordering::Release);
        let (channel, tag) = (self.channel.clone(), self.consumer.tag());
        let mut cancelling = Step::new(async move {
            // If the channel is closed, that makes the server forget it, too.
            cancel(&channel, tag).await;
        });
        // The first poll hands the cancel over.
        let _pending = cancelling.poll(cx);
        self.stopping = Some(cancelling);
    }

    /// Returns the reason for the end of the stream: lapin ends it alike for a cancel by the server and for a
    /// close from this side.
    fn reason_of_cancel(&self) -> SubscriptionError {
        let state = lapin::ErrorKind::InvalidConnectionState(lapin::ConnectionState::Closed);
        if !self.connection.status().connected() {
            return SubscriptionError::ConnectionClosed(state.into());
        }
        if !self.channel.status().connected() {
            let state = lapin::ChannelState::Closed;
            let error = lapin::ErrorKind::InvalidChannelState(state, "the channel was closed");
            return SubscriptionError::ChannelClosed(error.into());
        }
        let queue = self.link.publisher.queue().to_owned();
        SubscriptionError::Cancelled { queue }
    }

    /// Waits until all moves of suspects are over that began before the next job was received.
    fn poll_moved(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(moves) = &self.moves else {
            return Poll::Ready(());
        };
        let moving = self
            .moving
            .get_or_insert_with(|| Step::new(moves.clone().ended()));
        ready!(moving.poll(cx));
        self.moving = None;
        Poll::Ready(())
    }

    /// Makes the tags stale, and drops the jobs that were not taken.
    fn give_up(&mut self) {
        self.link.is_over.cancel();
        self.link.acks.give_up();
        self.received.clear();
    }
}

impl Stream for Deliveries {
    type Item = Result<Delivery, SubscriptionError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if self.received.is_empty() {
                match ready!(self.poll_receive(cx)) {
                    Some(received) => self.received.push_back(received),
                    None => return Poll::Ready(self.end.as_mut().and_then(Ending::next)),
                }
            }
            ready!(self.poll_moved(cx));
            match self.received.pop_front() {
                // Void: its channel was closed after it had come.
                Some((received, _)) if received.acker.poisoned() => {}
                Some((received, at)) => {
                    let delivery = Delivery::new(received, at, &self.link);
                    return Poll::Ready(Some(Ok(delivery)));
                }
                None => {}
            }
        }
    }
}

impl Subscription for Deliveries {
    type Job = Delivery;
    type Error = SubscriptionError;

    /// Waits until the channel is closed, or the subscription to it is cancelled by the server or
    /// stopped.
    ///
    /// After a cancel or a stop the channel is still open: what was delivered can be settled until
    /// [`poll_close`](Subscription::poll_close).
    fn poll_closed(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), SubscriptionError>> {
        while let Some(received) = ready!(self.poll_receive(cx)) {
            self.received.push_back(received);
        }
        if let Some(Step::Begun(_)) = self.closing {
            ready!(self.poll_close(cx));
            return Poll::Ready(Ok(()));
        }
        self.received.clear();
        Poll::Ready(self.end.as_ref().map_or(Ok(()), Ending::result))
    }

    /// Ends the stream at once; ready when the server has confirmed the cancel and all jobs are given back.
    fn poll_stop(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        if this.end.is_none() {
            // Before the server confirms, which looks like a cancel by the server.
            this.end = Some(Ending::new(Ok(())));
            let received = mem::take(&mut this.received);
            let stop = stop(this.channel.clone(), this.consumer.clone(), received);
            this.stopping = Some(Step::new(stop));
        }
        let stopping = this.stopping.as_mut();
        stopping.map_or(Poll::Ready(()), |stopping| stopping.poll(cx))
    }

    /// Returns whether the channel is closed. After a cancel by the server it is not.
    fn prefetch(&self) -> Option<usize> {
        Some(self.prefetch())
    }

    fn is_gone(&self) -> bool {
        self.link.is_over.is_cancelled()
            || !self.channel.status().connected()
            || !self.connection.status().connected()
    }

    /// Asks for the number of ready jobs, by a passive declaration on a channel of its own, and lets the channel of the
    /// subscription respond.
    ///
    /// AMQP does not report what the server counts as unacked.
    fn probe(&self) -> Option<Probing> {
        let (connection, channel) = (Arc::clone(&self.connection), self.channel.clone());
        let queue = self.link.publisher.queue().to_owned();
        let (prefetch, received) = (self.prefetch, self.received.len() as u64);
        Some(Box::pin(async move {
            let probed = probe(
                connection,
                channel,
                queue.as_str().into(),
                prefetch,
                received,
            );
            let probed = probed.await;
            probed.map_err(|error| ProbeError::new(SubscriptionError::new(&queue, error)))
        }))
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        this.give_up();
        this.end.get_or_insert(Ending::new(Ok(())));
        // The close gives back the jobs that the stop had no time for.
        let stopped = this.stopping.take().is_some();
        let Self {
            channel,
            consumer,
            link,
            ..
        } = this;
        let closing = this.closing.get_or_insert_with(|| {
            let (channel, link) = (channel.clone(), Arc::clone(link));
            let consumer = (!stopped).then(|| consumer.tag());
            Step::new(async move {
                if link.publisher.kind() == QueueKind::Quorum {
                    flush(&channel, consumer, &link).await;
                }
                close(&channel).await;
            })
        });
        closing.poll(cx)
    }
}

impl Drop for Deliveries {
    fn drop(&mut self) {
        self.give_up();
    }
}

impl fmt::Debug for Deliveries {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Deliveries")
            .field("queue", &self.link.publisher.queue())
            .field("prefetch", &self.prefetch)
            .field("end", &self.end)
            .finish_non_exhaustive()
    }
}
