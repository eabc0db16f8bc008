//! [`ConnectError`] of a subscription.

use std::{error::Error, fmt};

use ::redis::{ErrorKind, RedisError};

use super::keys::in_slot_of;
use crate::broker::{addresses::write_errors, cause::write_cause};

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
    /// The server is a read-only replica.
    ReadOnly {
        /// Host and port, or the path of a socket.
        address: String,
        /// The server's error.
        error: RedisError,
    },
    /// The server is one of a cluster and does not own the hash slot of the stream, and the one that it names can't be
    /// used either.
    Moved {
        /// Host and port, or the path of a socket.
        address: String,
        /// The stream to be read.
        stream: String,
        /// Host and port of the server that owns the slot.
        owner: String,
        /// Error of the owner; `None` if it was not asked, as it had named another one before.
        error: Option<Box<ConnectError>>,
    },
    /// The server can't serve the stream at present: it loads its data, it moves the slot of the stream, its primary or
    /// its cluster is down, or it has too few replicas.
    Unavailable {
        /// Host and port, or the path of a socket.
        address: String,
        /// The stream to be read.
        stream: String,
        /// The server's error.
        error: RedisError,
    },
    /// A sentinel names no primary.
    NoPrimary {
        /// Host and port of the sentinel.
        address: String,
        /// The name of the primary.
        name: String,
        /// The server's error, if it is not a sentinel or refuses the request.
        error: Option<RedisError>,
    },
    /// A sentinel names a primary that can't be used.
    Primary {
        /// Host and port of the sentinel.
        address: String,
        /// The name of the primary.
        name: String,
        /// Error of the primary.
        error: Box<ConnectError>,
    },
    /// None of several addresses works.
    ///
    /// The message has all their errors, each with its cause.
    AllFailed {
        /// The error of each address, in the order of the tries.
        errors: Vec<ConnectError>,
    },
}

impl ConnectError {
    /// Creates it from a description of the mistake in an address.
    pub(super) fn invalid(text: &'static str) -> Self {
        ConnectError::InvalidAddress((ErrorKind::InvalidClientConfig, text).into())
    }

    /// Returns the address of the server that owns the slot, if this one does not.
    pub(super) fn owner(&self) -> Option<&str> {
        match self {
            ConnectError::Moved { owner, .. } => Some(owner),
            _ => None,
        }
    }

    /// Adds the error of the owner.
    pub(super) fn caused_by(self, cause: ConnectError) -> Self {
        match self {
            ConnectError::Moved {
                address,
                stream,
                owner,
                ..
            } => ConnectError::Moved {
                address,
                stream,
                owner,
                error: Some(Box::new(cause)),
            },
            other => other,
        }
    }

    /// Returns whether the servers fail over or move the slot, so that they may serve the stream soon.
    pub(super) fn may_pass(&self) -> bool {
        let fails_over = |error: &ConnectError| {
            let is_down = matches!(
                error,
                ConnectError::Unreachable { .. } | ConnectError::ReadOnly { .. }
            );
            is_down || error.may_pass()
        };
        match self {
            ConnectError::Unavailable { .. } => true,
            ConnectError::Moved { error, .. } => error.as_deref().is_none_or(fails_over),
            ConnectError::Primary { error, .. } => fails_over(error),
            ConnectError::AllFailed { errors } => errors.iter().any(ConnectError::may_pass),
            _ => false,
        }
    }
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
            ConnectError::ReadOnly { address, .. } => {
                write!(f, "redis at {address} is a read-only replica")
            }
            ConnectError::Moved {
                address,
                stream,
                owner,
                ..
            } => write!(
                f,
                "redis at {address} does not own the slot of \"{stream}\", {owner} does"
            ),
            ConnectError::Unavailable {
                address, stream, ..
            } => write!(f, "redis at {address} can't serve \"{stream}\" at present"),
            ConnectError::NoPrimary { address, name, .. } => write!(
                f,
                "the redis sentinel at {address} names no primary of \"{name}\""
            ),
            ConnectError::Primary { address, name, .. } => write!(
                f,
                "the primary of \"{name}\" by the redis sentinel at {address} can't be used"
            ),
            ConnectError::AllFailed { errors } => return write_errors(f, "redis", errors),
        }?;
        match self {
            // They have causes of their own.
            ConnectError::Moved {
                error: Some(error), ..
            }
            | ConnectError::Primary { error, .. }
                if f.alternate() =>
            {
                write!(f, ": {error:#}")
            }
            _ => write_cause(f, self),
        }
    }
}

impl Error for ConnectError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            ConnectError::NoTls { .. } | ConnectError::AllFailed { .. } => None,
            ConnectError::Moved { error, .. } => error.as_ref().map(|error| &**error as _),
            ConnectError::Primary { error, .. } => Some(&**error),
            ConnectError::NoPrimary { error, .. } => error.as_ref().map(|error| error as _),
            ConnectError::InvalidAddress(error)
            | ConnectError::Unreachable { error, .. }
            | ConnectError::Denied { error, .. }
            | ConnectError::Forbidden { error, .. }
            | ConnectError::OtherSlot { error, .. }
            | ConnectError::Group { error, .. }
            | ConnectError::ReadOnly { error, .. }
            | ConnectError::Unavailable { error, .. } => Some(error),
        }
    }
}
