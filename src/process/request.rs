//! [`Request`], a job in its child.

use std::fmt;

use tokio_util::bytes::Bytes;

use super::head::Head;

/// Job in a child of a [`ProcessPool`](crate::process::ProcessPool): its bytes, and what crosses beside them.
///
/// A [`DecodeLayer`](crate::DecodeLayer) makes a value of the bytes, and its
/// [`with_job`](crate::DecodeLayer::with_job) keeps this beside it. All else is there if the pool has
/// [`headers`](crate::process::ProcessPool::headers), by the names of an [`Envelope`](crate::broker::Envelope).
#[derive(Clone)]
pub struct Request {
    head: Head,
    bytes: Bytes,
}

impl Request {
    pub(super) fn new(head: Head, bytes: Bytes) -> Self {
        Self { head, bytes }
    }

    /// Returns the first header called `name`, if the pool names it and its value is text. Case does not matter.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.header(name)
    }

    /// Returns the names and values of all headers that crossed.
    pub fn headers(&self) -> impl Iterator<Item = (&str, &str)> {
        let headers = self.head.headers.iter();
        headers.map(|(name, value)| (&**name, &**value))
    }

    /// Returns the id of the message, if it has one.
    pub fn message_id(&self) -> Option<&str> {
        self.head.message_id.as_deref()
    }

    /// Returns the name that the message was published to: a routing key, a subject, a stream or a queue.
    pub fn routing_key(&self) -> Option<&str> {
        self.head.routing_key.as_deref()
    }

    /// Returns the number of deliveries of the job, including this one, if the broker reports it.
    pub fn deliveries(&self) -> Option<u32> {
        self.head.deliveries
    }

    /// Returns whether the job was delivered before, if the broker reports it.
    pub fn redelivered(&self) -> Option<bool> {
        self.head.redelivered
    }
}

impl AsRef<[u8]> for Request {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

// Without the payload, and the values of headers, which may be secret.
impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request")
            .field("message_id", &self.head.message_id)
            .field("routing_key", &self.head.routing_key)
            .field("deliveries", &self.head.deliveries)
            .field("redelivered", &self.head.redelivered)
            .field("length", &self.bytes.len())
            .finish_non_exhaustive()
    }
}
