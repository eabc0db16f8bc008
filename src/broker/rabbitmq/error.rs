//! Errors of connections and subscriptions.

use std::{error::Error, fmt, time::Duration};

use lapin::ErrorKind;

use super::half_made::NoTls;
use crate::broker::{addresses::write_errors, cause::write_cause};

/// Error of a connection that can't be made.
///
/// The message is one line that names the server's address, and never a password. With `{:#}` it includes the
/// cause.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum ConnectError {
    /// The address is not valid for AMQP.
    InvalidAddress {
        /// The mistake in it.
        reason: String,
    },
    /// The address asks for TLS, and this crate is built without it; nothing was sent.
    NoTls {
        /// Host and port.
        address: String,
    },
    /// The server can't be reached, or does not speak AMQP 0-9-1.
    Unreachable {
        /// Host and port.
        address: String,
        /// The client's error.
        error: lapin::Error,
    },
    /// The connection was not made in time.
    TimedOut {
        /// Host and port.
        address: String,
        /// The time limit.
        limit: Duration,
    },
    /// The server refuses the credentials.
    Denied {
        /// Host and port.
        address: String,
        /// The client's error.
        error: lapin::Error,
    },
    /// The server does not open the virtual host: there is none of this name, the user has no access to it,
    /// or a limit of connections is reached.
    NoVirtualHost {
        /// Host and port.
        address: String,
        /// The virtual host.
        vhost: String,
        /// The client's error.
        error: lapin::Error,
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
    pub(super) fn new(address: String, vhost: String, error: lapin::Error) -> Self {
        if has_no_tls(&error) {
            return ConnectError::NoTls { address };
        }
        match amqp_code(&error) {
            // ACCESS_REFUSED
            Some(403) => ConnectError::Denied { address, error },
            // NOT_ALLOWED
            Some(530) => ConnectError::NoVirtualHost {
                address,
                vhost,
                error,
            },
            _ => ConnectError::Unreachable { address, error },
        }
    }
}

fn has_no_tls(error: &lapin::Error) -> bool {
    match error.kind() {
        ErrorKind::IOError(error) => error.get_ref().is_some_and(|error| error.is::<NoTls>()),
        _ => false,
    }
}

pub(super) fn amqp_code(error: &lapin::Error) -> Option<u16> {
    match error.kind() {
        ErrorKind::ProtocolError(error) => Some(error.get_id()),
        _ => None,
    }
}

/// Returns the server's own text.
pub(super) fn server_text(error: &lapin::Error) -> String {
    match error.kind() {
        ErrorKind::ProtocolError(error) => error.get_message().to_string(),
        _ => error.to_string(),
    }
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ConnectError::InvalidAddress { reason } => {
                write!(
                    f,
                    "the address of the rabbitmq server is not valid: {reason}"
                )
            }
            ConnectError::NoTls { address } => write!(
                f,
                "no tls to rabbitmq at {address}: \
                 turn on the feature `rustls` or `native-tls` of tower-sentinel"
            ),
            ConnectError::Unreachable { address, .. } => {
                write!(f, "rabbitmq at {address} can't be reached")
            }
            ConnectError::TimedOut { address, limit } => {
                write!(f, "rabbitmq at {address} did not respond within {limit:?}")
            }
            ConnectError::Denied { address, .. } => {
                write!(f, "rabbitmq at {address} refuses the credentials")
            }
            ConnectError::NoVirtualHost { address, vhost, .. } => write!(
                f,
                "rabbitmq at {address} does not open virtual host \"{vhost}\""
            ),
            ConnectError::AllFailed { errors } => write_errors(f, "rabbitmq", errors),
        }?;
        write_cause(f, self)
    }
}

impl Error for ConnectError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            ConnectError::InvalidAddress { .. }
            | ConnectError::NoTls { .. }
            | ConnectError::TimedOut { .. }
            | ConnectError::AllFailed { .. } => None,
            ConnectError::Unreachable { error, .. }
            | ConnectError::Denied { error, .. }
            | ConnectError::NoVirtualHost { error, .. } => Some(error),
        }
    }
}

/// Error of a subscription that can't be made, or that ended without being closed from this side.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum SubscriptionError {
    /// A name is longer than AMQP's 255 bytes, of which the retry queues need 24.
    NameTooLong {
        /// The name.
        name: String,
    },
    /// The server cancelled the subscription: its queue was deleted, or moved to another node.
    Cancelled {
        /// The queue.
        queue: String,
    },
    /// The server closed the channel, for example after the consumer timeout.
    ChannelClosed(lapin::Error),
    /// The connection was closed in an orderly way: by the server, for example for its shutdown, or by
    /// [`Connection::close`](lapin::Connection::close).
    ConnectionClosed(lapin::Error),
    /// The connection broke.
    ConnectionLost(lapin::Error),
    /// The client can't read a message: it has a property or the name of a header that is not UTF-8, or
    /// headers that are longer than the connection's `frame_max`.
    ///
    /// The client closes the connection, and the message goes back to the head of its queue. So it stops each
    /// worker: nothing is delivered before somebody takes it out. If the connection has several
    /// subscriptions, each of them ends with this error, and the message may be in any of their queues.
    Unreadable {
        /// The queue.
        queue: String,
        /// The client's error.
        error: lapin::Error,
    },
    /// There is no connection for [publishing](super::Connection).
    NoPublisher {
        /// The queue.
        queue: String,
        /// The reason.
        error: Box<ConnectError>,
    },
    /// A [dead letter](super::Queue::dead_letter) or a [retry](super::Queue::retry_queue) would have no queue
    /// or exchange to go to.
    NoTarget {
        /// The queue of the jobs.
        queue: String,
        /// The queue or the exchange that does not exist.
        target: String,
        /// The client's error.
        error: Box<lapin::Error>,
    },
    /// The queue is a classic one, and should be read as a [quorum queue](super::Queue::quorum).
    NotQuorum {
        /// The queue.
        queue: String,
    },
    /// A queue can't be declared: the user does not have the right, or the queue exists with other arguments.
    Undeclared {
        /// The queue.
        queue: String,
        /// The client's error.
        error: lapin::Error,
    },
    /// The server did not respond in time. A quorum queue without a leader is one reason.
    TimedOut {
        /// The queue.
        queue: String,
        /// The time limit.
        limit: Duration,
    },
    /// The server refused to subscribe.
    Refused {
        /// The queue.
        queue: String,
        /// The client's error.
        error: lapin::Error,
    },
}

impl SubscriptionError {
    /// Creates the error for the error that ended a channel.
    pub(super) fn new(queue: &str, error: lapin::Error) -> Self {
        match error.kind() {
            _ if is_unreadable(&error) => SubscriptionError::Unreadable {
                queue: queue.to_owned(),
                error,
            },
            ErrorKind::ProtocolError(_) if error.is_amqp_soft_error() => {
                SubscriptionError::ChannelClosed(error)
            }
            ErrorKind::ProtocolError(_) | ErrorKind::InvalidConnectionState(_) => {
                SubscriptionError::ConnectionClosed(error)
            }
            ErrorKind::InvalidChannelState(..) | ErrorKind::InvalidChannel(_) => {
                SubscriptionError::ChannelClosed(error)
            }
            _ => SubscriptionError::ConnectionLost(error),
        }
    }
}

/// Returns whether the client has closed the connection since it can't read a frame.
fn is_unreadable(error: &lapin::Error) -> bool {
    match error.kind() {
        ErrorKind::ParsingError(_) => true,
        // This text is lapin's; the server's differs.
        ErrorKind::ProtocolError(error) => {
            error.get_id() == 501 && error.get_message().as_str().starts_with("frame too large")
        }
        _ => false,
    }
}

impl fmt::Display for SubscriptionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SubscriptionError::NameTooLong { name } => {
                write!(f, "the name \"{name}\" is too long for amqp")
            }
            SubscriptionError::Cancelled { queue } => {
                write!(f, "the server cancelled the subscription to \"{queue}\"")
            }
            SubscriptionError::ChannelClosed(_) => f.write_str("the channel is closed"),
            SubscriptionError::ConnectionClosed(_) => {
                f.write_str("the connection to rabbitmq is closed")
            }
            SubscriptionError::ConnectionLost(_) => {
                f.write_str("the connection to rabbitmq is lost")
            }
            SubscriptionError::Unreadable { queue, .. } => {
                write!(
                    f,
                    "the client can't read a message of \"{queue}\", which stays at its head: take it out"
                )
            }
            SubscriptionError::NoPublisher { queue, .. } => {
                write!(f, "no connection to republish jobs of \"{queue}\"")
            }
            SubscriptionError::NoTarget { queue, target, .. } => {
                write!(
                    f,
                    "jobs of \"{queue}\" can't be republished: there is no {target}"
                )
            }
            SubscriptionError::NotQuorum { queue } => {
                write!(
                    f,
                    "\"{queue}\" is a classic queue: read it with `Queue::classic`, \
                     or declare it with `x-queue-type: quorum`"
                )
            }
            SubscriptionError::Undeclared { queue, .. } => {
                write!(
                    f,
                    "\"{queue}\" can't be declared: declare it yourself, or as it is"
                )
            }
            SubscriptionError::TimedOut { queue, limit } => {
                write!(f, "no subscription to \"{queue}\" within {limit:?}")
            }
            SubscriptionError::Refused { queue, .. } => {
                write!(f, "the server refuses to subscribe to \"{queue}\"")
            }
        }?;
        write_cause(f, self)
    }
}

impl Error for SubscriptionError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            SubscriptionError::ChannelClosed(error)
            | SubscriptionError::ConnectionClosed(error)
            | SubscriptionError::ConnectionLost(error)
            | SubscriptionError::Unreadable { error, .. }
            | SubscriptionError::Undeclared { error, .. }
            | SubscriptionError::Refused { error, .. } => Some(error),
            SubscriptionError::NoPublisher { error, .. } => Some(&**error),
            SubscriptionError::NoTarget { error, .. } => Some(&**error),
            SubscriptionError::NameTooLong { .. }
            | SubscriptionError::Cancelled { .. }
            | SubscriptionError::NotQuorum { .. }
            | SubscriptionError::TimedOut { .. } => None,
        }
    }
}

pub(super) fn queue_named(queue: &str) -> String {
    format!("queue \"{queue}\"")
}

pub(super) fn exchange_named(exchange: &str) -> String {
    match exchange {
        "" => "the default exchange".to_owned(),
        exchange => format!("exchange \"{exchange}\""),
    }
}
