//! Dead letters and suspects: copies of rejected messages, with the outcome in their headers.

use std::time::{SystemTime, UNIX_EPOCH};

use async_nats::{
    HeaderMap, HeaderValue, Subject, header,
    jetstream::message::{PublishMessage, StreamMessage},
};

use super::{
    channel::Channel,
    delivery_error::DeliveryError,
    fetched::{Fetched, MESSAGE_ID},
};
use crate::{
    broker::dead_letter::{
        DELIVERIES, DESTINATION, OUTCOME_KIND, OUTCOME_MESSAGE, OUTCOME_TIME, SUSPECT_OF, cut,
    },
    settle::Reason,
};

/// Publishes the dead letter and waits until its stream keeps it.
pub(super) async fn publish(
    channel: &Channel,
    subject: &Subject,
    fetched: &Fetched,
    reason: &Reason,
) -> Result<(), DeliveryError> {
    let headers = own_headers(fetched);
    // A dead letter of a suspect belongs to the subject that it came from first.
    let origin = fetched.origin();
    publish_copy(channel, subject, fetched, (headers, origin), reason).await
}

/// Publishes a suspect and waits until its stream keeps it.
pub(super) async fn publish_suspect(
    channel: &Channel,
    subject: &Subject,
    fetched: &Fetched,
    reason: &Reason,
) -> Result<(), DeliveryError> {
    let mut headers = own_headers(fetched);
    let origin = fetched.message.subject.as_str();
    headers.insert(SUSPECT_OF, origin);
    publish_copy(channel, subject, fetched, (headers, origin), reason).await
}

async fn publish_copy(
    channel: &Channel,
    subject: &Subject,
    fetched: &Fetched,
    (mut headers, origin): (HeaderMap, &str),
    reason: &Reason,
) -> Result<(), DeliveryError> {
    describe(&mut headers, &fetched.id, origin, reason);
    headers.insert(DELIVERIES, fetched.deliveries().to_string());
    let message = PublishMessage::build().payload(fetched.message.payload.clone());
    keep(channel, subject, message.headers(headers)).await
}

/// Publishes the payload of a message whose headers can't be parsed.
pub(super) async fn publish_unreadable(
    channel: &Channel,
    subject: &Subject,
    message: StreamMessage,
    reason: &Reason,
) -> Result<(), DeliveryError> {
    let mut headers = HeaderMap::new();
    let time = message.time;
    let id = format!("{}:{}:{time}", channel.stream, message.sequence);
    describe(&mut headers, &id, &message.subject, reason);
    let message = PublishMessage::build().payload(message.payload);
    keep(channel, subject, message.headers(headers)).await
}

async fn keep(
    channel: &Channel,
    subject: &Subject,
    message: PublishMessage,
) -> Result<(), DeliveryError> {
    let kept = channel.store(subject, message).await;
    kept.map_err(|error| match error {
        Some(error) => DeliveryError::DeadLetter(error.into()),
        None => DeliveryError::Unconfirmed {
            limit: channel.confirm_timeout,
        },
    })
}

/// Returns the headers of a message without the origin of a suspect, and without those that instruct a server: to
/// roll a stream up, to expect a sequence, to let the message expire.
///
/// The message's id is kept in another header: under its own name it would make the stream drop the copy as a
/// duplicate.
pub(super) fn own_headers(fetched: &Fetched) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, values) in fetched.message.headers.iter().flat_map(HeaderMap::iter) {
        let text: &str = name.as_ref();
        if is_of_nats(text) || text == MESSAGE_ID || text.eq_ignore_ascii_case(SUSPECT_OF) {
            continue;
        }
        for value in values {
            headers.append(name.clone(), value.clone());
        }
    }
    if let Some(id) = fetched.message_id() {
        headers.insert(MESSAGE_ID, line(id));
    }
    headers
}

/// Returns whether a header belongs to the server.
pub(super) fn is_of_nats(name: &str) -> bool {
    name.to_ascii_lowercase().starts_with("nats-")
}

pub(super) fn describe(headers: &mut HeaderMap, id: &str, origin: &str, reason: &Reason) {
    // The stream drops a copy that is published again because its confirmation got lost.
    headers.insert(header::NATS_MESSAGE_ID, id);
    headers.insert(OUTCOME_KIND, reason.kind.as_str());
    headers.insert(DESTINATION, origin);
    if let Some(message) = &reason.message {
        headers.insert(OUTCOME_MESSAGE, line(cut(message, usize::MAX)));
    }
    // Before 1970 the clock is wrong anyway.
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.unwrap_or_default().as_millis();
    headers.insert(OUTCOME_TIME, now.to_string());
}

/// Returns `text` as one line: a line break would end the header.
fn line(text: &str) -> HeaderValue {
    HeaderValue::from(text.replace(['\r', '\n'], " ").as_str())
}

#[cfg(test)]
mod tests {
    use super::line;

    #[test]
    fn a_message_of_many_lines_is_kept_as_one() {
        assert_eq!(line("at a\r\nat b").as_str(), "at a  at b");
    }
}
