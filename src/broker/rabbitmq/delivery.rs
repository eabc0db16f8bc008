//! [`Delivery`], a delivered job, and [`DeliveryTag`], the handle that settles it.

use std::{
    borrow::Cow,
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use lapin::BasicProperties;
use tokio::time::Instant;

use super::{
    headers,
    message::{Link, Message},
};
use crate::{broker::envelope::Envelope, job::Job, settle::Messaging};

/// A delivered job.
pub struct Delivery {
    message: Arc<Message>,
}

impl Delivery {
    pub(super) fn new(
        delivery: lapin::message::Delivery,
        received: Instant,
        link: &Arc<Link>,
    ) -> Self {
        let message = Arc::new(Message::new(delivery, received, link));
        Self { message }
    }

    /// Returns the body.
    pub fn payload(&self) -> &[u8] {
        &self.message.delivery.data
    }

    /// Returns the properties, including the headers.
    pub fn properties(&self) -> &BasicProperties {
        &self.message.delivery.properties
    }

    /// Returns the exchange of the job's first publish, also after a retry.
    pub fn exchange(&self) -> &str {
        headers::origin(&self.message.delivery).0
    }

    /// Returns the routing key of the job's first publish, also after a retry.
    pub fn routing_key(&self) -> &str {
        headers::origin(&self.message.delivery).1
    }

    /// Returns the exchange of this delivery. For a republished job it is the default one, `""`.
    pub fn raw_exchange(&self) -> &str {
        self.message.delivery.exchange.as_str()
    }

    /// Returns the routing key of this delivery. For a republished job it is the queue's name.
    pub fn raw_routing_key(&self) -> &str {
        self.message.delivery.routing_key.as_str()
    }
}

impl AsRef<[u8]> for Delivery {
    fn as_ref(&self) -> &[u8] {
        self.payload()
    }
}

impl Envelope for Delivery {
    fn header(&self, name: &str) -> Option<&str> {
        headers::header(&self.message.delivery, name)
    }

    fn message_id(&self) -> Option<Cow<'_, str>> {
        let id = self.properties().message_id().as_ref();
        id.map(|id| id.as_str().into())
    }

    fn routing_key(&self) -> &str {
        self.routing_key()
    }

    fn deliveries(&self) -> Option<u32> {
        self.message.deliveries()
    }

    fn redelivered(&self) -> Option<bool> {
        Some(self.message.is_redelivered())
    }
}

impl Job for Delivery {
    type Tag = DeliveryTag;

    fn tag(&self) -> DeliveryTag {
        let message = Arc::clone(&self.message);
        DeliveryTag { message }
    }

    /// Returns the [`consumer_timeout`](super::Queue::consumer_timeout), if one is set.
    fn lease(&self) -> Option<Duration> {
        self.message.link.reading.consumer_timeout
    }

    fn messaging(&self) -> Option<Messaging<'_>> {
        Some(self.message.description())
    }

    fn queued_since(&self) -> Option<SystemTime> {
        match self.message.is_redelivered() {
            true => None,
            false => headers::published_at(&self.message.delivery.properties),
        }
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

/// Handle that settles a [`Delivery`].
///
/// It shares the body with the delivery, as it may have to republish it. The [table](super#verdicts) shows
/// the frames of each verdict.
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

impl fmt::Debug for DeliveryTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeliveryTag")
            .field("queue", &self.message.link.publisher.queue())
            .field("number", &self.number())
            .field("deliveries", &self.message.deliveries())
            .field("redelivered", &self.message.is_redelivered())
            .finish()
    }
}
