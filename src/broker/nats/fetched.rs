//! [`Fetched`]: a message that a pull consumer delivered.

use async_nats::{
    HeaderMap, HeaderName, HeaderValue, Message, Subject, header,
    jetstream::{self, Context},
};
use tokio::time::Instant;

use crate::broker::dead_letter::DELIVERIES;

/// The header with the message's own `Nats-Msg-Id`, on dead letters and on what a schedule brings back.
pub(super) const MESSAGE_ID: &str = "x-original-message-id";

/// A message that was fetched, and perhaps not yet taken.
pub(super) struct Fetched {
    pub(super) message: Message,
    /// Where it is answered.
    pub(super) reply: Subject,
    /// Names the message, wherever it is redelivered.
    pub(super) id: String,
    pub(super) sequence: u64,
    /// How often the server delivered this message.
    pub(super) delivered: u32,
    /// How often the job was delivered before a schedule of ours brought it back, if one did: not at
    /// all after a release.
    carried: Option<u32>,
    /// When it was seen first. The server's ack wait began earlier, by the way through the network.
    pub(super) since: Instant,
}

impl Fetched {
    /// Reads who delivered a message, and how often; none if no consumer did.
    ///
    /// The subject of the reply tells, and not the status: whoever publishes may write a status into
    /// the headers of a message.
    pub(super) fn read(message: Message, context: &Context) -> Option<Self> {
        let context = context.clone();
        let message = jetstream::Message { message, context };
        let info = message.info().ok()?;
        let delivered = u32::try_from(info.delivered).unwrap_or(u32::MAX);
        let sequence = info.stream_sequence;
        // A stream that was made anew counts from one again, so the time belongs to the name.
        let id = format!("{}:{sequence}:{}", info.stream, info.published);
        let message = message.message;
        Some(Self {
            reply: message.reply.clone()?,
            carried: carried(message.headers.as_ref()),
            message,
            id,
            sequence,
            delivered,
            since: Instant::now(),
        })
    }

    /// Returns how often the job was delivered, this time included.
    pub(super) fn deliveries(&self) -> u32 {
        let carried = self.carried.unwrap_or(0);
        self.delivered.saturating_add(carried)
    }

    pub(super) fn is_redelivered(&self) -> bool {
        self.delivered > 1 || self.carried.is_some()
    }

    /// Returns the first value of the header `name`, in any case: Go's clients write a capital.
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        let mut headers = self.message.headers.iter().flat_map(HeaderMap::iter);
        let is_it = |key: &HeaderName| AsRef::<str>::as_ref(key).eq_ignore_ascii_case(name);
        let values = headers.find(|(key, _)| is_it(key));
        values.and_then(|(_, values)| Some(values.first()?.as_str()))
    }

    /// Returns the `Nats-Msg-Id` that the message was published with.
    pub(super) fn message_id(&self) -> Option<&str> {
        match self.carried {
            Some(_) => {
                let headers = self.message.headers.as_ref();
                let id = headers.and_then(|headers| headers.get(MESSAGE_ID));
                id.map(HeaderValue::as_str)
            }
            None => self.header("Nats-Msg-Id"),
        }
    }
}

/// Returns the deliveries before a schedule, which only count with the server's word that it was one:
/// a dead letter that somebody publishes anew has that header too, and begins at one.
fn carried(headers: Option<&HeaderMap>) -> Option<u32> {
    let headers = headers?;
    headers.get(header::NATS_SCHEDULER)?;
    headers.get(DELIVERIES)?.as_str().parse().ok()
}
