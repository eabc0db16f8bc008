//! [`Channel`]: the state that a subscription shares with its tags.

use std::{
    fmt,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::Duration,
};

use async_nats::{
    Client, Request, Subject,
    connection::State,
    jetstream::{AckKind, Context, consumer::Info, context::PublishError, message::PublishMessage},
};
use futures_util::task::AtomicWaker;
use tokio::time::{Instant, sleep};

use super::{
    delays::Delays,
    delivery_error::DeliveryError,
    fetched::Fetched,
    miss::{Miss, Missed},
    pull::Pull,
    repeat::repeat,
};
use crate::outcome::guard;

/// Pause between two checks for the connection, in a settlement that must not be sent late.
const RECONNECT_PAUSE: Duration = Duration::from_millis(20);

pub(super) struct Channel {
    pub(super) context: Context,
    pub(super) client: Client,
    /// The name of the stream.
    pub(super) stream: String,
    /// The name of the consumer.
    pub(super) consumer: String,
    /// The name of the consumer, if it is durable.
    pub(super) durable: Option<String>,
    /// Prefix of the schedules' subjects, if schedules delay retries.
    pub(super) schedules: Option<Subject>,
    pub(super) dead_letter: Option<Subject>,
    /// Subject of the suspects, if they are not run.
    pub(super) suspects: Option<Subject>,
    pub(super) confirm_timeout: Duration,
    delays: Delays,
    /// Greatest number of deliveries of a message by the server; below one there is no limit.
    max_deliver: i64,
    ack_wait: Duration,
    /// Replacement for the ack wait, by the number of the delivery.
    backoff: Vec<Duration>,
    /// Unsettled deliveries that were taken from the stream.
    held: AtomicUsize,
    /// `true` once the owner has closed the subscription.
    given_up: AtomicBool,
    /// Waker of the task that polls the subscription: it may pull when a place is free.
    pub(super) waker: AtomicWaker,
}

impl Channel {
    pub(super) fn new(context: Context, info: &Info, pull: &Pull) -> Self {
        Self {
            client: context.client(),
            context,
            dead_letter: pull.dead_letter.clone(),
            suspects: pull.suspects.clone(),
            schedules: pull.schedules.clone(),
            confirm_timeout: pull.confirm_timeout,
            stream: info.stream_name.clone(),
            consumer: info.name.clone(),
            durable: info.config.durable_name.clone(),
            delays: Delays::new(info.config.max_ack_pending),
            max_deliver: info.config.max_deliver,
            ack_wait: info.config.ack_wait,
            backoff: info.config.backoff.clone(),
            held: AtomicUsize::new(0),
            given_up: AtomicBool::new(false),
            waker: AtomicWaker::new(),
        }
    }

    /// Returns the time that JetStream waits for the settlement of the `deliveries`-th delivery.
    pub(super) fn lease(&self, deliveries: u32) -> Duration {
        let nth = usize::try_from(deliveries.saturating_sub(1)).unwrap_or(usize::MAX);
        let nth = nth.min(self.backoff.len().saturating_sub(1));
        self.backoff.get(nth).copied().unwrap_or(self.ack_wait)
    }

    /// Notes a delayed NAK, and warns before such NAKs stall the consumer.
    pub(super) fn note_delay(&self, after: Duration) {
        let held = self.held();
        if let Some(near) = self.delays.add(after, held) {
            guard(|| {
                tracing::warn!(
                    stream = self.stream,
                    consumer = self.consumer,
                    delayed = near.delayed,
                    held,
                    max_ack_pending = near.limit,
                    "consumer about to stall: delayed retries count toward `max_ack_pending` until they are due"
                );
            });
        }
    }

    /// Warns if a job is about to be given back after its last delivery.
    pub(super) fn warn_of_last_delivery(&self, fetched: &Fetched) {
        if self.max_deliver > 0 && i64::from(fetched.delivered) >= self.max_deliver {
            guard(|| {
                tracing::warn!(
                    stream = self.stream,
                    consumer = self.consumer,
                    stream_sequence = fetched.sequence,
                    max_deliver = self.max_deliver,
                    "job stranded: it is given back, and the server delivers it no more"
                );
            });
        }
    }

    pub(super) fn held(&self) -> usize {
        self.held.load(Ordering::Acquire)
    }

    pub(super) fn hold(&self) {
        self.held.fetch_add(1, Ordering::AcqRel);
    }

    pub(super) fn free(&self) {
        self.held.fetch_sub(1, Ordering::AcqRel);
        // Foreign code, which must not undo a settlement.
        guard(|| self.waker.wake());
    }

    pub(super) fn give_up(&self) {
        self.given_up.store(true, Ordering::Release);
    }

    pub(super) fn is_given_up(&self) -> bool {
        self.given_up.load(Ordering::Acquire)
    }

    pub(super) fn is_connected(&self) -> bool {
        self.client.connection_state() == State::Connected
    }

    /// Returns the number of times that the client has connected.
    pub(super) fn connects(&self) -> u64 {
        let statistics = self.client.statistics();
        statistics.connects.load(Ordering::Relaxed)
    }

    /// Sends an ack of any kind and waits until the server confirms it.
    ///
    /// A NAK is repeated only if it certainly did not arrive: a second one would take the job from the worker
    /// that has it next.
    pub(super) async fn confirm(
        &self,
        reply: Subject,
        kind: AckKind,
        limit: Duration,
    ) -> Result<(), DeliveryError> {
        let is_idempotent = !matches!(kind, AckKind::Nak(_));
        let asking = repeat(
            || self.is_connected(),
            limit,
            is_idempotent,
            || {
                let request = Request::new().payload(kind.into()).timeout(None);
                self.client.send_request(reply.clone(), request)
            },
        );
        match asking.await {
            Ok(_) => Ok(()),
            Err(None) => Err(DeliveryError::Unconfirmed { limit }),
            Err(Some(error)) if error.miss() == Miss::Absent => Err(DeliveryError::NoConsumer),
            Err(Some(error)) => Err(DeliveryError::Request(error.into())),
        }
    }

    /// Publishes a message and waits until its stream stores it.
    ///
    /// It may be sent more than once, so its headers have a `Nats-Msg-Id`: the stream drops the second.
    ///
    /// # Errors
    ///
    /// `None` if it is not known whether the stream stores it.
    pub(super) async fn store(
        &self,
        subject: &Subject,
        message: PublishMessage,
    ) -> Result<(), Option<PublishError>> {
        let storing = repeat(
            || self.is_connected(),
            self.confirm_timeout,
            true,
            || {
                let sending = self.context.send_publish(subject.clone(), message.clone());
                async { sending.await?.await }
            },
        );
        storing.await.map(drop)
    }

    /// Waits for the connection and returns the rest of the time limit.
    pub(super) async fn connected(&self) -> Result<Duration, DeliveryError> {
        let limit = self.confirm_timeout;
        let start = Instant::now();
        loop {
            let left = limit.saturating_sub(start.elapsed());
            if left.is_zero() {
                return Err(DeliveryError::Disconnected { limit });
            }
            if self.is_connected() {
                return Ok(left);
            }
            sleep(RECONNECT_PAUSE.min(left)).await;
        }
    }
}

impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Channel")
            .field("held", &self.held())
            .field("given_up", &self.is_given_up())
            .finish_non_exhaustive()
    }
}
