//! Headers of a dead letter, with the reason of its reject.
//!
//! On Redis they are fields of the entry. If the job had headers of these names, for example as a dead letter
//! that somebody moved back, they are replaced. The headers that one broker adds are on its page of the
//! [guide](crate::_guide).
//!
//! ```
//! use std::collections::HashMap;
//! use tower_sentinel::broker::dead_letter::{OUTCOME_KIND, OUTCOME_MESSAGE};
//!
//! /// A line for each dead letter, the same for each broker.
//! fn line(headers: &HashMap<String, String>) -> Option<String> {
//!     let message = headers.get(OUTCOME_MESSAGE).map_or("no message", String::as_str);
//!     Some(format!("{}: {message}", headers.get(OUTCOME_KIND)?))
//! }
//!
//! let headers = [("x-outcome-kind", "panicked"), ("x-outcome-message", "index 7")];
//! let headers = headers.map(|(name, value)| (name.to_owned(), value.to_owned()));
//! assert_eq!(line(&HashMap::from(headers)).as_deref(), Some("panicked: index 7"));
//! ```

/// Header with the kind of the outcome, such as `failed`:
/// [`OutcomeKind::as_str`](crate::outcome::OutcomeKind::as_str).
pub const OUTCOME_KIND: &str = "x-outcome-kind";

/// Header with the message of the error or the panic, if there is one.
///
/// It is cut off at 4096 bytes, between two characters; on RabbitMQ also at the end of the frame. On NATS it
/// is one line: each line break becomes a space.
pub const OUTCOME_MESSAGE: &str = "x-outcome-message";

/// Header with the time of the reject, in milliseconds since 1970.
///
/// On NATS it is by this process's clock, on Redis by the server's. On RabbitMQ it has AMQP's type for
/// times, a timestamp, whose unit is the second.
pub const OUTCOME_TIME: &str = "x-outcome-time";

/// Header with the number of deliveries, if it is known.
///
/// It is also on a job that was published anew for its next try: on RabbitMQ, and on NATS by a schedule.
pub const DELIVERIES: &str = "x-deliveries";

/// Header with the place that the job came from: a queue, a subject or a stream.
///
/// [`Redrive`](super::dead_letters::Redrive) moves the job back to it.
pub const DESTINATION: &str = "x-original-destination";

/// Header of a [suspect](crate::settle::Settle::is_suspect) with the place that it came from.
///
/// Its dead letter has that place as its [`DESTINATION`], so that a redrive does not end among the suspects.
/// The place is the [routing key](super::Envelope::routing_key) of the job there, except on RabbitMQ, where
/// that is the one of the first publish.
pub const SUSPECT_OF: &str = "x-suspect-of";

/// Header with the number of times that a [`Redrive`](super::dead_letters::Redrive) has moved the job back.
///
/// It is also on the job, and on its next dead letter.
pub const REDRIVEN: &str = "x-redriven";

/// The longest message, in bytes. Headers share the room of a message or a frame with the job.
#[cfg(any(feature = "nats", feature = "rabbitmq", feature = "redis"))]
const LONGEST_MESSAGE: usize = 4096;

/// Returns the beginning of `message`, of at most `room` bytes and at most the length that a dead letter
/// allows. It ends between two characters.
#[cfg(any(feature = "nats", feature = "rabbitmq", feature = "redis"))]
pub(super) fn cut(message: &str, room: usize) -> &str {
    let mut end = message.len().min(room).min(LONGEST_MESSAGE);
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    &message[..end]
}

#[cfg(all(test, any(feature = "nats", feature = "rabbitmq", feature = "redis")))]
mod tests {
    use super::cut;

    #[test]
    fn a_long_message_is_cut_between_two_characters() {
        assert_eq!(cut(&"ä".repeat(5_000), usize::MAX), "ä".repeat(2_048));
        assert_eq!(
            cut(&format!("x{}", "ä".repeat(5_000)), usize::MAX).len(),
            4_095
        );
    }

    #[test]
    fn a_message_takes_no_more_than_its_room() {
        assert_eq!(cut("ääa", 3), "ä");
        assert_eq!(cut("ä", 0), "");
        assert_eq!(cut("ä", 2), "ä");
    }
}
