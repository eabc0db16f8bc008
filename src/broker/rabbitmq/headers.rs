//! What a republished job bears, and what is read from the headers of a delivered one.

use std::{
    borrow::Cow,
    time::{SystemTime, UNIX_EPOCH},
};

use lapin::{
    BasicProperties,
    message::Delivery,
    types::{AMQPValue, FieldTable},
};

use crate::{Messaging, OutcomeKind, Reason};

/// The queue's own count of failed deliveries.
const DELIVERY_COUNT: &str = "x-delivery-count";
/// The queue's own count of all deliveries, from RabbitMQ 4.3 on.
const ACQUIRED_COUNT: &str = "x-acquired-count";
/// How often a job was delivered before it was republished.
const DELIVERIES: &str = "x-deliveries";
const OUTCOME_KIND: &str = "x-outcome-kind";
const OUTCOME_MESSAGE: &str = "x-outcome-message";
const OUTCOME_TIME: &str = "x-outcome-time";
const ORIGINAL_EXCHANGE: &str = "x-original-exchange";
const ORIGINAL_ROUTING_KEY: &str = "x-original-routing-key";

/// Headers that must not be republished. With `CC` and `BCC` the server would send further copies,
/// counts would be those of another message, and with the history of deaths the server takes a
/// second retry for a cycle and drops it.
const DROPPED: [&str; 14] = [
    DELIVERY_COUNT,
    ACQUIRED_COUNT,
    OUTCOME_KIND,
    OUTCOME_MESSAGE,
    OUTCOME_TIME,
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

/// A header frame must fit into a frame, of which the smallest that is negotiated by default has
/// 128 KiB; else the server closes the connection.
const LONGEST_MESSAGE: usize = 4096;

/// What the headers tell of how often a job was delivered.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counted {
    /// Failed deliveries before the job was republished.
    pub(super) before: u32,
    /// Failed deliveries since, as the queue counts them.
    pub(super) by_queue: Option<u32>,
    /// Whether the queue counts all deliveries apart from the failed ones.
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
            before: before.unwrap_or(0),
            by_queue: headers.get(DELIVERY_COUNT).and_then(count),
            has_acquired: headers.contains_key(ACQUIRED_COUNT),
        }
    }
}

fn count(value: &AMQPValue) -> Option<u32> {
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

/// Returns what traces are to say of `message`, which came from `queue`.
pub(super) fn messaging<'a>(message: &'a Delivery, queue: &'a str) -> Messaging<'a> {
    let header = |name: &str| {
        let headers = message.properties.headers().as_ref()?.inner();
        let mut headers = headers.iter();
        let value = headers.find(|(key, _)| key.as_str().eq_ignore_ascii_case(name));
        value.and_then(|(_, value)| as_text(value))
    };
    // A job that was republished came by the default exchange. It is the same job, so its spans go
    // by the same name.
    let (exchange, routing_key) = match (header(ORIGINAL_EXCHANGE), header(ORIGINAL_ROUTING_KEY)) {
        (Some(exchange), Some(routing_key)) => (exchange, routing_key),
        _ => (message.exchange.as_str(), message.routing_key.as_str()),
    };
    let messaging = Messaging::new("rabbitmq", destination(exchange, routing_key, queue))
        .delivery_tag(message.delivery_tag)
        .traceparent(header("traceparent"))
        .tracestate(header("tracestate"));
    match message.properties.message_id() {
        Some(id) => messaging.message_id(id.as_str()),
        None => messaging,
    }
}

/// Returns `{exchange}:{routing key}:{queue}`, as the conventions have it: without what is empty,
/// and without the routing key where it is the queue's name.
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

fn as_text(value: &AMQPValue) -> Option<&str> {
    match value {
        AMQPValue::LongString(text) => std::str::from_utf8(text.as_bytes()).ok(),
        AMQPValue::ShortString(text) => Some(text.as_str()),
        _ => None,
    }
}

/// Returns the properties of `message` for its next try, with `deliveries` made so far.
pub(super) fn for_retry(
    message: &Delivery,
    deliveries: u32,
    keeps_expiration: bool,
) -> BasicProperties {
    let mut headers = kept(message);
    headers.insert(DELIVERIES.into(), AMQPValue::LongUInt(deliveries));
    let properties = copied(&message.properties).with_headers(headers);
    match message.properties.expiration() {
        Some(expiration) if keeps_expiration => properties.with_expiration(expiration.clone()),
        _ => properties,
    }
}

/// Returns the properties of `message` as a dead letter.
pub(super) fn for_dead_letter(
    message: &Delivery,
    deliveries: Option<u32>,
    reason: &Reason,
) -> BasicProperties {
    let mut headers = kept(message);
    let kind: OutcomeKind = reason.kind;
    headers.insert(OUTCOME_KIND.into(), text(kind.as_str()));
    if let Some(message) = &reason.message {
        let end = char_boundary(message, LONGEST_MESSAGE);
        headers.insert(OUTCOME_MESSAGE.into(), text(&message[..end]));
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.map_or(0, |now| now.as_secs());
    headers.insert(OUTCOME_TIME.into(), AMQPValue::Timestamp(now));
    if let Some(deliveries) = deliveries {
        headers.insert(DELIVERIES.into(), AMQPValue::LongUInt(deliveries));
    }
    copied(&message.properties).with_headers(headers)
}

/// Returns the last boundary of a character that is not after `at`.
fn char_boundary(text: &str, at: usize) -> usize {
    let mut end = at.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    end
}

fn text(text: &str) -> AMQPValue {
    AMQPValue::LongString(text.into())
}

/// Returns the headers that stay, and where the job was first published to.
fn kept(message: &Delivery) -> FieldTable {
    let mut headers = FieldTable::default();
    for (name, value) in message.properties.headers().iter().flatten() {
        if !DROPPED.contains(&name.as_str()) {
            headers.insert(name.clone(), value.clone());
        }
    }
    if !headers.contains_key(ORIGINAL_EXCHANGE) {
        headers.insert(ORIGINAL_EXCHANGE.into(), text(message.exchange.as_str()));
        let routing_key = text(message.routing_key.as_str());
        headers.insert(ORIGINAL_ROUTING_KEY.into(), routing_key);
    }
    headers
}

/// Copies all but the headers, the expiration, and the user id: the server refuses one that is not
/// the connection's own.
fn copied(properties: &BasicProperties) -> BasicProperties {
    let mut copy = BasicProperties::default();
    if let Some(value) = properties.content_type() {
        copy = copy.with_content_type(value.clone());
    }
    if let Some(value) = properties.content_encoding() {
        copy = copy.with_content_encoding(value.clone());
    }
    if let Some(value) = properties.delivery_mode() {
        copy = copy.with_delivery_mode(*value);
    }
    if let Some(value) = properties.priority() {
        copy = copy.with_priority(*value);
    }
    if let Some(value) = properties.correlation_id() {
        copy = copy.with_correlation_id(value.clone());
    }
    if let Some(value) = properties.reply_to() {
        copy = copy.with_reply_to(value.clone());
    }
    if let Some(value) = properties.message_id() {
        copy = copy.with_message_id(value.clone());
    }
    if let Some(value) = properties.timestamp() {
        copy = copy.with_timestamp(*value);
    }
    if let Some(value) = properties.kind() {
        copy = copy.with_type(value.clone());
    }
    if let Some(value) = properties.app_id() {
        copy = copy.with_app_id(value.clone());
    }
    copy
}
