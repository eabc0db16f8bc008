//! Properties of republished jobs, which must fit into one frame.

use std::{
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use lapin::{
    BasicProperties, ErrorKind,
    message::Delivery,
    protocol::basic::gen_properties,
    types::{AMQPValue, FieldTable},
};

use super::{
    death,
    delivery_error::DeliveryError,
    headers::{
        ACQUIRED_COUNT, DELIVERY_COUNT, DROPPED, ORIGINAL_EXCHANGE, ORIGINAL_ROUTING_KEY, header,
    },
};
use crate::{
    broker::dead_letter::{
        DELIVERIES, DESTINATION, OUTCOME_KIND, OUTCOME_MESSAGE, OUTCOME_TIME, REDRIVEN, SUSPECT_OF,
        cut,
    },
    settle::Reason,
};

/// Other parts of a frame with properties: type, channel, size and end; class, weight and the size of the
/// body.
const OVERHEAD: usize = 1 + 2 + 4 + 1 + 2 + 2 + 8;

/// Properties that are filled up to the size of one frame. If they were longer, the server would close the
/// connection with an error.
struct Filled {
    properties: BasicProperties,
    headers: FieldTable,
    /// Greatest size of the properties in bytes, and the part of it that is left.
    limit: usize,
    room: usize,
}

impl Filled {
    /// Creates them with the job's own `properties` and headers.
    fn new(
        message: &Delivery,
        properties: BasicProperties,
        frame_max: u32,
    ) -> Result<Self, DeliveryError> {
        let headers = kept(message);
        let limit = (frame_max as usize).saturating_sub(OVERHEAD);
        let size = size(&properties.clone().with_headers(headers.clone()))?;
        match limit.checked_sub(size) {
            Some(room) => Ok(Self {
                properties,
                headers,
                limit,
                room,
            }),
            None => Err(DeliveryError::NoRoom { size, limit }),
        }
    }

    /// Adds headers if there is room for all of them.
    fn add<const N: usize>(&mut self, added: [(&'static str, AMQPValue); N]) -> bool {
        let size = |(name, value): &(&str, AMQPValue)| cost(name, value);
        let size = added.iter().map(size).sum();
        let Some(room) = self.room.checked_sub(size) else {
            return false;
        };
        self.room = room;
        for (name, value) in added {
            self.headers.insert(name.into(), value);
        }
        true
    }

    /// Adds a header without which the copy would be another job.
    fn require(&mut self, name: &'static str, value: AMQPValue) -> Result<(), DeliveryError> {
        let limit = self.limit;
        let size = limit + cost(name, &value).saturating_sub(self.room);
        match self.add([(name, value)]) {
            true => Ok(()),
            false => Err(DeliveryError::NoRoom { size, limit }),
        }
    }

    /// Adds the exchange and the routing key of the job's first publish.
    fn add_origin(&mut self, exchange: &str, routing_key: &str) {
        if !self.headers.contains_key(ORIGINAL_EXCHANGE) {
            self.add([
                (ORIGINAL_EXCHANGE, text(exchange)),
                (ORIGINAL_ROUTING_KEY, text(routing_key)),
            ]);
        }
    }

    fn properties(self) -> BasicProperties {
        self.properties.with_headers(self.headers)
    }
}

/// Returns the properties of `message` for its next attempt, with `deliveries` made so far.
///
/// # Errors
///
/// If there is no room for the count: without it the job would be tried for ever. Or for the queue that a suspect came
/// from: without it, its dead letter would belong to the suspects' queue.
pub(super) fn for_retry(
    message: &Delivery,
    deliveries: u32,
    keeps_expiration: bool,
    frame_max: u32,
) -> Result<BasicProperties, DeliveryError> {
    let mut properties = copied(&message.properties);
    match message.properties.expiration() {
        Some(expiration) if keeps_expiration => {
            properties = properties.with_expiration(expiration.clone());
        }
        _ => {}
    }
    let mut filled = Filled::new(message, properties, frame_max)?;
    filled.require(DELIVERIES, AMQPValue::LongUInt(deliveries))?;
    if let Some(queue) = header(message, SUSPECT_OF) {
        filled.require(SUSPECT_OF, text(queue))?;
    }
    filled.add_origin(message.exchange.as_str(), message.routing_key.as_str());
    Ok(filled.properties())
}

/// A rejected job, which becomes a dead letter or goes to the suspects.
pub(super) struct Rejected<'a> {
    pub(super) message: &'a Delivery,
    /// The queue that it came from.
    pub(super) queue: &'a str,
    pub(super) deliveries: Option<u32>,
    pub(super) is_suspect: bool,
}

impl Rejected<'_> {
    /// Returns the properties of the copy. The end of the reason is cut off if there is no room for it.
    ///
    /// # Errors
    ///
    /// If there is no room for the job's own properties.
    pub(super) fn properties(
        &self,
        reason: &Reason,
        frame_max: u32,
    ) -> Result<BasicProperties, DeliveryError> {
        let Self { message, queue, .. } = *self;
        let mut filled = Filled::new(message, copied(&message.properties), frame_max)?;
        // A dead letter of a suspect belongs to the queue that it came from first.
        let suspect_of = header(message, SUSPECT_OF).filter(|_| !self.is_suspect);
        filled.add([(OUTCOME_KIND, text(reason.kind.as_str()))]);
        filled.add([(DESTINATION, text(suspect_of.unwrap_or(queue)))]);
        if self.is_suspect {
            filled.add([(SUSPECT_OF, text(queue))]);
        }
        if let Some(deliveries) = self.deliveries {
            filled.add([(DELIVERIES, AMQPValue::LongUInt(deliveries))]);
        }
        filled.add_origin(message.exchange.as_str(), message.routing_key.as_str());
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.map_or(0, |now| now.as_secs());
        filled.add([(OUTCOME_TIME, AMQPValue::Timestamp(now))]);
        if let Some(message) = &reason.message {
            let room = filled.room.saturating_sub(cost(OUTCOME_MESSAGE, &text("")));
            filled.add([(OUTCOME_MESSAGE, text(cut(message, room)))]);
        }
        Ok(filled.properties())
    }
}

/// Returns the properties of a dead letter that is moved back to its queue for the `times`-th time.
///
/// # Errors
///
/// If there is no room for the job's own properties and the number.
pub(super) fn for_redrive(
    message: &Delivery,
    times: u32,
    frame_max: u32,
) -> Result<BasicProperties, DeliveryError> {
    let mut filled = Filled::new(message, copied(&message.properties), frame_max)?;
    // As text, so that a handler can read it in the same way on every broker.
    filled.require(REDRIVEN, text(&times.to_string()))?;
    if let Some((exchange, routing_key)) = death::first_publish(message) {
        filled.add_origin(exchange, routing_key);
    }
    Ok(filled.properties())
}

/// Returns the properties of a dead letter that goes to the end of the queue in which it lies.
///
/// They fit into a frame, as they came in one.
pub(super) fn for_return(message: &Delivery) -> BasicProperties {
    let mut properties = copied(&message.properties);
    if let Some(expiration) = message.properties.expiration() {
        properties = properties.with_expiration(expiration.clone());
    }
    let mut headers = FieldTable::default();
    for (name, value) in message.properties.headers().iter().flatten() {
        if ![DELIVERY_COUNT, ACQUIRED_COUNT, "CC", "BCC"].contains(&name.as_str()) {
            headers.insert(name.clone(), value.clone());
        }
    }
    properties.with_headers(headers)
}

/// Returns the size of `properties` in bytes.
fn size(properties: &BasicProperties) -> Result<usize, DeliveryError> {
    let generated = gen_properties(properties)(Vec::new().into());
    let generated = generated.map_err(|error| {
        let kind = ErrorKind::SerialisationError(Arc::new(error));
        lapin::Error::from(kind)
    })?;
    Ok(generated.write.len())
}

/// Returns the size of an added header in bytes: its name and value, each with a length or a type.
fn cost(name: &str, value: &AMQPValue) -> usize {
    let value = match value {
        AMQPValue::LongString(text) => 4 + text.as_bytes().len(),
        AMQPValue::LongUInt(_) => 4,
        _ => 8,
    };
    1 + name.len() + 1 + value
}

fn text(text: &str) -> AMQPValue {
    AMQPValue::LongString(text.into())
}

/// Returns the headers that are republished.
fn kept(message: &Delivery) -> FieldTable {
    let mut headers = FieldTable::default();
    for (name, value) in message.properties.headers().iter().flatten() {
        if !DROPPED.contains(&name.as_str()) {
            headers.insert(name.clone(), value.clone());
        }
    }
    headers
}

/// Copies the properties except the headers, the expiration, and the user id: the server refuses a user id
/// that is not the connection's own.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_retry_keeps_the_queue_of_a_suspect_or_is_refused() {
        let mut headers = FieldTable::default();
        headers.insert(SUSPECT_OF.into(), text("jobs"));
        let mut message = Delivery::mock(1, "".into(), "suspects".into(), false, Vec::new());
        message.properties = BasicProperties::default().with_headers(headers);
        let mut sent = 0;
        for frame_max in 0..200 {
            let copy = match for_retry(&message, 1, true, frame_max) {
                Ok(copy) => copy,
                Err(DeliveryError::NoRoom { size, limit }) => {
                    assert!(size > limit, "{frame_max}");
                    continue;
                }
                Err(error) => panic!("{frame_max}: {error}"),
            };
            sent += 1;
            let headers = copy.headers().as_ref().unwrap().inner();
            assert_eq!(headers.get(SUSPECT_OF), Some(&text("jobs")), "{frame_max}");
            assert!(headers.contains_key(DELIVERIES), "{frame_max}");
        }
        assert!(sent > 0);
    }
}
