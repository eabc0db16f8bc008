//! [`Deliveries`] of a pull consumer, as a stream of jobs.

use std::{
    collections::VecDeque,
    fmt,
    future::Future,
    mem,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use async_nats::{
    Subscriber,
    jetstream::{AckKind, consumer::PullConsumer},
};
use futures_util::{Stream, StreamExt};
use tokio::time::timeout;
use tower::limit::ConcurrencyLimitLayer;

use super::{
    Delivery, Pull, SubscriptionError, channel::Channel, fetched::Fetched, liveness::Liveness,
    probe::probe, requests::Requests, unreadable::Search,
};
use crate::{broker::ending::Ending, consumer::Probing, outcome::guard};

/// Stream of the [`Delivery`]s of a pull consumer, and a [`Subscription`](crate::consumer::Subscription).
///
/// # Prefetch
///
/// The deliveries that are requested, that wait here, or that were taken and are unsettled are never more
/// than [`prefetch`](Self::prefetch) together. They are requested only when the stream is polled, and each
/// requested delivery has a place. One request for each free place would cost a round trip for each job. So
/// while a request is open, another is made only when a quarter of the places is free.
///
/// A delivery that waited here for longer than the consumer's ack wait, since nobody polled, is dropped:
/// JetStream gives it to another worker.
///
/// # Disconnects
///
/// The client reconnects by itself, and the stream goes on. Lost requests are made anew, at another inbox, so
/// that the old request reaches nobody. A tag outlives the connection that delivered it, as long as the
/// stream goes on: its settlement goes to a subject that names the message, and JetStream keeps the delivery.
/// Messages that were on their way when the connection broke come back after the ack wait.
///
/// The stream ends with a [`SubscriptionError`] when the client is closed, when the consumer or the stream is
/// deleted, and when the server was silent for the [`reconnect_limit`](Pull::reconnect_limit). From then on
/// its tags are refused. [`poll_closed`](crate::consumer::Subscription::poll_closed) notices the same; it
/// never requests deliveries.
///
/// # Closing
///
/// JetStream has no channels. [`poll_stop`](crate::consumer::Subscription::poll_stop) requests nothing more,
/// makes the open requests reach nobody, and gives back the jobs that wait here or are on their way by a NAK,
/// which counts as a delivery. [`poll_close`](crate::consumer::Subscription::poll_close) does the same, and
/// refuses later settlements ([`DeliveryError::Stale`](super::DeliveryError::Stale)); those jobs come back
/// after the ack wait. Dropping the stream gives nothing back and refuses nothing.
#[must_use = "a stream delivers nothing unless it is polled"]
pub struct Deliveries {
    channel: Arc<Channel>,
    prefetch: usize,
    idle_heartbeat: Duration,
    requests: Requests,
    liveness: Liveness,
    search: Search,
    consumer: Arc<PullConsumer>,
    waiting: VecDeque<Fetched>,
    is_standby: bool,
    state: State,
}

enum State {
    Open,
    Closing(Pin<Box<dyn Future<Output = ()> + Send>>),
    Closed,
    Failed(Ending<SubscriptionError>),
}

impl Deliveries {
    pub(super) async fn open(
        pull: Pull,
        consumer: PullConsumer,
        channel: Arc<Channel>,
    ) -> Result<Self, SubscriptionError> {
        let consumer = Arc::new(consumer);
        let is_standby = pull.priority.overflows();
        let reconnect_limit = pull.reconnect_limit.max(3 * pull.idle_heartbeat);
        let asked = Arc::clone(&consumer);
        let subscribing = Requests::subscribe(
            Arc::clone(&channel),
            asked,
            pull.idle_heartbeat,
            pull.priority,
        );
        let requests = subscribing.await?;
        let mut liveness = Liveness::new(Arc::clone(&consumer), reconnect_limit);
        let info = consumer.cached_info();
        liveness.observe(info);
        let mut search = Search::default();
        // A message that makes the client panic is delivered again to the next client.
        if info.num_redelivered > 0 {
            search.begin(&channel, &consumer);
        }
        Ok(Self {
            channel,
            prefetch: pull.prefetch,
            idle_heartbeat: pull.idle_heartbeat,
            requests,
            liveness,
            search,
            consumer,
            waiting: VecDeque::new(),
            is_standby,
            state: State::Open,
        })
    }

    /// Returns the greatest number of deliveries that are requested, waiting, or unsettled at once.
    pub fn prefetch(&self) -> usize {
        self.prefetch
    }

    /// Returns tower's concurrency limit of the same number, to be placed outside the sentinel.
    pub fn gate(&self) -> ConcurrencyLimitLayer {
        ConcurrencyLimitLayer::new(self.prefetch)
    }

    /// Makes all possible progress, except that it yields no delivery.
    fn drive(&mut self, cx: &mut Context<'_>, may_pull: bool) {
        self.channel.waker.register(cx.waker());
        while matches!(self.state, State::Open) {
            self.receive(cx);
            let is_searched = self.search.poll(cx).is_ready();
            if is_searched | self.poll_step(cx) | self.poll_check(cx) | self.poll_tick(cx) {
                continue;
            }
            if !(may_pull && self.request()) {
                return;
            }
        }
    }

    /// Takes the messages that the client has received.
    fn receive(&mut self, cx: &mut Context<'_>) {
        while let Poll::Ready(received) = self.requests.poll_received(cx) {
            match received {
                Ok(received) => {
                    if received.is_sign_of_life {
                        self.liveness.hear();
                    }
                    if let Some(fetched) = received.delivery {
                        self.liveness.deliver();
                        self.waiting.push_back(fetched);
                    }
                }
                Err(error) => return self.fail(error),
            }
        }
    }

    /// Makes one step, and returns whether there was one.
    fn poll_step(&mut self, cx: &mut Context<'_>) -> bool {
        let step = self.requests.poll_step(cx);
        self.take_result(step)
    }

    fn poll_check(&mut self, cx: &mut Context<'_>) -> bool {
        let check = self.liveness.poll_check(cx);
        self.take_result(check)
    }

    fn poll_tick(&mut self, cx: &mut Context<'_>) -> bool {
        let mut tick = self.liveness.poll_tick(cx);
        let is_alive = matches!(tick, Poll::Ready(Ok(())));
        if is_alive && self.channel.is_connected() {
            tick = Poll::Ready(self.look_after_requests());
        }
        self.take_result(tick)
    }

    /// Renews lost requests, and asks the server for the reason if nothing comes.
    fn look_after_requests(&mut self) -> Result<(), SubscriptionError> {
        let patience = 2 * self.idle_heartbeat;
        let heard = self.liveness.heard();
        self.requests.renew_if_lost(heard, patience)?;
        if self.requests.take_refusal() || heard.elapsed() > patience {
            self.liveness.check();
        }
        if self.requests.requested() > 0 {
            self.liveness.check_if_idle(patience);
        }
        self.requests.keep_consumer();
        if let Some(times) = self.requests.take_suspicion() {
            guard(|| {
                tracing::warn!(
                    stream = self.channel.stream,
                    consumer = self.channel.consumer,
                    times,
                    "connection broken right after a request: looking for messages that the client can't parse"
                );
            });
            self.search.begin(&self.channel, &self.consumer);
        }
        Ok(())
    }

    /// Returns whether `result` is ready; an error ends the subscription.
    fn take_result(&mut self, result: Poll<Result<(), SubscriptionError>>) -> bool {
        if let Poll::Ready(Err(error)) = result {
            self.fail(error);
            return true;
        }
        result.is_ready()
    }

    /// Requests deliveries for the free places, and returns whether it did.
    fn request(&mut self) -> bool {
        if self.search.is_running() {
            return false;
        }
        let taken = self.channel.held() + self.waiting.len();
        self.requests.request(self.prefetch, taken)
    }

    /// Requests nothing more, and begins to give back the deliveries that nobody took.
    fn begin_closing(&mut self) {
        if matches!(self.state, State::Open) {
            self.liveness.close();
            self.search.close();
            let channel = Arc::clone(&self.channel);
            let subscriber = self.requests.close();
            let waiting = mem::take(&mut self.waiting);
            self.state = State::Closing(Box::pin(give_back(channel, subscriber, waiting)));
        }
    }

    fn poll_closing(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let State::Closing(closing) = &mut self.state {
            ready!(closing.as_mut().poll(cx));
            self.state = State::Closed;
        }
        Poll::Ready(())
    }

    fn fail(&mut self, error: SubscriptionError) {
        // A new subscription gets the unsettled jobs again.
        self.channel.give_up();
        drop(self.requests.close());
        self.liveness.close();
        self.search.close();
        self.waiting.clear();
        self.state = State::Failed(Ending::new(Err(error)));
    }
}

impl Stream for Deliveries {
    type Item = Result<Delivery, SubscriptionError>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        loop {
            this.drive(cx, true);
            match &mut this.state {
                State::Open => {}
                State::Closing(_) | State::Closed => return Poll::Ready(None),
                State::Failed(ending) => return Poll::Ready(ending.next()),
            }
            let Some(fetched) = this.waiting.pop_front() else {
                return Poll::Pending;
            };
            // It is dropped otherwise, and its place is free again.
            if fetched.since.elapsed() < this.channel.lease(fetched.delivered) {
                let delivery = Delivery::new(Arc::clone(&this.channel), fetched);
                return Poll::Ready(Some(Ok(delivery)));
            }
        }
    }
}

impl crate::consumer::Subscription for Deliveries {
    type Job = Delivery;
    type Error = SubscriptionError;

    fn poll_closed(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), SubscriptionError>> {
        let this = self.get_mut();
        this.drive(cx, false);
        match &this.state {
            State::Open => Poll::Pending,
            State::Closing(_) | State::Closed => this.poll_closing(cx).map(Ok),
            State::Failed(ending) => Poll::Ready(ending.result()),
        }
    }

    fn poll_stop(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.get_mut();
        this.begin_closing();
        this.poll_closing(cx)
    }

    fn prefetch(&self) -> Option<usize> {
        Some(self.prefetch())
    }

    fn is_gone(&self) -> bool {
        self.channel.is_given_up()
    }

    /// Asks for the state of the consumer; JetStream does not report what this worker holds.
    ///
    /// A worker that helps only if others don't keep up is told of no jobs that wait, since they may wait for others.
    fn probe(&self) -> Option<Probing> {
        let (channel, consumer) = (Arc::clone(&self.channel), Arc::clone(&self.consumer));
        let received = self.waiting.len();
        Some(Box::pin(probe(
            channel,
            consumer,
            received,
            self.is_standby,
        )))
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.get_mut();
        this.channel.give_up();
        this.begin_closing();
        this.poll_closing(cx)
    }
}

impl fmt::Debug for Deliveries {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Deliveries")
            .field("prefetch", &self.prefetch)
            .field("requested", &self.requests.requested())
            .field("waiting", &self.waiting.len())
            .field("unanswered", &self.channel.held())
            .finish_non_exhaustive()
    }
}

/// Ends the subscription and gives back the deliveries that nobody took, as far as the connection allows.
async fn give_back(
    channel: Arc<Channel>,
    subscriber: Option<Subscriber>,
    mut waiting: VecDeque<Fetched>,
) {
    let closing = async {
        if let Some(mut subscriber) = subscriber {
            // Ends when all messages that were on their way have come.
            if subscriber.drain().await.is_ok() {
                while let Some(message) = subscriber.next().await {
                    waiting.extend(Fetched::read(message, &channel.context));
                }
            }
        }
        while let Some(fetched) = waiting.pop_front() {
            let nak = AckKind::Nak(None).into();
            if channel.client.publish(fetched.reply, nak).await.is_err() {
                return;
            }
        }
        // An error means that the connection is gone; the remaining jobs come back by themselves.
        drop(channel.client.flush().await);
    };
    if timeout(channel.confirm_timeout, closing).await.is_err() {
        guard(|| {
            tracing::warn!("fetched jobs not given back: they return after the ack wait");
        });
    }
}
