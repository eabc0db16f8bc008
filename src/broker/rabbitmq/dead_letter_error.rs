//! [`DeadLetterError`] of a [`DeadLetterQueue`](super::DeadLetterQueue).

use std::{error::Error, fmt};

use super::{
    delivery_error::DeliveryError,
    error::{ConnectError, amqp_code, queue_named},
};
use crate::broker::cause::write_cause;

/// Error of a list, a redrive or a purge of dead letters. The letters that are not moved stay.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum DeadLetterError {
    /// The name of the queue is longer than AMQP's 255 bytes.
    NameTooLong {
        /// The name.
        name: String,
    },
    /// The queue does not exist.
    NoQueue {
        /// The queue.
        queue: String,
        /// The client's error.
        error: lapin::Error,
    },
    /// There is no connection for [publishing](super::Connection).
    NoPublisher(Box<ConnectError>),
    /// A letter can't be published to the queue that it came from.
    Publish(DeliveryError),
    /// The request failed, for example since the connection is lost, a right is missing, or the run took longer than the
    /// server's `consumer_timeout`.
    Client(lapin::Error),
}

impl DeadLetterError {
    pub(super) fn of_queue(queue: &str, error: lapin::Error) -> Self {
        match amqp_code(&error) {
            Some(404) => DeadLetterError::NoQueue {
                queue: queue.to_owned(),
                error,
            },
            _ => DeadLetterError::Client(error),
        }
    }
}

impl fmt::Display for DeadLetterError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeadLetterError::NameTooLong { name } => {
                write!(f, "\"{name}\" is longer than the 255 bytes of a name")
            }
            DeadLetterError::NoQueue { queue, .. } => {
                write!(f, "there is no {}", queue_named(queue))
            }
            DeadLetterError::NoPublisher(_) => f.write_str("no connection to republish jobs"),
            DeadLetterError::Publish(_) => f.write_str("a dead letter can't be moved back"),
            DeadLetterError::Client(_) => f.write_str("the request to rabbitmq failed"),
        }?;
        write_cause(f, self)
    }
}

impl Error for DeadLetterError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            DeadLetterError::NameTooLong { .. } => None,
            DeadLetterError::NoPublisher(error) => Some(&**error),
            DeadLetterError::Publish(error) => Some(error),
            DeadLetterError::NoQueue { error, .. } | DeadLetterError::Client(error) => Some(error),
        }
    }
}

impl From<lapin::Error> for DeadLetterError {
    fn from(error: lapin::Error) -> Self {
        DeadLetterError::Client(error)
    }
}
