//! A copy of a rejected message, with what became of it in its headers.

use std::time::{SystemTime, UNIX_EPOCH};

use async_nats::{HeaderMap, HeaderValue, Subject, header, jetstream::context::PublishErrorKind};
use tokio::time::timeout;

use super::{DeliveryError, channel::Channel, fetched::Fetched};
use crate::Reason;

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
    let limit = channel.confirm_timeout;
    let headers = headers(fetched, reason);
    let payload = fetched.message.payload.clone();
    let publishing = async {
        let context = &channel.context;
        let ack = context.publish_with_headers(subject.clone(), headers, payload);
        ack.await?.await
    };
    match timeout(limit, publishing).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) if error.kind() == PublishErrorKind::TimedOut => {
            Err(DeliveryError::Unconfirmed { limit })
        }
        Ok(Err(error)) => Err(DeliveryError::DeadLetter(error.into())),
        Err(_) => Err(DeliveryError::Unconfirmed { limit }),
    }
}

fn headers(fetched: &Fetched, reason: &Reason) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, values) in fetched.message.headers.iter().flat_map(HeaderMap::iter) {
        let text: &str = name.as_ref();
        // They tell a server what to do: roll a stream up, expect a sequence, expire.
        if text.to_ascii_lowercase().starts_with("nats-") {
            continue;
        }
        for value in values {
            headers.append(name.clone(), value.clone());
        }
    }
    // The stream drops a copy that is published again since its confirmation got lost.
    headers.insert(header::NATS_MESSAGE_ID, value(&fetched.id));
    headers.insert("x-outcome-kind", value(reason.kind.as_str()));
    if let Some(message) = &reason.message {
        headers.insert("x-outcome-message", value(message));
    }
    // Before 1970 the clock is wrong anyway.
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.unwrap_or_default().as_millis();
    headers.insert("x-outcome-time", value(&now.to_string()));
    headers.insert("x-deliveries", value(&fetched.deliveries.to_string()));
    headers
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
