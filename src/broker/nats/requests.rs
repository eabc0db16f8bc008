//! [`Requests`] to a pull consumer, and their results.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use async_nats::{
    Message, StatusCode, Subscriber,
    client::SubscribeError,
    jetstream::consumer::{
        PullConsumer,
        pull::{BatchConfig, BatchRequestError},
    },
};
use futures_util::StreamExt;
use tokio::time::Instant;

use super::{
    SubscriptionError, breaks::Breaks, channel::Channel, fetched::Fetched, priority::Priority,
};
use crate::outcome::guard;

/// Requests of one subscription, and the inbox that receives their deliveries.
pub(super) struct Requests {
    channel: Arc<Channel>,
    consumer: Arc<PullConsumer>,
    idle_heartbeat: Duration,
    priority: Priority,
    /// The server removes a consumer without requests for this time; zero if it does not.
    inactive_threshold: Duration,
    breaks: Breaks,
    subscriber: Option<Subscriber>,
    inbox: String,
    /// Deliveries that were requested and are not here yet.
    requested: usize,
    step: Option<Pin<Box<dyn Future<Output = Step> + Send>>>,
    /// Time since which a request has been open without a break.
    asked: Instant,
    /// Time of the last request.
    sent: Instant,
    /// The client's number of connections when the inbox was made.
    connects: u64,
    /// `true` if JetStream is not there; until the next tick nothing is requested.
    is_refused: bool,
}

enum Step {
    Requested(Result<(), BatchRequestError>),
    Subscribed(Result<Subscriber, SubscribeError>),
}

/// Message that came to the inbox.
pub(super) struct Received {
    pub(super) delivery: Option<Fetched>,
    /// `true` if JetStream sent it; if not, nobody takes requests, as JetStream is starting or gone.
    pub(super) is_sign_of_life: bool,
}

impl Requests {
    /// Subscribes to an inbox, and requests nothing yet.
    pub(super) async fn subscribe(
        channel: Arc<Channel>,
        consumer: Arc<PullConsumer>,
        idle_heartbeat: Duration,
        priority: Priority,
    ) -> Result<Self, SubscriptionError> {
        let config = &consumer.cached_info().config;
        let inactive_threshold = config.inactive_threshold;
        let connects = channel.connects();
        let inbox = channel.client.new_inbox();
        let subscriber = channel.client.subscribe(inbox.clone()).await;
        let subscriber = subscriber.map_err(|error| SubscriptionError::Subscribe(error.into()))?;
        Ok(Self {
            channel,
            consumer,
            idle_heartbeat,
            priority,
            inactive_threshold,
            breaks: Breaks::default(),
            subscriber: Some(subscriber),
            inbox,
            requested: 0,
            step: None,
            asked: Instant::now(),
            sent: Instant::now(),
            connects,
            is_refused: false,
        })
    }

    /// Returns the number of deliveries that were requested and are not here yet.
    pub(super) fn requested(&self) -> usize {
        self.requested
    }

    /// Takes the messages that the client has received.
    pub(super) fn poll_received(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Received, SubscriptionError>> {
        let Some(subscriber) = &mut self.subscriber else {
            return Poll::Pending;
        };
        let message = ready!(subscriber.poll_next_unpin(cx));
        let message = message.ok_or(SubscriptionError::ClientClosed);
        Poll::Ready(message.and_then(|message| self.take(message)))
    }

    fn take(&mut self, message: Message) -> Result<Received, SubscriptionError> {
        self.breaks.hear();
        let mut received = Received {
            delivery: None,
            is_sign_of_life: true,
        };
        // Only deliveries have a reply subject: anybody who publishes may write a status into the headers of
        // a message.
        if message.reply.is_some() {
            received.delivery = Fetched::read(message, &self.channel.context);
            match received.delivery {
                Some(_) => self.requested = self.requested.saturating_sub(1),
                None => {
                    guard(|| tracing::warn!("message ignored: no consumer delivered it"));
                }
            }
            return Ok(received);
        }
        match message.status.unwrap_or(StatusCode::OK) {
            StatusCode::OK => {
                guard(|| tracing::warn!("message ignored: no consumer delivered it"));
            }
            StatusCode::IDLE_HEARTBEAT => {}
            StatusCode::NO_RESPONDERS => {
                self.requested = 0;
                self.is_refused = true;
                received.is_sign_of_life = false;
            }
            _ => self.take_status(&message)?,
        }
        Ok(received)
    }

    /// Handles the end of a request: it has expired, or the server does not carry it out.
    fn take_status(&mut self, message: &Message) -> Result<(), SubscriptionError> {
        let description = message.description.as_deref().unwrap_or_default();
        if description == "Consumer Deleted" {
            return Err(SubscriptionError::ConsumerDeleted);
        }
        // The same request would be refused again.
        if description.starts_with("Exceeded MaxRequest")
            || description == "Consumer is push based"
            || description.starts_with("Bad Request")
        {
            let description = description.to_owned();
            return Err(SubscriptionError::Refused { description });
        }
        let headers = message.headers.as_ref();
        let pending = headers.and_then(|headers| headers.get("Nats-Pending-Messages"));
        match pending.and_then(|pending| pending.as_str().parse::<usize>().ok()) {
            Some(pending) => self.requested = self.requested.saturating_sub(pending),
            // The status does not name its request, so the open part of it is unknown: begin anew.
            None => {
                guard(|| tracing::warn!(description, "request not carried out by the server"));
                self.requested = 0;
                self.is_refused = true;
            }
        }
        Ok(())
    }

    /// Waits until the client has taken a request, or has subscribed anew.
    pub(super) fn poll_step(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), SubscriptionError>> {
        let Some(step) = &mut self.step else {
            return Poll::Pending;
        };
        let step = ready!(step.as_mut().poll(cx));
        self.step = None;
        match step {
            Step::Requested(Ok(())) => {}
            // The client takes nothing any more; its subscriber will report it.
            Step::Requested(Err(error)) => {
                guard(|| tracing::warn!(%error, "request refused by the client"));
                return Poll::Ready(Err(SubscriptionError::ClientClosed));
            }
            Step::Subscribed(Ok(subscriber)) => self.subscriber = Some(subscriber),
            Step::Subscribed(Err(error)) => {
                return Poll::Ready(Err(SubscriptionError::Subscribe(error.into())));
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Begins anew if requests are lost: the client has connected anew, or `patience` has passed since the
    /// request and since the server was `heard`.
    ///
    /// # Errors
    ///
    /// If connections break right after a request, one after the other.
    pub(super) fn renew_if_lost(
        &mut self,
        heard: Instant,
        patience: Duration,
    ) -> Result<(), SubscriptionError> {
        let is_lost = self.requested > 0 && heard.max(self.asked).elapsed() > patience;
        let is_broken = self.channel.connects() != self.connects;
        if is_broken && self.requested > 0 {
            self.breaks.note(self.channel.lease(1))?;
        }
        if is_broken || is_lost {
            self.begin_anew();
        }
        Ok(())
    }

    /// Returns the number of connections that broke during a request, if this should be examined; once for
    /// each break.
    pub(super) fn take_suspicion(&mut self) -> Option<u32> {
        self.breaks.take_suspicion()
    }

    /// Sends a request that brings nothing, if the server is about to remove the consumer.
    ///
    /// While each place is taken nothing is requested, and the server counts only requests. This one is for
    /// messages of one byte, and each message is larger; and nobody listens at its reply subject.
    pub(super) fn keep_consumer(&mut self) {
        let is_due = !self.inactive_threshold.is_zero()
            && self.sent.elapsed() >= self.inactive_threshold / 3;
        if !is_due || self.step.is_some() || !self.channel.is_connected() {
            return;
        }
        let batch = BatchConfig {
            batch: 1,
            max_bytes: 1,
            no_wait: true,
            ..self.priority.request()
        };
        let inbox = self.channel.client.new_inbox();
        self.send(batch, inbox);
    }

    /// Returns whether JetStream was not there since the last call, and allows new requests.
    pub(super) fn take_refusal(&mut self) -> bool {
        std::mem::take(&mut self.is_refused)
    }

    /// Discards the open requests and takes another inbox, where no old request can deliver.
    fn begin_anew(&mut self) {
        self.connects = self.channel.connects();
        self.requested = 0;
        self.subscriber = None;
        let client = self.channel.client.clone();
        let inbox = client.new_inbox();
        self.inbox.clone_from(&inbox);
        self.step = Some(Box::pin(async move {
            Step::Subscribed(client.subscribe(inbox).await)
        }));
    }

    /// Requests deliveries for the free places, and returns whether it did; `taken` of the `prefetch` are
    /// here already.
    pub(super) fn request(&mut self, prefetch: usize, taken: usize) -> bool {
        if self.step.is_some() || self.subscriber.is_none() || self.is_refused {
            return false;
        }
        let free = prefetch.saturating_sub(taken + self.requested);
        if free == 0 || (self.requested > 0 && free * 4 < prefetch) {
            return false;
        }
        if !self.channel.is_connected() {
            return false;
        }
        if self.requested == 0 {
            self.asked = Instant::now();
        }
        self.requested += free;
        let batch = BatchConfig {
            batch: free,
            expires: Some(self.idle_heartbeat.saturating_mul(6)),
            idle_heartbeat: self.idle_heartbeat,
            ..self.priority.request()
        };
        self.send(batch, self.inbox.clone());
        true
    }

    fn send(&mut self, batch: BatchConfig, inbox: String) {
        self.sent = Instant::now();
        let consumer = Arc::clone(&self.consumer);
        self.step = Some(Box::pin(async move {
            Step::Requested(consumer.request_batch(batch, inbox.into()).await)
        }));
    }

    /// Stops requests, and returns the subscriber that may still receive requested deliveries.
    pub(super) fn close(&mut self) -> Option<Subscriber> {
        self.step = None;
        self.subscriber.take()
    }
}
