//! A copy of a rejected message, with what became of it in its headers.

use std::{
    future::Future,
    time::{SystemTime, UNIX_EPOCH},
};

use async_nats::{
    HeaderMap, HeaderValue, Subject, header,
    jetstream::{
        context::{PublishAckFuture, PublishError, PublishErrorKind},
        message::StreamMessage,
    },
};
use tokio::time::timeout;

use super::{
    channel::Channel,
    delivery_error::DeliveryError,
    fetched::{DELIVERIES, Fetched, MESSAGE_ID},
};
use crate::settle::Reason;

/// The longest message of an outcome that is kept, in bytes: headers count against the server's
/// `max_payload`.
const MESSAGE_LIMIT: usize = 4096;

/// Publishes the dead letter and waits until its stream keeps it.
pub(super) async fn publish(
    channel: &Channel,
    subject: &Subject,
    fetched: &Fetched,
    reason: &Reason,
) -> Result<(), DeliveryError> {
    let mut headers = own_headers(fetched);
    let deliveries = fetched.deliveries();
    describe(&mut headers, &fetched.id, reason);
    headers.insert(DELIVERIES, value(&deliveries.to_string()));
    let payload = fetched.message.payload.clone();
    let context = &channel.context;
    keep(
        channel,
        context.publish_with_headers(subject.clone(), headers, payload),
    )
    .await
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
    describe(&mut headers, &id, reason);
    let context = &channel.context;
    keep(
        channel,
        context.publish_with_headers(subject.clone(), headers, message.payload),
    )
    .await
}

async fn keep(
    channel: &Channel,
    publishing: impl Future<Output = Result<PublishAckFuture, PublishError>>,
) -> Result<(), DeliveryError> {
    let limit = channel.confirm_timeout;
    match timeout(limit, async { publishing.await?.await }).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) if error.kind() == PublishErrorKind::TimedOut => {
            Err(DeliveryError::Unconfirmed { limit })
        }
        Ok(Err(error)) => Err(DeliveryError::DeadLetter(error.into())),
        Err(_) => Err(DeliveryError::Unconfirmed { limit }),
    }
}

/// Returns the headers of a message without those that tell a server what to do: roll a stream up,
/// expect a sequence, expire.
///
/// So the message's id is kept in another header: as its own it would make the stream drop the copy
/// as a duplicate.
pub(super) fn own_headers(fetched: &Fetched) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, values) in fetched.message.headers.iter().flat_map(HeaderMap::iter) {
        let text: &str = name.as_ref();
        if text.to_ascii_lowercase().starts_with("nats-") || text == MESSAGE_ID {
            continue;
        }
        for value in values {
            headers.append(name.clone(), value.clone());
        }
    }
    if let Some(id) = fetched.message_id() {
        headers.insert(MESSAGE_ID, value(id));
    }
    headers
}

fn describe(headers: &mut HeaderMap, id: &str, reason: &Reason) {
    // The stream drops a copy that is published again since its confirmation got lost.
    headers.insert(header::NATS_MESSAGE_ID, value(id));
    headers.insert("x-outcome-kind", value(reason.kind.as_str()));
    if let Some(message) = &reason.message {
        headers.insert("x-outcome-message", value(message));
    }
    // Before 1970 the clock is wrong anyway.
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.unwrap_or_default().as_millis();
    headers.insert("x-outcome-time", value(&now.to_string()));
}

/// Returns `text` as one line that is not too long.
fn value(text: &str) -> HeaderValue {
    let mut end = text.len().min(MESSAGE_LIMIT);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let line = text[..end].replace(['\r', '\n'], " ");
    HeaderValue::from(line.as_str())
}

#[cfg(test)]
mod tests {
    use super::value;

    #[test]
    fn a_message_of_many_lines_is_kept_as_one() {
        assert_eq!(value("at a\r\nat b").as_str(), "at a  at b");
    }

    #[test]
    fn a_long_message_is_cut_between_two_characters() {
        let kept = value(&"ä".repeat(5_000));
        assert_eq!(kept.as_str(), "ä".repeat(2_048));
        let kept = value(&format!("x{}", "ä".repeat(5_000)));
        assert_eq!(kept.as_str().len(), 4_095);
    }
}
