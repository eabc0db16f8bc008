//! Errors of subscriptions and settlements.

use std::{error::Error, fmt};

use ::redis::RedisError;

use super::keys::in_slot_of;
use crate::broker::cause::write_cause;

/// Error of a subscription that can't be made.
///
/// The message is one line that names the server's address, and never a user or a password. With `{:#}` it
/// includes the cause.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum ConnectError {
    /// The address is not valid for Redis.
    InvalidAddress(RedisError),
    /// The address asks for TLS, and this crate is built without it; nothing was sent.
    NoTls {
        /// Host and port.
        address: String,
    },
    /// The server can't be reached, or does not respond.
    Unreachable {
        /// Host and port, or the path of a socket.
        address: String,
        /// The client's error.
        error: RedisError,
    },
    /// The server refuses the user or the password.
    Denied {
        /// Host and port, or the path of a socket.
        address: String,
        /// The client's error.
        error: RedisError,
    },
    /// The user has no right to run a command that a subscription needs, or not on one of its keys.
    ///
    /// The guide lists the [rights](crate::_guide::redis#rights) that are needed.
    Forbidden {
        /// Host and port, or the path of a socket.
        address: String,
        /// The command, with its subcommand if it has one, such as `XGROUP CREATE`.
        command: &'static str,
        /// The command's key, if it has one.
        key: Option<String>,
        /// The server's error. It names the user.
        error: RedisError,
    },
    /// The server is a cluster, and a key is in another hash slot than the stream, so no command can change
    /// both at once.
    OtherSlot {
        /// Host and port, or the path of a socket.
        address: String,
        /// The stream to be read.
        stream: String,
        /// The key, mostly that of the dead letters.
        key: String,
        /// The server's error.
        error: RedisError,
    },
    /// The server refuses to create the consumer group.
    Group {
        /// Host and port, or the path of a socket.
        address: String,
        /// The stream to be read.
        stream: String,
        /// The group to be joined.
        group: String,
        /// The server's error.
        error: RedisError,
    },
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ConnectError::InvalidAddress(_) => {
                f.write_str("the address of the redis server is not valid")
            }
            ConnectError::NoTls { address } => write!(
                f,
                "no tls to redis at {address}: \
                 turn on the feature `rustls` or `native-tls` of tower-sentinel"
            ),
            ConnectError::Unreachable { address, .. } => {
                write!(f, "redis at {address} can't be reached")
            }
            ConnectError::Denied { address, .. } => {
                write!(f, "redis at {address} refuses the credentials")
            }
            ConnectError::Forbidden {
                address,
                command,
                key,
                ..
            } => {
                let right = command.to_ascii_lowercase().replace(' ', "|");
                write!(f, "redis at {address} forbids its user \"{command}\"")?;
                match key {
                    Some(key) => {
                        write!(f, " on \"{key}\": grant +{right} and the key (~{key})")
                    }
                    None => write!(f, ": grant +{right}"),
                }
            }
            ConnectError::OtherSlot {
                address,
                stream,
                key,
                ..
            } => write!(
                f,
                "redis at {address} is a cluster and keeps \"{key}\" in another slot than \"{stream}\": \
                 begin its name with \"{}\"",
                in_slot_of(stream)
            ),
            ConnectError::Group {
                address,
                stream,
                group,
                ..
            } => write!(
                f,
                "redis at {address} has no group \"{group}\" of \"{stream}\""
            ),
        }?;
        write_cause(f, self)
    }
}

impl Error for ConnectError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            ConnectError::NoTls { .. } => None,
            ConnectError::InvalidAddress(error)
            | ConnectError::Unreachable { error, .. }
            | ConnectError::Denied { error, .. }
            | ConnectError::Forbidden { error, .. }
            | ConnectError::OtherSlot { error, .. }
            | ConnectError::Group { error, .. } => Some(error),
        }
    }
}

/// Error of a subscription that ended without being closed from this side.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum SubscriptionError {
    /// A connection to the server is lost.
    ///
    /// It is noticed at once if the server's end closes it. If the server falls silent, it is noticed after
    /// the [`response_timeout`](super::ConsumerGroup::response_timeout) and the second between two pings,
    /// which is 6 s by default.
    Disconnected(Option<RedisError>),
    /// The server refuses to deliver, for example since the stream, the group or a permission is gone.
    Refused(RedisError),
}

impl SubscriptionError {
    pub(super) fn of(error: RedisError) -> Self {
        match is_of_the_connection(&error) {
            true => SubscriptionError::Disconnected(Some(error)),
            false => SubscriptionError::Refused(error),
        }
    }
}

/// Returns whether the connection is lost with this error.
///
/// A timeout is one: while the connection lives, a request without a reply may be carried out at any time.
pub(super) fn is_of_the_connection(error: &RedisError) -> bool {
    error.is_io_error() || error.is_unrecoverable_error()
}

impl fmt::Display for SubscriptionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SubscriptionError::Disconnected(_) => f.write_str("the connection to redis is lost"),
            SubscriptionError::Refused(_) => f.write_str("the server refuses to deliver"),
        }?;
        write_cause(f, self)
    }
}

impl Error for SubscriptionError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            SubscriptionError::Disconnected(error) => error.as_ref().map(|error| error as _),
            SubscriptionError::Refused(error) => Some(error),
        }
    }
}

/// Error of a delivery that is not settled, or not kept alive.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum DeliveryError {
    /// This delivery was settled before, by this tag or a clone of it. Nothing was sent.
    AlreadySettled,
    /// The subscription that the delivery came from is closed or lost. Nothing was sent.
    Stale,
    /// The entry is not pending for this consumer any more: another consumer has reclaimed it, or it was
    /// acked. Nothing was changed.
    Lost,
    /// Of some entries that were acked by one command, not all were pending any more, and it is not known
    /// whether this is one of those. The others are acked.
    ///
    /// No consumer that respects the [`min_idle`](super::ConsumerGroup::min_idle) can have taken one. But
    /// somebody may have acked it by hand, or trimmed or deleted it: the next `XAUTOCLAIM` that finds such an
    /// entry removes it from the pending ones.
    SomeLost {
        /// The number of entries that were not pending.
        lost: usize,
        /// The number of entries of the command.
        of: usize,
    },
    /// The entry was trimmed or deleted from the stream, so there was nothing to settle. It is not pending
    /// any more.
    Gone,
    /// The command failed. Whether it took effect is not known, unless the tag came back.
    Command(RedisError),
}

impl fmt::Display for DeliveryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeliveryError::AlreadySettled => f.write_str("the delivery was settled before"),
            DeliveryError::Stale => f.write_str("the subscription of the delivery has ended"),
            DeliveryError::Lost => {
                f.write_str("the entry is not pending for this consumer any more")
            }
            DeliveryError::SomeLost { lost, of } => write!(
                f,
                "{lost} of {of} entries that were acked together were not pending any more"
            ),
            DeliveryError::Gone => f.write_str("the entry is deleted from its stream"),
            DeliveryError::Command(_) => f.write_str("the request to redis failed"),
        }?;
        write_cause(f, self)
    }
}

impl Error for DeliveryError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            DeliveryError::Command(error) => Some(error),
            DeliveryError::AlreadySettled
            | DeliveryError::Stale
            | DeliveryError::Lost
            | DeliveryError::SomeLost { .. }
            | DeliveryError::Gone => None,
        }
    }
}
