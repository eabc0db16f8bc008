//! [`Messaging`]: the description of a delivery for traces.

use std::borrow::Cow;

use tracing::Span;

/// Description of a delivery for traces; see [`Settle::messaging`](crate::settle::Settle::messaging).
///
/// ```
/// use tower_sentinel::settle::Messaging;
///
/// let delivery = Messaging::new("rabbitmq", "orders").message_id("m-7").delivery_tag(42);
/// assert_eq!(delivery.destination, "orders");
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Messaging<'a> {
    /// `messaging.system`: the kind of broker, such as `rabbitmq`.
    pub system: &'a str,
    /// `messaging.destination.name`: the queue or stream. It is part of the names of the spans, so it
    /// should have few values.
    pub destination: Cow<'a, str>,
    /// `messaging.message.id`: the id of the message.
    pub message_id: Option<Cow<'a, str>>,
    /// `messaging.rabbitmq.message.delivery_tag`: the delivery tag of AMQP 0-9-1.
    pub delivery_tag: Option<u64>,
    /// The W3C trace context of the message: its `traceparent` header.
    pub traceparent: Option<Cow<'a, str>>,
    /// The `tracestate` header of the message, which belongs to `traceparent`.
    pub tracestate: Option<Cow<'a, str>>,
}

impl<'a> Messaging<'a> {
    /// Creates the description of a delivery from `destination`, on a broker called `system`.
    pub fn new(system: &'a str, destination: impl Into<Cow<'a, str>>) -> Self {
        Self {
            system,
            destination: destination.into(),
            ..Self::default()
        }
    }

    /// Adds the id of the message.
    pub fn message_id(mut self, id: impl Into<Cow<'a, str>>) -> Self {
        self.message_id = Some(id.into());
        self
    }

    /// Adds the delivery tag of AMQP 0-9-1.
    pub fn delivery_tag(mut self, tag: u64) -> Self {
        self.delivery_tag = Some(tag);
        self
    }

    /// Adds the `traceparent` header of the message, if there is one.
    pub fn traceparent(mut self, header: Option<impl Into<Cow<'a, str>>>) -> Self {
        self.traceparent = header.map(Into::into);
        self
    }

    /// Adds the `tracestate` header of the message, if there is one.
    pub fn tracestate(mut self, header: Option<impl Into<Cow<'a, str>>>) -> Self {
        self.tracestate = header.map(Into::into);
        self
    }

    pub(super) fn record(&self, span: &Span, operation: &str) {
        let name = format!("{operation} {}", self.destination);
        span.record("otel.name", &*name);
        span.record("messaging.system", self.system);
        span.record("messaging.destination.name", &*self.destination);
        if let Some(id) = &self.message_id {
            span.record("messaging.message.id", &**id);
        }
        if let Some(tag) = self.delivery_tag {
            span.record("messaging.rabbitmq.message.delivery_tag", tag);
        }
    }
}
