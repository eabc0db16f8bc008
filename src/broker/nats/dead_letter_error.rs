//! [`DeadLetterError`] of a [`DeadLetterQueue`](super::DeadLetterQueue).

use std::{error::Error, fmt, sync::Arc, time::Duration};

use async_nats::jetstream::{
    self,
    context::{PublishError, RequestError},
};

use crate::broker::cause::write_cause;

/// Error of a list, a redrive or a purge of dead letters. The letters that are not moved stay.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum DeadLetterError {
    /// No stream stores the subject of the dead letters.
    NoStream {
        /// The subject.
        subject: String,
    },
    /// The stream allows no deletes: nothing was moved or deleted.
    NoDeletes {
        /// The stream.
        stream: String,
    },
    /// The stream of a destination does not store the job.
    Publish(Arc<PublishError>),
    /// JetStream refuses the request.
    Refused(jetstream::Error),
    /// The request failed.
    Request(Arc<RequestError>),
    /// The server did not confirm a request in time. It may have received it or not.
    Unconfirmed {
        /// The limit.
        limit: Duration,
    },
}

impl fmt::Display for DeadLetterError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeadLetterError::NoStream { subject } => {
                write!(f, "no stream has the subject \"{subject}\"")
            }
            DeadLetterError::NoDeletes { stream } => write!(
                f,
                "stream \"{stream}\" allows no deletes: its deny_delete is on, or it is sealed"
            ),
            DeadLetterError::Publish(_) => f.write_str("a dead letter can't be moved back"),
            DeadLetterError::Refused(_) => f.write_str("jetstream refuses the request"),
            DeadLetterError::Request(_) => f.write_str("the request to nats failed"),
            DeadLetterError::Unconfirmed { limit } => {
                write!(f, "the server did not confirm within {limit:?}")
            }
        }?;
        write_cause(f, self)
    }
}

impl Error for DeadLetterError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            DeadLetterError::Publish(error) => Some(error),
            DeadLetterError::Refused(error) => Some(error),
            DeadLetterError::Request(error) => Some(error),
            DeadLetterError::NoStream { .. }
            | DeadLetterError::NoDeletes { .. }
            | DeadLetterError::Unconfirmed { .. } => None,
        }
    }
}
