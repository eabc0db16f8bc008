//! [`Deliveries`]: what a pull consumer delivers, as a stream of jobs.

use std::{
    collections::VecDeque,
    fmt,
    future::Future,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll, ready},
    time::Duration,
};

use async_nats::{
    StatusCode, Subscriber,
    client::SubscribeError,
    jetstream::{
        self, AckKind,
        consumer::{
            PullConsumer,
            pull::{BatchConfig, BatchRequestError},
        },
        context::{ConsumerInfoError, ConsumerInfoErrorKind},
    },
};
use futures_util::{Stream, StreamExt};
use tokio::time::{Instant, Sleep, sleep, timeout};
use tower::limit::ConcurrencyLimitLayer;

use super::{Delivery, Pull, SubscriptionError, channel::Channel, delivery::Fetched};

/// How often the connection is looked at.
const TICK: Duration = Duration::from_millis(250);

/// What a pull consumer delivers: a stream of [`Delivery`]s, and a
/// [`Subscription`](crate::Subscription).
///
/// # Prefetch
///
/// Deliveries that are requested, or wait here, or were taken and have no answer are never more
/// than [`prefetch`](Self::prefetch). They are requested only when the stream is polled: what is
/// requested has a place. To request one delivery whenever one place is free would be a round trip for each
/// job, so as long as a request is open another is made when a quarter of the places is free.
///
/// A delivery that waited here for longer than the consumer's ack wait, since nobody polled, is
/// dropped: JetStream gives it to somebody else.
///
/// # Disconnects
///
/// The client reconnects by itself, and the stream goes on. What was requested is requested anew, at
/// another inbox, so that the old request finds nobody. A tag outlives the connection that
/// delivered it, as long as the stream goes on: an answer goes by a subject that names the message,
/// and JetStream keeps what was delivered. What was on its way when the connection broke comes back after the ack wait.
///
/// The stream ends with a [`SubscriptionError`] when the client is closed, when consumer or stream
/// are deleted, and when nothing was heard for the
/// [`reconnect_limit`](Pull::reconnect_limit). From then on its tags are refused. [`poll_closed`](crate::Subscription::poll_closed)
/// notices the same; it never requests.
///
/// # Closing
///
/// JetStream knows no channel. [`poll_close`](crate::Subscription::poll_close) gives back what waits
/// here by a NAK, which counts as a delivery, and refuses what is still to be answered
/// ([`DeliveryError::Stale`](super::DeliveryError::Stale)); those jobs come back after the ack wait.
/// To drop the stream gives nothing back and refuses nothing.
#[must_use = "a stream delivers nothing unless it is polled"]
pub struct Deliveries {
    channel: Arc<Channel>,
    consumer: Arc<PullConsumer>,
    prefetch: usize,
    idle_heartbeat: Duration,
    reconnect_limit: Duration,
    subscriber: Option<Subscriber>,
    inbox: String,
    /// What was requested and is not here yet.
    requested: usize,
    waiting: VecDeque<Fetched>,
    step: Option<Pin<Box<dyn Future<Output = Step> + Send>>>,
    check: Option<Pin<Box<dyn Future<Output = Result<(), ConsumerInfoError>> + Send>>>,
    tick: Pin<Box<Sleep>>,
    /// When the server gave its last sign of life.
    heard: Instant,
    /// Since when something is requested without a break.
    asked: Instant,
    /// How often the client had connected when the inbox was made.
    connects: u64,
    /// Whether JetStream is not there; until the next tick nothing is requested.
    is_refused: bool,
    state: State,
}

enum Step {
    Requested(Result<(), BatchRequestError>),
    Subscribed(Result<Subscriber, SubscribeError>),
}

enum State {
    Open,
    Closing(Pin<Box<dyn Future<Output = ()> + Send>>),
    Closed,
    Failed {
        error: SubscriptionError,
        is_told: bool,
    },
}

impl Deliveries {
    pub(super) async fn open(pull: Pull, channel: Arc<Channel>) -> Result<Self, SubscriptionError> {
        let connects = connects(&channel);
        let inbox = channel.client.new_inbox();
        let subscriber = channel.client.subscribe(inbox.clone()).await;
        let subscriber = subscriber.map_err(|error| SubscriptionError::Subscribe(error.into()))?;
        let now = Instant::now();
        Ok(Self {
            channel,
            consumer: Arc::new(pull.consumer),
            prefetch: pull.prefetch,
            idle_heartbeat: pull.idle_heartbeat,
            reconnect_limit: pull.reconnect_limit.max(3 * pull.idle_heartbeat),
            subscriber: Some(subscriber),
            inbox,
            requested: 0,
            waiting: VecDeque::new(),
            step: None,
            check: None,
            tick: Box::pin(sleep(TICK)),
            heard: now,
            asked: now,
            connects,
            is_refused: false,
            state: State::Open,
        })
    }

    /// Returns how many deliveries may be requested, waiting, or unanswered at once.
    pub fn prefetch(&self) -> usize {
        self.prefetch
    }

    /// Returns the layer that lets as many jobs run at once as are fetched.
    pub fn gate(&self) -> ConcurrencyLimitLayer {
        ConcurrencyLimitLayer::new(self.prefetch)
    }

    /// Does all that is to be done but to hand out a delivery.
    fn drive(&mut self, cx: &mut Context<'_>, may_pull: bool) {
        self.channel.waker.register(cx.waker());
        while matches!(self.state, State::Open) {
            self.receive(cx);
            if self.poll_step(cx) | self.poll_check(cx) | self.poll_tick(cx) {
                continue;
            }
            if !(may_pull && self.pull()) {
                return;
            }
        }
    }

    /// Takes what the client has received.
    fn receive(&mut self, cx: &mut Context<'_>) {
        while let Some(subscriber) = &mut self.subscriber {
            match subscriber.poll_next_unpin(cx) {
                Poll::Pending => return,
                Poll::Ready(None) => return self.fail(SubscriptionError::ClientClosed),
                Poll::Ready(Some(message)) => self.take(message),
            }
        }
    }

    fn take(&mut self, message: async_nats::Message) {
        let status = message.status.unwrap_or(StatusCode::OK);
        if status != StatusCode::NO_RESPONDERS {
            self.heard = Instant::now();
        }
        match status {
            StatusCode::OK => match fetched(message, &self.channel) {
                Some(fetched) => {
                    self.requested = self.requested.saturating_sub(1);
                    self.waiting.push_back(fetched);
                }
                None => tracing::warn!("a message that no consumer delivered was ignored"),
            },
            StatusCode::IDLE_HEARTBEAT => {}
            // JetStream is starting, or is gone.
            StatusCode::NO_RESPONDERS => {
                self.requested = 0;
                self.is_refused = true;
            }
            _ => self.take_status(&message),
        }
    }

    /// Takes the end of a request: it has expired, or the server does not carry it out.
    fn take_status(&mut self, message: &async_nats::Message) {
        let description = message.description.as_deref().unwrap_or_default();
        if description == "Consumer Deleted" {
            return self.fail(SubscriptionError::ConsumerDeleted);
        }
        // The same request would be refused again.
        if description.starts_with("Exceeded MaxRequest")
            || description == "Consumer is push based"
            || description.starts_with("Bad Request")
        {
            let description = description.to_owned();
            return self.fail(SubscriptionError::Refused { description });
        }
        let headers = message.headers.as_ref();
        let pending = headers.and_then(|headers| headers.get("Nats-Pending-Messages"));
        match pending.and_then(|pending| pending.as_str().parse::<usize>().ok()) {
            Some(pending) => self.requested = self.requested.saturating_sub(pending),
            // The request is not named, so how much of it was left is unknown: begin anew.
            None => {
                tracing::warn!(description, "the server does not carry a request out");
                self.requested = 0;
                self.is_refused = true;
            }
        }
    }

    /// Returns whether a step was done.
    fn poll_step(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(step) = &mut self.step else {
            return false;
        };
        let Poll::Ready(step) = step.as_mut().poll(cx) else {
            return false;
        };
        self.step = None;
        match step {
            Step::Requested(Ok(())) => {}
            // The client takes nothing any more; its subscriber will say so.
            Step::Requested(Err(error)) => {
                tracing::warn!(%error, "the client does not take a request");
                self.fail(SubscriptionError::ClientClosed);
            }
            Step::Subscribed(Ok(subscriber)) => self.subscriber = Some(subscriber),
            Step::Subscribed(Err(error)) => {
                self.fail(SubscriptionError::Subscribe(error.into()));
            }
        }
        true
    }

    fn poll_check(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(check) = &mut self.check else {
            return false;
        };
        let Poll::Ready(result) = check.as_mut().poll(cx) else {
            return false;
        };
        self.check = None;
        match result {
            Ok(()) => self.heard = Instant::now(),
            Err(error) => match deleted(&error) {
                Some(deleted) => self.fail(deleted),
                None => tracing::debug!(%error, "jetstream does not answer"),
            },
        }
        true
    }

    fn poll_tick(&mut self, cx: &mut Context<'_>) -> bool {
        if self.tick.as_mut().poll(cx).is_pending() {
            return false;
        }
        let now = Instant::now();
        self.tick.as_mut().reset(now + TICK);
        let silence = now - self.heard;
        if silence > self.reconnect_limit {
            self.fail(SubscriptionError::Unreachable { silence });
            return true;
        }
        if !self.channel.is_connected() {
            return true;
        }
        let patience = 2 * self.idle_heartbeat;
        let is_lost = self.requested > 0 && now - self.heard.max(self.asked) > patience;
        if connects(&self.channel) != self.connects || is_lost {
            self.begin_anew();
        }
        if self.check.is_none() && (silence > patience || self.is_refused) {
            let consumer = Arc::clone(&self.consumer);
            self.check = Some(Box::pin(
                async move { consumer.get_info().await.map(|_| ()) },
            ));
        }
        self.is_refused = false;
        true
    }

    /// Forgets what was requested and takes another inbox, where no old request can deliver.
    fn begin_anew(&mut self) {
        self.connects = connects(&self.channel);
        self.requested = 0;
        self.subscriber = None;
        let client = self.channel.client.clone();
        let inbox = client.new_inbox();
        self.inbox.clone_from(&inbox);
        self.step = Some(Box::pin(async move {
            Step::Subscribed(client.subscribe(inbox).await)
        }));
    }

    /// Requests what there are places for, and returns whether it did.
    fn pull(&mut self) -> bool {
        if self.step.is_some() || self.subscriber.is_none() || self.is_refused {
            return false;
        }
        let taken = self.channel.held() + self.waiting.len() + self.requested;
        let free = self.prefetch.saturating_sub(taken);
        if free == 0 || (self.requested > 0 && free * 4 < self.prefetch) {
            return false;
        }
        if !self.channel.is_connected() {
            return false;
        }
        if self.requested == 0 {
            self.asked = Instant::now();
        }
        self.requested += free;
        let consumer = Arc::clone(&self.consumer);
        let inbox = self.inbox.clone().into();
        let batch = BatchConfig {
            batch: free,
            expires: Some(self.idle_heartbeat.saturating_mul(6)),
            idle_heartbeat: self.idle_heartbeat,
            ..BatchConfig::default()
        };
        self.step = Some(Box::pin(async move {
            Step::Requested(consumer.request_batch(batch, inbox).await)
        }));
        true
    }

    fn fail(&mut self, error: SubscriptionError) {
        // Whoever subscribes anew gets the unanswered again.
        self.channel.give_up();
        self.subscriber = None;
        self.step = None;
        self.check = None;
        self.waiting.clear();
        let is_told = false;
        self.state = State::Failed { error, is_told };
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
                State::Failed { is_told: true, .. } => return Poll::Ready(None),
                State::Failed { error, is_told } => {
                    *is_told = true;
                    return Poll::Ready(Some(Err(error.clone())));
                }
            }
            let Some(fetched) = this.waiting.pop_front() else {
                return Poll::Pending;
            };
            // Dropped otherwise: its place is free again.
            if fetched.since.elapsed() < this.channel.lease(fetched.deliveries) {
                let delivery = Delivery::new(Arc::clone(&this.channel), fetched);
                return Poll::Ready(Some(Ok(delivery)));
            }
        }
    }
}

impl crate::Subscription for Deliveries {
    type Job = Delivery;
    type Error = SubscriptionError;

    fn poll_closed(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), SubscriptionError>> {
        let this = self.get_mut();
        this.drive(cx, false);
        match &mut this.state {
            State::Open => Poll::Pending,
            State::Closing(closing) => {
                ready!(closing.as_mut().poll(cx));
                this.state = State::Closed;
                Poll::Ready(Ok(()))
            }
            State::Closed => Poll::Ready(Ok(())),
            State::Failed { error, .. } => Poll::Ready(Err(error.clone())),
        }
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.get_mut();
        this.channel.give_up();
        if matches!(this.state, State::Open) {
            this.step = None;
            this.check = None;
            let channel = Arc::clone(&this.channel);
            let subscriber = this.subscriber.take();
            let waiting = std::mem::take(&mut this.waiting);
            this.state = State::Closing(Box::pin(give_back(channel, subscriber, waiting)));
        }
        if let State::Closing(closing) = &mut this.state {
            ready!(closing.as_mut().poll(cx));
            this.state = State::Closed;
        }
        Poll::Ready(())
    }
}

impl fmt::Debug for Deliveries {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Deliveries")
            .field("prefetch", &self.prefetch)
            .field("requested", &self.requested)
            .field("waiting", &self.waiting.len())
            .field("unanswered", &self.channel.held())
            .finish_non_exhaustive()
    }
}

/// Ends the subscription and gives back what nobody took, as far as the connection allows.
async fn give_back(
    channel: Arc<Channel>,
    subscriber: Option<Subscriber>,
    mut waiting: VecDeque<Fetched>,
) {
    let closing = async {
        if let Some(mut subscriber) = subscriber {
            // Ends when all that is on its way has come.
            if subscriber.drain().await.is_ok() {
                while let Some(message) = subscriber.next().await {
                    waiting.extend(fetched(message, &channel));
                }
            }
        }
        while let Some(fetched) = waiting.pop_front() {
            let nak = AckKind::Nak(None).into();
            if channel.client.publish(fetched.reply, nak).await.is_err() {
                return;
            }
        }
        // An error is that of a connection that is gone; what is left comes back by itself.
        drop(channel.client.flush().await);
    };
    if timeout(channel.confirm_timeout, closing).await.is_err() {
        tracing::warn!("what was fetched and not taken comes back after the ack wait only");
    }
}

/// Reads who delivered a message, and how often; none if no consumer did.
fn fetched(message: async_nats::Message, channel: &Channel) -> Option<Fetched> {
    if message
        .status
        .is_some_and(|status| status != StatusCode::OK)
    {
        return None;
    }
    let context = channel.context.clone();
    let message = jetstream::Message { message, context };
    let info = message.info().ok()?;
    let deliveries = u32::try_from(info.delivered).unwrap_or(u32::MAX);
    let sequence = info.stream_sequence;
    // A stream that was made anew counts from one again, so the time belongs to the name.
    let id = format!("{}:{sequence}:{}", info.stream, info.published);
    let message = message.message;
    Some(Fetched {
        reply: message.reply.clone()?,
        message,
        id,
        sequence,
        deliveries,
        since: Instant::now(),
    })
}

/// Returns why a subscription ends, if the consumer does not exist.
pub(super) fn deleted(error: &ConsumerInfoError) -> Option<SubscriptionError> {
    use jetstream::ErrorCode;
    let code = match error.kind() {
        ConsumerInfoErrorKind::NotFound => return Some(SubscriptionError::ConsumerDeleted),
        ConsumerInfoErrorKind::StreamNotFound => return Some(SubscriptionError::StreamDeleted),
        ConsumerInfoErrorKind::JetStream(error) => error.error_code(),
        _ => return None,
    };
    match code {
        ErrorCode::CONSUMER_NOT_FOUND => Some(SubscriptionError::ConsumerDeleted),
        ErrorCode::STREAM_NOT_FOUND => Some(SubscriptionError::StreamDeleted),
        _ => None,
    }
}

fn connects(channel: &Channel) -> u64 {
    let statistics = channel.client.statistics();
    statistics.connects.load(Ordering::Relaxed)
}
