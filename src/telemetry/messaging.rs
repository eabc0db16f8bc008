//! [`Messaging`]: the description of a delivery for traces and metrics.

use std::borrow::Cow;

use tracing::Span;

/// Description of a delivery for traces and metrics; see
/// [`Settle::messaging`](crate::settle::Settle::messaging) and [`Job::messaging`](crate::Job::messaging).
///
/// ```
/// use tower_sentinel::settle::Messaging;
///
/// let delivery = Messaging::new("redis", "orders").consumer_group("billing").message_id("1526919030474-55");
/// assert_eq!(delivery.destination, "orders");
/// assert_eq!(delivery.consumer_group.as_deref(), Some("billing"));
///
/// let header = Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
/// let delivery = Messaging::new("rabbitmq", "orders")
///     .delivery_tag(7)
///     .traceparent(header)
///     .tracestate(None::<String>);
/// assert_eq!(delivery.traceparent.as_deref(), header);
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Messaging<'a> {
    /// `messaging.system`: the kind of broker, such as `rabbitmq`.
    pub system: &'a str,
    /// `messaging.destination.name`: the queue or stream. It is part of the names of the spans, so it
    /// should have few values.
    pub destination: Cow<'a, str>,
    /// `messaging.destination.name` of the metrics, where `destination` says more than the name of the queue;
    /// otherwise `destination` itself.
    ///
    /// Metrics have the labels of the first delivery. So it must be the same for all deliveries of a
    /// subscription. On RabbitMQ it is the queue, since the routing key is part of the destination.
    pub queue: Option<Cow<'a, str>>,
    /// `messaging.consumer.group.name`: the group of consumers that share the messages.
    pub consumer_group: Option<Cow<'a, str>>,
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

    /// Adds the name of the queue, for a `destination` that says more.
    ///
    /// ```
    /// use tower_sentinel::settle::Messaging;
    ///
    /// let delivery = Messaging::new("rabbitmq", "events:order.paid:billing").queue("billing");
    /// assert_eq!(delivery.queue.as_deref(), Some("billing"));
    /// ```
    pub fn queue(mut self, name: impl Into<Cow<'a, str>>) -> Self {
        self.queue = Some(name.into());
        self
    }

    /// Adds the name of the group of consumers.
    pub fn consumer_group(mut self, name: impl Into<Cow<'a, str>>) -> Self {
        self.consumer_group = Some(name.into());
        self
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

    pub(crate) fn record(&self, span: &Span, operation: &str) {
        let name = format!("{operation} {}", self.destination);
        span.record("otel.name", &*name);
        span.record("messaging.system", self.system);
        span.record("messaging.destination.name", &*self.destination);
        if let Some(group) = &self.consumer_group {
            span.record("messaging.consumer.group.name", &**group);
        }
        if let Some(id) = &self.message_id {
            span.record("messaging.message.id", &**id);
        }
        if let Some(tag) = self.delivery_tag {
            span.record("messaging.rabbitmq.message.delivery_tag", tag);
        }
    }
}
