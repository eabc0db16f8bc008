//! [`DeliveryError`], the error of a settlement.

use std::{error::Error, fmt, time::Duration};

use super::error::{ConnectError, amqp_code, exchange_named, queue_named, server_text};
use crate::{broker::cause::write_cause, settle::Unsettled};

/// A user's right to a resource of the server: one of RabbitMQ's
/// [permissions](https://www.rabbitmq.com/docs/access-control#authorisation).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Right {
    /// To declare and to delete it.
    Configure,
    /// To publish to it.
    Write,
    /// To consume from it.
    Read,
}

impl fmt::Display for Right {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Right::Configure => "configure",
            Right::Write => "write",
            Right::Read => "read",
        })
    }
}

/// Error of a delivery that is not settled, or not kept alive.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum DeliveryError {
    /// It was settled before, or a settlement of it was tried; nothing was sent.
    AlreadySettled,
    /// Its channel is closed; it was neither settled nor republished. The server redelivers the job.
    Stale,
    /// The server has taken the job back, or is about to: it has cancelled the consumer, or the
    /// [consumer timeout](super::Queue::consumer_timeout) is over. Nothing was sent or republished.
    Lost,
    /// The client did not send the settlement (lapin's `Ok(false)`): the channel closed meanwhile.
    NotSent,
    /// The client failed to send the settlement, or to republish the job.
    Client(lapin::Error),
    /// The server does not take the republished job (`basic.nack`), for example since the queue is full and
    /// has `x-overflow` set to `reject-publish`. The job is given back after a second. If the queue would
    /// count this and the job is near the delivery limit, it is kept instead, and settled when there is room.
    NotConfirmed,
    /// The server has not yet confirmed the republished job, for example since a quorum queue has no leader,
    /// or has not yet declared its retry queue. The job keeps its place, and is settled with the confirmation;
    /// if that can't come any more, it is given back.
    NotYetConfirmed,
    /// The connection that publishes was lost, and can't be opened anew.
    NoPublisher(Box<ConnectError>),
    /// No queue takes the dead letter; the original is not acked.
    Unroutable {
        /// The exchange of the dead letter.
        exchange: String,
        /// The routing key of the dead letter.
        routing_key: String,
    },
    /// The delay is longer than the 24 days of the longest retry queue, or than the delay of each [retry
    /// queue](super::Queue::retry_queue) that was given; nothing was sent.
    DelayTooLong(Duration),
    /// The user does not have the right to republish the job.
    Denied {
        /// The right.
        right: Right,
        /// The queue or the exchange.
        resource: String,
        /// The client's error.
        error: lapin::Error,
    },
    /// A retry queue can't be declared, since a queue of its name has other arguments.
    Conflict {
        /// The retry queue.
        queue: String,
        /// The client's error.
        error: lapin::Error,
    },
    /// The exchange of the dead letters does not exist.
    NoExchange {
        /// The exchange.
        exchange: String,
        /// The client's error.
        error: lapin::Error,
    },
    /// The server blocks the connection that publishes, since it lacks memory or disk space. The job is given
    /// back; a copy of it may follow. If the queue would count this and the job is near the delivery limit,
    /// it is kept instead, and settled when the connection is no longer blocked.
    Blocked,
    /// The job's headers leave no room in a frame of the connection for those of a retry, or don't fit
    /// themselves. The job is given back.
    NoRoom {
        /// Size of the properties in bytes.
        size: usize,
        /// Room for the properties in bytes.
        limit: usize,
    },
    /// RabbitMQ can't give a delivery more time.
    NoKeepAlive,
}

impl DeliveryError {
    /// Creates the error for the failed declaration of a retry queue, which takes the `right` to it.
    pub(super) fn of_declaration(right: Right, queue: &str, error: lapin::Error) -> Self {
        match amqp_code(&error) {
            // The declaration also takes the right to write to the exchange of its dead letters.
            Some(403) if server_text(&error).contains("exchange") => DeliveryError::Denied {
                right: Right::Write,
                resource: exchange_named(""),
                error,
            },
            Some(403) => DeliveryError::Denied {
                right,
                resource: queue_named(queue),
                error,
            },
            Some(406) => DeliveryError::Conflict {
                queue: queue.to_owned(),
                error,
            },
            _ => DeliveryError::Client(error),
        }
    }

    /// Creates the error for a failed publish.
    pub(super) fn of_publish(exchange: &str, error: lapin::Error) -> Self {
        match amqp_code(&error) {
            Some(403) => DeliveryError::Denied {
                right: Right::Write,
                resource: exchange_named(exchange),
                error,
            },
            Some(404) => DeliveryError::NoExchange {
                exchange: exchange.to_owned(),
                error,
            },
            _ => DeliveryError::Client(error),
        }
    }

    /// Returns whether the same settlement may succeed later.
    pub(super) fn passes(&self) -> bool {
        matches!(self, DeliveryError::Blocked | DeliveryError::NotConfirmed)
    }

    /// Returns whether a request failed since its channel or connection was lost, and not since the server
    /// refuses it.
    pub(super) fn is_lost(&self) -> bool {
        // CONNECTION_FORCED: the server ends, or an operator has closed the connection.
        matches!(self, DeliveryError::Client(error) if matches!(amqp_code(error), None | Some(320)))
    }

    /// Returns whether the job is given back after this error, since it concerns no other job.
    pub(super) fn gives_back(&self) -> bool {
        self.passes() || matches!(self, DeliveryError::NoRoom { .. })
    }

    /// Returns the error as `Unsettled`, with its reach.
    pub(super) fn unsettled<Tag>(self) -> Unsettled<Tag, Self> {
        match self {
            DeliveryError::Denied { .. }
            | DeliveryError::Conflict { .. }
            | DeliveryError::NoExchange { .. }
            | DeliveryError::Unroutable { .. }
            | DeliveryError::DelayTooLong(_) => Unsettled::misconfigured(self),
            DeliveryError::Blocked
            | DeliveryError::NotConfirmed
            | DeliveryError::NotYetConfirmed
            | DeliveryError::NoRoom { .. } => Unsettled::moot(self),
            DeliveryError::AlreadySettled
            | DeliveryError::Stale
            | DeliveryError::Lost
            | DeliveryError::NotSent
            | DeliveryError::Client(_)
            | DeliveryError::NoPublisher(_)
            | DeliveryError::NoKeepAlive => Unsettled::last(self),
        }
    }
}

impl fmt::Display for DeliveryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeliveryError::AlreadySettled => f.write_str("the delivery was settled before"),
            DeliveryError::Stale => f.write_str("the channel of the delivery is closed"),
            DeliveryError::Lost => f.write_str(
                "the server has taken the job back: let jobs end before its consumer timeout",
            ),
            DeliveryError::NotSent => f.write_str("the client did not send the settlement"),
            DeliveryError::Client(_) => f.write_str("the request to rabbitmq failed"),
            DeliveryError::NotConfirmed => {
                f.write_str("the server does not take the republished job: is its queue full?")
            }
            DeliveryError::NotYetConfirmed => f.write_str(
                "the server has not confirmed the republished job yet: has its queue a leader?",
            ),
            DeliveryError::NoPublisher(_) => f.write_str("no connection to republish jobs"),
            DeliveryError::Unroutable {
                exchange,
                routing_key,
            } => write!(
                f,
                "no queue takes what is published to exchange \"{exchange}\" with \"{routing_key}\""
            ),
            DeliveryError::DelayTooLong(delay) => {
                write!(
                    f,
                    "a delay of {delay:?} is longer than a retry queue can do"
                )
            }
            DeliveryError::Denied {
                right, resource, ..
            } => {
                write!(f, "the user has no right to {right} {resource}")
            }
            DeliveryError::Conflict { queue, .. } => write!(
                f,
                "retry queue \"{queue}\" has other arguments: delete it when it is empty"
            ),
            DeliveryError::NoExchange { exchange, .. } => {
                write!(f, "there is no exchange \"{exchange}\" for dead letters")
            }
            DeliveryError::Blocked => {
                f.write_str("the server blocks the connection that publishes: memory or disk alarm")
            }
            DeliveryError::NoRoom { size, limit } => write!(
                f,
                "the properties would take {size} bytes, and a frame has room for {limit}: raise frame_max"
            ),
            DeliveryError::NoKeepAlive => f.write_str("rabbitmq keeps no delivery alive"),
        }?;
        write_cause(f, self)
    }
}

impl Error for DeliveryError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            DeliveryError::Client(error)
            | DeliveryError::Denied { error, .. }
            | DeliveryError::Conflict { error, .. }
            | DeliveryError::NoExchange { error, .. } => Some(error),
            DeliveryError::NoPublisher(error) => Some(&**error),
            _ => None,
        }
    }
}

impl From<lapin::Error> for DeliveryError {
    fn from(error: lapin::Error) -> Self {
        DeliveryError::Client(error)
    }
}
