//! Errors of subscriptions.

use std::{error::Error, fmt, sync::Arc, time::Duration};

use async_nats::{
    client::SubscribeError,
    jetstream::{
        ErrorCode,
        context::{ConsumerInfoError, ConsumerInfoErrorKind, GetStreamByNameError, GetStreamError},
        stream::{ConsumerError, ConsumerErrorKind},
    },
};

use crate::broker::cause::write_cause;

/// Error of a subscription that can't be made, or that ended without being closed from this side.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum SubscriptionError {
    /// The consumer's ack policy is not *explicit*, so its deliveries can't be settled one by one.
    NotExplicit,
    /// No stream stores messages on the subject of the dead letters.
    NoDeadLetterStream {
        /// The subject.
        subject: String,
        /// The client's error.
        error: Arc<GetStreamByNameError>,
    },
    /// The dead letters would go to the stream that the jobs come from.
    DeadLetterAmongJobs {
        /// The subject of the dead letters.
        subject: String,
        /// The stream.
        stream: String,
    },
    /// No stream stores messages on the subject of the suspects.
    NoStreamOfSuspects {
        /// The subject.
        subject: String,
        /// The client's error.
        error: Arc<GetStreamByNameError>,
    },
    /// The suspects would go to the stream that the jobs come from.
    SuspectsAmongJobs {
        /// The subject of the suspects.
        subject: String,
        /// The stream.
        stream: String,
    },
    /// The server removes an idle consumer so early that a job may not end in time.
    InactiveThreshold {
        /// The consumer's `inactive_threshold`.
        threshold: Duration,
        /// The shortest one that works.
        least: Duration,
    },
    /// The consumer's priority group and the pull don't match.
    Priority {
        /// The reason.
        reason: NoPriority,
    },
    /// The stream can't delay retries by schedules.
    Schedules {
        /// The prefix of their subjects.
        subject: String,
        /// The stream.
        stream: String,
        /// The reason.
        reason: NoSchedules,
    },
    /// The stream's state can't be read.
    Stream(Arc<GetStreamError>),
    /// The connection broke several times in a row right after a request, before any message came.
    ///
    /// One reason is a message that the client can't parse and that was not found.
    Breaking {
        /// The number of breaks in a row.
        times: u32,
    },
    /// The client was drained, stopped reconnecting, or has panicked.
    ClientClosed,
    /// The consumer does not exist.
    ConsumerDeleted,
    /// The stream does not exist.
    StreamDeleted,
    /// JetStream was silent for longer than [`Pull::reconnect_limit`](super::Pull::reconnect_limit), or for
    /// 15 s at [`subscribe`](super::Pull::subscribe).
    Unreachable {
        /// The duration of the silence.
        silence: Duration,
    },
    /// The server refuses to deliver, for example since the prefetch is above the consumer's `max_batch`.
    Refused {
        /// The server's text.
        description: String,
    },
    /// The server pushes the consumer's messages; [`Pull`](super::Pull) reads pull consumers.
    NotPull,
    /// The consumer's state can't be read.
    Consumer(Arc<ConsumerError>),
    /// The client can't subscribe.
    Subscribe(Arc<SubscribeError>),
}

impl SubscriptionError {
    /// Creates the error for a consumer that can't be subscribed to.
    pub(super) fn no_consumer(error: ConsumerError) -> Self {
        match error.kind() {
            ConsumerErrorKind::InvalidConsumerType => Some(Self::NotPull),
            ConsumerErrorKind::JetStream(error) => Self::by_code(error.error_code()),
            _ => None,
        }
        .unwrap_or_else(|| Self::Consumer(Arc::new(error)))
    }

    /// Returns an error that names the deleted consumer or stream, if this is the reason of `error`.
    pub(super) fn deleted(error: &ConsumerInfoError) -> Option<Self> {
        match error.kind() {
            ConsumerInfoErrorKind::NotFound => Some(Self::ConsumerDeleted),
            ConsumerInfoErrorKind::StreamNotFound => Some(Self::StreamDeleted),
            ConsumerInfoErrorKind::JetStream(error) => Self::by_code(error.error_code()),
            _ => None,
        }
    }

    fn by_code(code: ErrorCode) -> Option<Self> {
        match code {
            ErrorCode::CONSUMER_NOT_FOUND => Some(Self::ConsumerDeleted),
            ErrorCode::STREAM_NOT_FOUND => Some(Self::StreamDeleted),
            _ => None,
        }
    }
}

impl fmt::Display for SubscriptionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SubscriptionError::NotExplicit => {
                f.write_str("the ack policy of the consumer is not explicit")
            }
            SubscriptionError::NoDeadLetterStream { subject, .. } => {
                write!(f, "no stream keeps the dead letters of \"{subject}\"")
            }
            SubscriptionError::DeadLetterAmongJobs { subject, stream } => write!(
                f,
                "the dead letters of \"{subject}\" would be kept among the jobs of stream \"{stream}\"; \
                 name a subject of another stream"
            ),
            SubscriptionError::NoStreamOfSuspects { subject, .. } => {
                write!(f, "no stream keeps the suspects of \"{subject}\"")
            }
            SubscriptionError::SuspectsAmongJobs { subject, stream } => write!(
                f,
                "the suspects of \"{subject}\" would be kept among the jobs of stream \"{stream}\"; \
                 name a subject of another stream"
            ),
            SubscriptionError::InactiveThreshold { threshold, least } => write!(
                f,
                "the consumer's inactive_threshold of {threshold:?} is too short; \
                 it takes {least:?} or more"
            ),
            SubscriptionError::Priority { reason } => {
                write!(f, "the pull does not fit the consumer's priority: {reason}")
            }
            SubscriptionError::Schedules {
                subject,
                stream,
                reason,
            } => write!(
                f,
                "stream \"{stream}\" can't delay retries by schedules of \"{subject}\": {reason}"
            ),
            SubscriptionError::Stream(_) => f.write_str("the stream can't be asked for"),
            SubscriptionError::Breaking { times } => write!(
                f,
                "the connection broke {times} times in a row right after a request; \
                 look for a message whose headers are malformed"
            ),
            SubscriptionError::ClientClosed => f.write_str("the nats client is closed"),
            SubscriptionError::ConsumerDeleted => f.write_str("the consumer does not exist"),
            SubscriptionError::StreamDeleted => f.write_str("the stream does not exist"),
            SubscriptionError::Unreachable { silence } => {
                write!(f, "nothing was heard of jetstream for {silence:?}")
            }
            SubscriptionError::Refused { description } => {
                write!(f, "the server refuses to deliver: {description}")
            }
            SubscriptionError::NotPull => {
                f.write_str("the consumer is a push consumer; create one without deliver subject")
            }
            SubscriptionError::Consumer(_) => f.write_str("the consumer can't be asked for"),
            SubscriptionError::Subscribe(_) => f.write_str("the client can't subscribe"),
        }?;
        write_cause(f, self)
    }
}

impl Error for SubscriptionError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            SubscriptionError::NoDeadLetterStream { error, .. }
            | SubscriptionError::NoStreamOfSuspects { error, .. } => Some(error),
            SubscriptionError::Consumer(error) => Some(error),
            SubscriptionError::Stream(error) => Some(error),
            SubscriptionError::Subscribe(error) => Some(error),
            SubscriptionError::NotExplicit
            | SubscriptionError::NotPull
            | SubscriptionError::DeadLetterAmongJobs { .. }
            | SubscriptionError::SuspectsAmongJobs { .. }
            | SubscriptionError::InactiveThreshold { .. }
            | SubscriptionError::Priority { .. }
            | SubscriptionError::Schedules { .. }
            | SubscriptionError::Breaking { .. }
            | SubscriptionError::ClientClosed
            | SubscriptionError::ConsumerDeleted
            | SubscriptionError::StreamDeleted
            | SubscriptionError::Unreachable { .. }
            | SubscriptionError::Refused { .. } => None,
        }
    }
}

/// Mismatch between a pull and the priority group of its consumer.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NoPriority {
    /// The consumer has other groups, or none: an older server keeps none.
    Group {
        /// The group of the pull.
        asked: Option<String>,
        /// The groups of the consumer.
        groups: Vec<String>,
    },
    /// The consumer pins one client, which is not supported.
    Pinned,
    /// The consumer's policy is not `overflow`.
    NotOverflow,
    /// The consumer's policy is not `prioritized`.
    NotPrioritized,
}

impl fmt::Display for NoPriority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NoPriority::Group { asked, groups } => {
                match asked {
                    Some(group) => write!(f, "it has no group \"{group}\"")?,
                    None => f.write_str("no group is set")?,
                }
                match groups.is_empty() {
                    true => f.write_str(", as it has none; servers before 2.11 keep none"),
                    false => write!(f, "; its groups are {groups:?}"),
                }
            }
            NoPriority::Pinned => f.write_str(
                "its policy pinned_client is not supported; use overflow or prioritized",
            ),
            NoPriority::NotOverflow => {
                f.write_str("min_pending and min_ack_pending take the policy overflow")
            }
            NoPriority::NotPrioritized => f.write_str("a priority takes the policy prioritized"),
        }
    }
}

/// Reason why a stream can't delay retries by schedules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NoSchedules {
    /// The stream's `allow_msg_schedules` is off, as on each server before 2.12.
    NotAllowed,
    /// The stream is no work queue: its other consumers would see the job again.
    NotWorkQueue,
    /// The subjects don't belong to the stream.
    NotInStream,
    /// The consumer reads these subjects, and would deliver a schedule as a job.
    Jobs,
}

impl fmt::Display for NoSchedules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            NoSchedules::NotAllowed => {
                "its allow_msg_schedules is off; it takes a server of 2.12 or later"
            }
            NoSchedules::NotWorkQueue => "its retention is not workqueue",
            NoSchedules::NotInStream => "its subjects don't include them",
            NoSchedules::Jobs => "the consumer reads them as jobs; give it a filter_subject",
        })
    }
}
