//! [`DeadLetter`], the description of one.

use std::time::SystemTime;

/// Description of a dead letter, without its payload.
///
/// A field is `None` if its broker, or whoever wrote the dead letter, does not tell it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeadLetter {
    /// The id: the sequence in its stream on NATS, the id of the entry on Redis, the number of the job in memory.
    /// On RabbitMQ it is the message's own `message_id`, if it has one.
    pub id: Option<String>,
    /// The kind of the outcome, such as `failed`. RabbitMQ's own dead letters have `rejected`, `expired`,
    /// `maxlen` or `delivery_limit`.
    pub kind: Option<String>,
    /// The message of the error or the panic.
    pub message: Option<String>,
    /// The time of the reject.
    pub time: Option<SystemTime>,
    /// The number of deliveries before it.
    pub deliveries: Option<u32>,
    /// The queue, the subject or the stream that it came from, and to which a redrive moves it.
    pub destination: Option<String>,
    /// The number of times that it was moved back before.
    pub redriven: u32,
}

impl DeadLetter {
    /// Creates the description of a dead letter of which nothing is known.
    pub fn new() -> Self {
        Self::default()
    }
}
