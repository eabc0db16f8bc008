//! Reasons of dead letters, ours and the server's own.

use std::time::{Duration, SystemTime};

use lapin::{
    message::Delivery,
    types::{AMQPValue, FieldTable},
};

use super::headers::{
    ORIGINAL_EXCHANGE, ORIGINAL_ROUTING_KEY, as_text, count, header, header_value,
};
use crate::broker::{
    dead_letter::{DELIVERIES, DESTINATION, OUTCOME_KIND, OUTCOME_MESSAGE, OUTCOME_TIME, REDRIVEN},
    dead_letters::DeadLetter,
};

/// The server's history of deaths, the latest first.
const DEATHS: &str = "x-death";

/// Returns the description of a dead letter.
///
/// One that a worker has rejected has our headers, and perhaps a history of the queue in which it lies now. So the
/// history counts only without them.
pub(super) fn describe(message: &Delivery) -> DeadLetter {
    let text = |name| header(message, name).map(str::to_owned);
    let number = |name| header_value(message, name).and_then(count);
    let mut letter = DeadLetter::new();
    letter.id = message
        .properties
        .message_id()
        .as_ref()
        .map(ToString::to_string);
    letter.redriven = header(message, REDRIVEN)
        .and_then(|times| times.parse().ok())
        .unwrap_or(0);
    letter.kind = text(OUTCOME_KIND);
    if letter.kind.is_some() {
        letter.message = text(OUTCOME_MESSAGE);
        letter.time = header_value(message, OUTCOME_TIME).and_then(time);
        letter.deliveries = number(DELIVERIES);
        letter.destination = text(DESTINATION).or_else(|| by_default_exchange(message));
    } else if let Some(death) = Death::of(message) {
        letter.kind = death.text("reason").map(str::to_owned);
        letter.time = death.0.inner().get("time").and_then(time);
        letter.destination = death.text("queue").map(str::to_owned);
    }
    letter
}

/// Returns the exchange and the routing key of the job's first publish, if they are known.
pub(super) fn first_publish(message: &Delivery) -> Option<(&str, &str)> {
    let original = (
        header(message, ORIGINAL_EXCHANGE),
        header(message, ORIGINAL_ROUTING_KEY),
    );
    if let (Some(exchange), Some(routing_key)) = original {
        return Some((exchange, routing_key));
    }
    let death = Death::of(message)?;
    let AMQPValue::FieldArray(keys) = death.0.inner().get("routing-keys")? else {
        return None;
    };
    let routing_key = keys.as_slice().first().and_then(as_text)?;
    Some((death.text("exchange")?, routing_key))
}

/// Returns the queue of a job that was published to it by its name.
fn by_default_exchange(message: &Delivery) -> Option<String> {
    let is_default = header(message, ORIGINAL_EXCHANGE)?.is_empty();
    let queue = header(message, ORIGINAL_ROUTING_KEY)?;
    is_default.then(|| queue.to_owned())
}

/// The entry of the history with the queue that a job belongs to.
struct Death<'a>(&'a FieldTable);

impl<'a> Death<'a> {
    /// Chooses the latest that is no expiry: a job also expires in a retry queue, and in a queue of dead letters. If
    /// each is an expiry, it is the first.
    fn of(message: &'a Delivery) -> Option<Self> {
        let AMQPValue::FieldArray(deaths) = header_value(message, DEATHS)? else {
            return None;
        };
        let deaths = deaths.as_slice().iter().filter_map(|death| match death {
            AMQPValue::FieldTable(death) => Some(Self(death)),
            _ => None,
        });
        let mut chosen = None;
        for death in deaths {
            let is_expiry = death.text("reason") == Some("expired");
            chosen = Some(death);
            if !is_expiry {
                break;
            }
        }
        chosen
    }

    fn text(&self, name: &str) -> Option<&'a str> {
        self.0.inner().get(name).and_then(as_text)
    }
}

fn time(value: &AMQPValue) -> Option<SystemTime> {
    let AMQPValue::Timestamp(seconds) = value else {
        return None;
    };
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(*seconds))
}

#[cfg(test)]
mod tests {
    use lapin::BasicProperties;

    use super::*;

    #[test]
    fn a_header_of_the_job_in_another_case_does_not_hide_the_outcome() {
        let text = |text: &str| AMQPValue::LongString(text.into());
        let mut headers = FieldTable::default();
        headers.insert("X-Outcome-Kind".into(), text("own"));
        headers.insert(OUTCOME_KIND.into(), text("failed"));
        let mut message = Delivery::mock(1, "".into(), "dead".into(), false, Vec::new());
        message.properties = BasicProperties::default().with_headers(headers);
        assert_eq!(describe(&message).kind.as_deref(), Some("failed"));
    }
}
