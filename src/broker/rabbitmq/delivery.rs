//! [`Delivery`] and [`DeliveryTag`]: a job that was delivered, and what answers for it.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use lapin::BasicProperties;

use super::{
    DeliveryError, QueueKind, Settlement,
    acks::{Acks, Place},
    headers::{self, Counted},
    publisher::Publisher,
};
use crate::{Capabilities, Job, Lease, Messaging, Reason, Settle, Verdict};

/// What the deliveries of one channel share.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) publisher: Publisher,
    pub(super) free_release: bool,
    /// Set when the channel is closed or given up.
    pub(super) is_over: AtomicBool,
    pub(super) acks: Arc<Acks>,
}

#[derive(Debug)]
pub(super) struct Message {
    pub(super) delivery: lapin::message::Delivery,
    pub(super) counted: Counted,
    pub(super) link: Arc<Link>,
    pub(super) place: Place,
    is_settled: AtomicBool,
}

impl Message {
    /// Uses the tag up.
    pub(super) fn claim(&self) -> Result<(), DeliveryError> {
        if self.is_settled.swap(true, Ordering::AcqRel) {
            return Err(DeliveryError::AlreadySettled);
        }
        self.check()
    }

    /// Checks that the channel still lives on which it can be answered for.
    pub(super) fn check(&self) -> Result<(), DeliveryError> {
        if self.link.is_over.load(Ordering::Acquire) || self.delivery.acker.poisoned() {
            return Err(DeliveryError::Stale);
        }
        Ok(())
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
    pub(super) fn new(delivery: lapin::message::Delivery, link: &Arc<Link>) -> Self {
        let message = Arc::new(Message {
            counted: Counted::read(&delivery.properties),
            place: link.acks.enter(delivery.delivery_tag),
            delivery,
            link: Arc::clone(link),
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

    /// Returns the exchange it was published to; that of a job that was republished is the default
    /// one, `""`.
    pub fn exchange(&self) -> &str {
        self.message.delivery.exchange.as_str()
    }

    /// Returns the routing key; that of a job that was republished is the queue's name.
    pub fn routing_key(&self) -> &str {
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
/// Each uses the tag up, and calls for the channel to be given up.
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
        let mut capabilities = Capabilities::none().delay();
        if link.publisher.dead_letter().is_some() {
            capabilities = capabilities.dead_letter();
        }
        let is_free = link.free_release || self.message.counted.has_acquired;
        if is_free || link.publisher.kind() == QueueKind::Classic {
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
