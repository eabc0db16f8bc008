//! [`Delivery`], a message as a job.

use std::{
    borrow::Cow,
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use async_nats::{HeaderMap, Message, Subject};

use super::{DeliveryTag, channel::Channel, fetched::Fetched, place::Place};
use crate::{broker::envelope::Envelope, job::Job, settle::Messaging};

/// A message that was delivered by a pull consumer.
///
pub struct Delivery {
    place: Arc<Place>,
}

impl Delivery {
    pub(super) fn new(channel: Arc<Channel>, fetched: Fetched) -> Self {
        Self {
            place: Arc::new(Place::new(channel, fetched)),
        }
    }

    /// Returns the payload.
    pub fn payload(&self) -> &[u8] {
        &self.message().payload
    }

    /// Returns the message.
    pub fn message(&self) -> &Message {
        &self.place.fetched.message
    }

    /// Returns the subject of the message's publish.
    pub fn subject(&self) -> &Subject {
        &self.message().subject
    }

    /// Returns the headers of the message, if it has any.
    pub fn headers(&self) -> Option<&HeaderMap> {
        self.message().headers.as_ref()
    }

    /// Returns the sequence number of the message in its stream.
    ///
    /// A delayed retry by a [schedule](super::Pull::schedules) changes it.
    pub fn stream_sequence(&self) -> u64 {
        self.place.fetched.sequence
    }

    /// Returns the message's `Nats-Msg-Id` from its publish, if it has one.
    ///
    /// It stays the same when a [schedule](super::Pull::schedules) delays a retry; the header does not.
    pub fn message_id(&self) -> Option<&str> {
        self.place.fetched.message_id()
    }
}

/// The payload.
impl AsRef<[u8]> for Delivery {
    fn as_ref(&self) -> &[u8] {
        self.payload()
    }
}

impl Envelope for Delivery {
    fn header(&self, name: &str) -> Option<&str> {
        self.place.fetched.header(name)
    }

    fn message_id(&self) -> Option<Cow<'_, str>> {
        self.place.fetched.message_id().map(Cow::from)
    }

    fn routing_key(&self) -> &str {
        self.place.fetched.origin()
    }
}

impl Job for Delivery {
    type Tag = DeliveryTag;

    fn tag(&self) -> DeliveryTag {
        DeliveryTag::new(Arc::clone(&self.place))
    }

    /// Returns the `ack_wait` of the consumer, or the value of its `backoff` for this delivery.
    fn lease(&self) -> Option<Duration> {
        Some(self.place.wait)
    }

    fn messaging(&self) -> Option<Messaging<'_>> {
        Some(self.place.description())
    }

    fn queued_since(&self) -> Option<SystemTime> {
        let fetched = &self.place.fetched;
        (!fetched.is_redelivered()).then_some(fetched.published)
    }
}

impl fmt::Debug for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delivery")
            .field("subject", &self.subject().as_str())
            .field("stream_sequence", &self.stream_sequence())
            .field("deliveries", &self.place.fetched.deliveries())
            .finish_non_exhaustive()
    }
}
