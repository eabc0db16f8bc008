//! [`Fetched`]: a message that a pull consumer delivered.

use async_nats::{Message, StatusCode, Subject, jetstream};
use tokio::time::Instant;

use super::channel::Channel;

/// A message that was fetched, and perhaps not yet taken.
pub(super) struct Fetched {
    pub(super) message: Message,
    /// Where it is answered.
    pub(super) reply: Subject,
    /// Names the message, wherever it is redelivered.
    pub(super) id: String,
    pub(super) sequence: u64,
    pub(super) deliveries: u32,
    /// When it was seen first. The server's ack wait began earlier, by the way through the network.
    pub(super) since: Instant,
}

impl Fetched {
    /// Reads who delivered a message, and how often; none if no consumer did.
    pub(super) fn read(message: Message, channel: &Channel) -> Option<Self> {
        if message
            .status
            .is_some_and(|status| status != StatusCode::OK)
        {
            return None;
        }
        let context = channel.context.clone();
        let message = jetstream::Message { message, context };
        let info = message.info().ok()?;
        let deliveries = u32::try_from(info.delivered).unwrap_or(u32::MAX);
        let sequence = info.stream_sequence;
        // A stream that was made anew counts from one again, so the time belongs to the name.
        let id = format!("{}:{sequence}:{}", info.stream, info.published);
        let message = message.message;
        Some(Self {
            reply: message.reply.clone()?,
            message,
            id,
            sequence,
            deliveries,
            since: Instant::now(),
        })
    }
}
