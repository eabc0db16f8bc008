//! [`Delivery`] and [`DeliveryTag`]: a job that was delivered, and what answers for it.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use lapin::BasicProperties;
use tokio::time::Instant;

use super::{
    DeliveryError, QueueKind, Settlement,
    acks::{Acks, Place},
    delivery_limit::DeliveryLimit,
    headers::{self, Counted},
    publisher::Publisher,
};
use crate::{
    job::Job,
    settle::{Capabilities, Lease, Messaging, Reason, Settle, Verdict},
};

/// What the deliveries of one channel share.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) publisher: Publisher,
    pub(super) reading: Reading,
    /// Set when the channel is closed or given up.
    pub(super) is_over: AtomicBool,
    /// Set when the server has cancelled the consumer.
    pub(super) is_cancelled: AtomicBool,
    pub(super) acks: Arc<Acks>,
}

/// What is known of the queue and its server.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reading {
    pub(super) delivery_limit: DeliveryLimit,
    /// Whether the queue delays what is rejected.
    pub(super) delayed_retry: bool,
    /// From when on the server gives a delivery to others.
    pub(super) consumer_timeout: Option<Duration>,
    /// Whether it counts no `basic.nack`, and takes back what is overdue by itself, as servers from
    /// 4.3 on.
    pub(super) free_release: bool,
}

#[derive(Debug)]
pub(super) struct Message {
    pub(super) delivery: lapin::message::Delivery,
    pub(super) counted: Counted,
    pub(super) link: Arc<Link>,
    pub(super) place: Place,
    received: Instant,
    is_settled: AtomicBool,
}

impl Message {
    /// Uses the tag up.
    pub(super) fn claim(&self) -> Result<(), DeliveryError> {
        if self.is_settled.swap(true, Ordering::AcqRel) {
            return Err(DeliveryError::AlreadySettled);
        }
        self.check()?;
        match self.is_overdue() {
            true => Err(DeliveryError::Lost),
            false => Ok(()),
        }
    }

    /// Checks that the channel still lives on which it can be answered for.
    pub(super) fn check(&self) -> Result<(), DeliveryError> {
        if self.link.is_over.load(Ordering::Acquire) || self.delivery.acker.poisoned() {
            return Err(DeliveryError::Stale);
        }
        Ok(())
    }

    /// Checks that the server has not taken the job back: what is republished then would be a copy.
    pub(super) fn check_held(&self) -> Result<(), DeliveryError> {
        if self.link.is_cancelled.load(Ordering::Acquire) || self.is_overdue() {
            return Err(DeliveryError::Lost);
        }
        Ok(())
    }

    fn is_overdue(&self) -> bool {
        let limit = self.link.reading.consumer_timeout;
        limit.is_some_and(|limit| self.received.elapsed() >= limit)
    }

    /// Returns whether the server takes back by itself what is lost, or has.
    pub(super) fn is_taken_back(&self) -> bool {
        self.link.is_cancelled.load(Ordering::Acquire) || self.release_is_free()
    }

    /// Returns whether the queue itself does not count a release.
    pub(super) fn release_is_free(&self) -> bool {
        let Link {
            publisher, reading, ..
        } = &*self.link;
        let is_free = reading.free_release || self.counted.has_acquired;
        is_free || publisher.kind() == QueueKind::Classic
    }

    /// Returns whether one more requeue that counts brings the job near the limit of its queue.
    pub(super) fn is_near_limit(&self) -> bool {
        let failed = self.counted.by_queue.unwrap_or(0);
        let limit = self.link.reading.delivery_limit;
        self.link.publisher.kind() == QueueKind::Quorum && limit.is_near(failed)
    }

    /// Returns whether the queue lets go of the job after some more releases, which it counts.
    pub(super) fn is_let_go_of(&self) -> bool {
        !self.release_is_free() && self.is_near_limit()
    }

    pub(super) fn deliveries(&self) -> Option<u32> {
        let counted = self.counted;
        let by_queue = match self.link.publisher.kind() {
            QueueKind::Classic => counted.by_queue.unwrap_or(0),
            QueueKind::Quorum => match counted.by_queue {
                Some(count) => count,
                // From 4.3 on a delivery that did not fail leaves no count.
                None if !self.delivery.redelivered || counted.has_acquired => 0,
                None => return None,
            },
        };
        Some(counted.before.saturating_add(by_queue).saturating_add(1))
    }
}

/// A job that was delivered.
pub struct Delivery {
    message: Arc<Message>,
}

impl Delivery {
    pub(super) fn new(
        delivery: lapin::message::Delivery,
        received: Instant,
        link: &Arc<Link>,
    ) -> Self {
        let message = Arc::new(Message {
            counted: Counted::read(&delivery.properties),
            place: link.acks.enter(delivery.delivery_tag),
            delivery,
            link: Arc::clone(link),
            received,
            is_settled: AtomicBool::new(false),
        });
        Self { message }
    }

    /// Returns the body.
    pub fn payload(&self) -> &[u8] {
        &self.message.delivery.data
    }

    /// Returns the properties, with the headers among them.
    pub fn properties(&self) -> &BasicProperties {
        &self.message.delivery.properties
    }

    /// Returns the exchange that the job was first published to, also after a retry.
    pub fn exchange(&self) -> &str {
        headers::origin(&self.message.delivery).0
    }

    /// Returns the routing key that the job was first published with, also after a retry.
    pub fn routing_key(&self) -> &str {
        headers::origin(&self.message.delivery).1
    }

    /// Returns the exchange of this delivery; that of a job that was republished is the default one,
    /// `""`.
    pub fn raw_exchange(&self) -> &str {
        self.message.delivery.exchange.as_str()
    }

    /// Returns the routing key of this delivery; that of a job that was republished is the queue's
    /// name.
    pub fn raw_routing_key(&self) -> &str {
        self.message.delivery.routing_key.as_str()
    }
}

impl AsRef<[u8]> for Delivery {
    fn as_ref(&self) -> &[u8] {
        self.payload()
    }
}

impl Job for Delivery {
    type Tag = DeliveryTag;

    fn tag(&self) -> DeliveryTag {
        let message = Arc::clone(&self.message);
        DeliveryTag { message }
    }

    /// The [`consumer_timeout`](super::Queue::consumer_timeout), if one is set.
    fn lease(&self) -> Option<Duration> {
        self.message.link.reading.consumer_timeout
    }
}

impl fmt::Debug for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delivery")
            .field("tag", &self.tag())
            .field("len", &self.payload().len())
            .finish_non_exhaustive()
    }
}

/// What answers for a [`Delivery`].
///
/// It shares the body with the delivery, as it may have to republish it. The
/// [table](super#verdicts) says what each verdict sends.
#[derive(Clone)]
pub struct DeliveryTag {
    pub(super) message: Arc<Message>,
}

impl DeliveryTag {
    /// Returns the number of the delivery on its channel: AMQP's delivery tag.
    pub fn number(&self) -> u64 {
        self.message.delivery.delivery_tag
    }
}

/// # Errors
///
/// Each uses the tag up, and calls for the channel to be given up; but for those that are
/// [misconfigured](crate::settle::Unsettled::misconfigured) or [moot](crate::settle::Unsettled::moot), see [Jobs that
/// can't be republished](super#jobs-that-cant-be-republished). A job that is
/// [lost](DeliveryError::Lost) to a server that takes it back by itself is moot, too.
///
/// Where the runtime that lapin connected on has ended, lapin may never tell what became of an ack: a
/// [`SettlePolicy`](crate::SettlePolicy) gives it up in time.
impl Settle for DeliveryTag {
    type Error = DeliveryError;
    type Future = Settlement;

    fn settle(self, verdict: Verdict, reason: Reason) -> Settlement {
        Settlement::new(self, verdict, reason)
    }

    /// Fails: RabbitMQ has no keep-alive.
    async fn keep_alive(&self) -> Result<Lease, DeliveryError> {
        Err(DeliveryError::NoKeepAlive)
    }

    fn deliveries(&self) -> Option<u32> {
        self.message.deliveries()
    }

    fn redelivered(&self) -> Option<bool> {
        Some(self.message.delivery.redelivered || self.message.counted.before > 0)
    }

    fn capabilities(&self) -> Capabilities {
        let link = &self.message.link;
        let mut capabilities = Capabilities::none().delay().free_delayed_release();
        if link.publisher.dead_letter().is_some() {
            capabilities = capabilities.dead_letter();
        }
        if self.message.release_is_free() {
            capabilities = capabilities.free_release();
        }
        capabilities
    }

    /// The destination is `{exchange}:{routing key}:{queue}`, as the
    /// [conventions for RabbitMQ](https://opentelemetry.io/docs/specs/semconv/messaging/rabbitmq/)
    /// have it: without what is empty, and without the routing key where it is the queue's name.
    /// They are those of the first publish, also for a job that was republished.
    fn messaging(&self) -> Option<Messaging<'_>> {
        let Message { delivery, link, .. } = &*self.message;
        Some(headers::messaging(delivery, link.publisher.queue()))
    }
}

impl fmt::Debug for DeliveryTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeliveryTag")
            .field("queue", &self.message.link.publisher.queue())
            .field("number", &self.number())
            .field("deliveries", &self.deliveries())
            .field("redelivered", &self.redelivered().unwrap_or_default())
            .finish()
    }
}
