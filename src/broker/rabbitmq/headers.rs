//! Headers of delivered and republished jobs.

use std::{
    borrow::Cow,
    time::{Duration, SystemTime},
};

use lapin::{BasicProperties, message::Delivery, types::AMQPValue};

use crate::{
    broker::dead_letter::{
        DELIVERIES, DESTINATION, OUTCOME_KIND, OUTCOME_MESSAGE, OUTCOME_TIME, SUSPECT_OF,
    },
    settle::Messaging,
};

/// The queue's own count of failed deliveries.
pub(super) const DELIVERY_COUNT: &str = "x-delivery-count";
/// The queue's own count of all deliveries, from RabbitMQ 4.3 on.
pub(super) const ACQUIRED_COUNT: &str = "x-acquired-count";
/// The server's time of the publish, in milliseconds, if an interceptor sets it.
const TIMESTAMP: &str = "timestamp_in_ms";
pub(super) const ORIGINAL_EXCHANGE: &str = "x-original-exchange";
pub(super) const ORIGINAL_ROUTING_KEY: &str = "x-original-routing-key";

/// Headers that must not be republished. With `CC` and `BCC` the server would send further copies. Counts
/// would be those of another message. With the history of deaths the server takes a second retry for a cycle
/// and drops it.
pub(super) const DROPPED: [&str; 17] = [
    DELIVERIES,
    DESTINATION,
    DELIVERY_COUNT,
    ACQUIRED_COUNT,
    OUTCOME_KIND,
    OUTCOME_MESSAGE,
    OUTCOME_TIME,
    SUSPECT_OF,
    "CC",
    "BCC",
    "x-death",
    "x-first-death-exchange",
    "x-first-death-queue",
    "x-first-death-reason",
    "x-last-death-exchange",
    "x-last-death-queue",
    "x-last-death-reason",
];

/// Counts of deliveries, as read from the headers.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counted {
    /// Failed deliveries before the job was republished, if it was: none after a release.
    pub(super) before: Option<u32>,
    /// Failed deliveries since then, as the queue counts them.
    pub(super) by_queue: Option<u32>,
    /// `true` if the queue counts all deliveries apart from the failed ones.
    pub(super) has_acquired: bool,
}

impl Counted {
    pub(super) fn read(properties: &BasicProperties) -> Self {
        let Some(headers) = properties.headers() else {
            return Self::default();
        };
        let headers = headers.inner();
        // A dead letter that somebody moved back starts anew.
        let before = match headers.contains_key(OUTCOME_KIND) {
            true => None,
            false => headers.get(DELIVERIES).and_then(count),
        };
        Self {
            before,
            by_queue: headers.get(DELIVERY_COUNT).and_then(count),
            has_acquired: headers.contains_key(ACQUIRED_COUNT),
        }
    }
}

pub(super) fn count(value: &AMQPValue) -> Option<u32> {
    let count = match *value {
        AMQPValue::ShortShortInt(count) => i64::from(count),
        AMQPValue::ShortShortUInt(count) => i64::from(count),
        AMQPValue::ShortInt(count) => i64::from(count),
        AMQPValue::ShortUInt(count) => i64::from(count),
        AMQPValue::LongInt(count) => i64::from(count),
        AMQPValue::LongUInt(count) => i64::from(count),
        AMQPValue::LongLongInt(count) => count,
        _ => return None,
    };
    u32::try_from(count).ok()
}

/// Returns the exchange and the routing key of the job's first publish.
pub(super) fn origin(message: &Delivery) -> (&str, &str) {
    let original = |name| header(message, name);
    match (original(ORIGINAL_EXCHANGE), original(ORIGINAL_ROUTING_KEY)) {
        (Some(exchange), Some(routing_key)) => (exchange, routing_key),
        _ => (message.exchange.as_str(), message.routing_key.as_str()),
    }
}

/// Returns the text of the header `name`, or else of the first one called so in another case.
pub(super) fn header<'a>(message: &'a Delivery, name: &str) -> Option<&'a str> {
    header_value(message, name).and_then(as_text)
}

/// Returns the value of the header `name`, or else of the first one called so in another case.
///
/// A job may have a header of its own that differs from one of ours by its case.
pub(super) fn header_value<'a>(message: &'a Delivery, name: &str) -> Option<&'a AMQPValue> {
    let headers = message.properties.headers().as_ref()?.inner();
    headers.get(name).or_else(|| {
        let mut headers = headers.iter();
        let value = headers.find(|(key, _)| key.as_str().eq_ignore_ascii_case(name));
        value.map(|(_, value)| value)
    })
}

/// Returns the attributes for traces of `message`, which came from `queue`.
pub(super) fn messaging<'a>(message: &'a Delivery, queue: &'a str) -> Messaging<'a> {
    let header = |name: &str| header(message, name);
    // A republished job came by the default exchange. It is the same job, so its spans keep the same name.
    let (exchange, routing_key) = origin(message);
    let messaging = Messaging::new("rabbitmq", destination(exchange, routing_key, queue))
        .queue(queue)
        .delivery_tag(message.delivery_tag)
        .traceparent(header("traceparent"))
        .tracestate(header("tracestate"));
    match message.properties.message_id() {
        Some(id) => messaging.message_id(id.as_str()),
        None => messaging,
    }
}

/// Returns the time of the publish, if a message says it.
pub(super) fn published_at(properties: &BasicProperties) -> Option<SystemTime> {
    let headers = properties.headers().as_ref();
    let in_ms = match headers.and_then(|headers| headers.inner().get(TIMESTAMP)) {
        Some(&AMQPValue::LongLongInt(millis)) => u64::try_from(millis).ok(),
        _ => None,
    };
    let since = match in_ms {
        Some(millis) => Duration::from_millis(millis),
        None => Duration::from_secs((*properties.timestamp())?),
    };
    SystemTime::UNIX_EPOCH.checked_add(since)
}

/// Returns `{exchange}:{routing key}:{queue}`, as in the conventions: empty parts are left out, and so is a
/// routing key that is the queue's name.
fn destination<'a>(exchange: &str, routing_key: &str, queue: &'a str) -> Cow<'a, str> {
    let routing_key = if routing_key == queue {
        ""
    } else {
        routing_key
    };
    if exchange.is_empty() && routing_key.is_empty() {
        return Cow::Borrowed(queue);
    }
    let mut parts = vec![exchange, routing_key, queue];
    parts.retain(|part| !part.is_empty());
    Cow::Owned(parts.join(":"))
}

pub(super) fn as_text(value: &AMQPValue) -> Option<&str> {
    match value {
        AMQPValue::LongString(text) => std::str::from_utf8(text.as_bytes()).ok(),
        AMQPValue::ShortString(text) => Some(text.as_str()),
        _ => None,
    }
}
