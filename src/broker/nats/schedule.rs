//! Schedules for delayed retries: messages that the server publishes anew when they are due.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use async_nats::{
    HeaderMap, Subject, header,
    jetstream::{context::PublishError, message::PublishMessage},
};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::{
    channel::Channel,
    dead_letter::own_headers,
    delivery_error::DeliveryError,
    fetched::{Fetched, PUBLISHED},
    miss::{Miss, Missed},
};
use crate::{
    broker::dead_letter::{DELIVERIES, SUSPECT_OF},
    outcome::guard,
};

/// Result of a schedule's publish.
pub(super) enum Scheduled {
    /// The stream stores it.
    Kept,
    /// The server refuses it; nothing is stored.
    Refused,
    /// No stream took it for the whole time limit; nothing is stored.
    Absent(Arc<PublishError>),
}

/// Publishes the schedule of a job, with `deliveries` made so far, and waits until the stream stores it.
///
/// Its subject ends in the job's sequence, and a subject has one schedule: a second publish replaces the
/// first.
///
/// # Errors
///
/// If it is not known whether the stream stores it.
pub(super) async fn publish(
    channel: &Channel,
    prefix: &Subject,
    fetched: &Fetched,
    deliveries: u32,
    after: Duration,
) -> Result<Scheduled, DeliveryError> {
    let Some(headers) = headers(channel, fetched, deliveries, after) else {
        return Ok(Scheduled::Refused);
    };
    let subject = Subject::from(format!("{prefix}.{}", fetched.sequence));
    let message = PublishMessage::build().payload(fetched.message.payload.clone());
    match channel.store(&subject, message.headers(headers)).await {
        Ok(()) => Ok(Scheduled::Kept),
        Err(None) => Err(DeliveryError::Unconfirmed {
            limit: channel.confirm_timeout,
        }),
        Err(Some(error)) => {
            guard(|| {
                tracing::warn!(
                    stream = channel.stream,
                    stream_sequence = fetched.sequence,
                    %error,
                    "schedule refused: delayed by a NAK instead, which is a delivery more and counts toward `max_ack_pending`"
                );
            });
            Ok(match error.miss() {
                Miss::Absent => Scheduled::Absent(error.into()),
                _ => Scheduled::Refused,
            })
        }
    }
}

/// Returns the headers of the schedule; `None` if it is due after the year 9999.
///
/// From the message that it publishes, the server removes its own headers, and adds `Nats-Scheduler`.
fn headers(
    channel: &Channel,
    fetched: &Fetched,
    deliveries: u32,
    after: Duration,
) -> Option<HeaderMap> {
    let mut headers = own_headers(fetched);
    let due = at(SystemTime::now().checked_add(after)?)?;
    headers.insert(header::NATS_SCHEDULE, format!("@at {due}"));
    headers.insert(
        header::NATS_SCHEDULE_TARGET,
        fetched.message.subject.as_str(),
    );
    // A schedule that is due before its confirmation gets lost would bring the job back twice.
    let id = format!("{}:{}", fetched.id, fetched.delivered);
    headers.insert(header::NATS_MESSAGE_ID, id);
    headers.insert(header::NATS_EXPECTED_STREAM, channel.stream.as_str());
    headers.insert(DELIVERIES, deliveries.to_string());
    if let Some(origin) = fetched.header(SUSPECT_OF) {
        headers.insert(SUSPECT_OF, origin);
    }
    let published = fetched.published.duration_since(SystemTime::UNIX_EPOCH);
    let published = published.unwrap_or_default().as_millis();
    headers.insert(PUBLISHED, published.to_string());
    Some(headers)
}

/// Returns a time in the format of RFC 3339.
fn at(time: SystemTime) -> Option<String> {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).ok()?;
    let nanos = i128::try_from(since.as_nanos()).ok()?;
    let time = OffsetDateTime::from_unix_timestamp_nanos(nanos).ok()?;
    time.format(&Rfc3339).ok()
}

#[cfg(test)]
mod tests {
    use super::at;
    use std::time::{Duration, SystemTime};

    #[test]
    fn a_time_is_written_as_the_server_reads_it() {
        let time = SystemTime::UNIX_EPOCH + Duration::from_millis(1_795_884_872_250);
        assert_eq!(at(time).as_deref(), Some("2026-11-28T16:54:32.25Z"));
        let beyond = SystemTime::UNIX_EPOCH + Duration::from_secs(400_000_000_000);
        assert_eq!(at(beyond), None);
    }
}
