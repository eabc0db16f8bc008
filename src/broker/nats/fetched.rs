//! [`Fetched`], a message that a pull consumer delivered.

use std::time::{Duration, SystemTime};

use async_nats::{
    HeaderMap, HeaderValue, Message, Subject, header,
    jetstream::{self, Context},
};
use tokio::time::Instant;

use crate::broker::dead_letter::{DELIVERIES, REDRIVEN, SUSPECT_OF};

/// Header with the message's own `Nats-Msg-Id`, on dead letters and on messages from a schedule.
pub(super) const MESSAGE_ID: &str = "x-original-message-id";
/// Header with the time of the job's publish, in milliseconds since 1970, on messages from a schedule.
pub(super) const PUBLISHED: &str = "x-original-published";

/// A message that was fetched, and is perhaps not taken yet.
pub(super) struct Fetched {
    pub(super) message: Message,
    /// Subject to which its settlement goes.
    pub(super) reply: Subject,
    /// Name of the message, the same at each redelivery.
    pub(super) id: String,
    pub(super) sequence: u64,
    /// Number of deliveries of this message by the server.
    pub(super) delivered: u32,
    /// Number of deliveries of the job before one of our schedules published it anew, if one did: zero after
    /// a release.
    carried: Option<u32>,
    /// Time of the job's publish, by the server's clock.
    pub(super) published: SystemTime,
    /// Time at which it was seen first. The server's ack wait began earlier, by the time on the network.
    pub(super) since: Instant,
}

impl Fetched {
    /// Reads the consumer and the number of deliveries of a message; `None` if no consumer delivered it.
    ///
    /// It reads the subject of the reply, and not the status: anybody who publishes may write a status into
    /// the headers of a message.
    pub(super) fn read(message: Message, context: &Context) -> Option<Self> {
        let context = context.clone();
        let message = jetstream::Message { message, context };
        let info = message.info().ok()?;
        let delivered = u32::try_from(info.delivered).unwrap_or(u32::MAX);
        let sequence = info.stream_sequence;
        // A stream that was made anew counts from one again, so the time is part of the name.
        let id = format!("{}:{sequence}:{}", info.stream, info.published);
        let stored = SystemTime::from(info.published);
        let message = message.message;
        let carried = carried(message.headers.as_ref());
        Some(Self {
            reply: message.reply.clone()?,
            published: carried
                .and(message.headers.as_ref())
                .and_then(published)
                .unwrap_or(stored),
            carried,
            message,
            id,
            sequence,
            delivered,
            since: Instant::now(),
        })
    }

    /// Returns the number of deliveries of the job, including this one.
    pub(super) fn deliveries(&self) -> u32 {
        let carried = self.carried.unwrap_or(0);
        self.delivered.saturating_add(carried)
    }

    pub(super) fn is_redelivered(&self) -> bool {
        self.delivered > 1 || self.carried.is_some()
    }

    /// Returns the first value of the header `name`. Case does not matter: Go's clients write a capital.
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        first(self.message.headers.as_ref()?, name)
    }

    /// Returns the subject of the message, or of the first publish of a suspect.
    pub(super) fn origin(&self) -> &str {
        self.header(SUSPECT_OF).unwrap_or(&self.message.subject)
    }

    /// Returns the message's `Nats-Msg-Id` from its publish.
    pub(super) fn message_id(&self) -> Option<&str> {
        // The stream knows a message that was moved by an id of its own.
        let is_copy = |name| self.header(name).is_some();
        match self.carried.is_some() || is_copy(REDRIVEN) || is_copy(SUSPECT_OF) {
            true => {
                let headers = self.message.headers.as_ref();
                let id = headers.and_then(|headers| headers.get(MESSAGE_ID));
                id.map(HeaderValue::as_str)
            }
            false => self.header("Nats-Msg-Id"),
        }
    }
}

/// Returns the first value of the header `name`, or else of one called so in another case.
///
/// A job may have a header of its own that differs from one of ours by its case, and the order of headers is random.
pub(super) fn first<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let find = |is_it: fn(&str, &str) -> bool| {
        let mut headers = headers.iter();
        headers.find(|(key, _)| is_it(AsRef::<str>::as_ref(*key), name))
    };
    let (_, values) = find(|key, name| key == name).or_else(|| find(str::eq_ignore_ascii_case))?;
    Some(values.first()?.as_str())
}

/// Returns the deliveries before a schedule. They count only if the server marks the message as scheduled: a
/// dead letter that somebody publishes anew has that header too, and begins at one.
fn carried(headers: Option<&HeaderMap>) -> Option<u32> {
    let headers = headers?;
    headers.get(header::NATS_SCHEDULER)?;
    headers.get(DELIVERIES)?.as_str().parse().ok()
}

/// Returns the time of the publish before a schedule.
fn published(headers: &HeaderMap) -> Option<SystemTime> {
    let millis = headers.get(PUBLISHED)?.as_str().parse().ok()?;
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(millis))
}

#[cfg(test)]
mod tests {
    use super::{HeaderMap, first};

    #[test]
    fn a_header_in_its_own_case_comes_before_one_in_another() {
        // In a random order, so that one of many maps has the other one first.
        for _ in 0..64 {
            let mut headers = HeaderMap::new();
            headers.insert("X-Outcome-Kind", "own");
            assert_eq!(first(&headers, "x-outcome-kind"), Some("own"));
            headers.insert("x-outcome-kind", "failed");
            assert_eq!(first(&headers, "x-outcome-kind"), Some("failed"));
        }
    }
}
