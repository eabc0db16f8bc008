//! Why there is no connection or subscription, why one ended, and why a delivery is not settled.

use std::{error::Error, fmt, time::Duration};

use lapin::ErrorKind;

use super::half_made::NoTls;

/// Why there is no connection.
///
/// The message is one line that names the server's address, and never a user or a password.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum ConnectError {
    /// The address is not one of AMQP.
    InvalidAddress {
        /// What is wrong with it.
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
        /// What the client says.
        error: lapin::Error,
    },
    /// The connection was not made in time.
    TimedOut {
        /// Host and port.
        address: String,
        /// The time that it had.
        limit: Duration,
    },
    /// The server refuses the credentials.
    Denied {
        /// Host and port.
        address: String,
        /// What the client says.
        error: lapin::Error,
    },
    /// The server lets nobody, or not this user, into the virtual host.
    NoVirtualHost {
        /// Host and port.
        address: String,
        /// The virtual host.
        vhost: String,
        /// What the client says.
        error: lapin::Error,
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

fn amqp_code(error: &lapin::Error) -> Option<u16> {
    match error.kind() {
        ErrorKind::ProtocolError(error) => Some(error.get_id()),
        _ => None,
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
            ConnectError::Unreachable { address, error } => {
                write!(f, "rabbitmq at {address} can't be reached: {error}")
            }
            ConnectError::TimedOut { address, limit } => {
                write!(f, "rabbitmq at {address} did not answer within {limit:?}")
            }
            ConnectError::Denied { address, .. } => {
                write!(f, "rabbitmq at {address} refuses the credentials")
            }
            ConnectError::NoVirtualHost { address, vhost, .. } => {
                write!(
                    f,
                    "rabbitmq at {address} gives no access to virtual host \"{vhost}\""
                )
            }
        }
    }
}

impl Error for ConnectError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            ConnectError::InvalidAddress { .. }
            | ConnectError::NoTls { .. }
            | ConnectError::TimedOut { .. } => None,
            ConnectError::Unreachable { error, .. }
            | ConnectError::Denied { error, .. }
            | ConnectError::NoVirtualHost { error, .. } => Some(error),
        }
    }
}

/// Why there is no subscription, or why it ended though nobody closed it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum SubscriptionError {
    /// A name is longer than AMQP's 255 bytes, of which the retry queues need 17.
    NameTooLong {
        /// The name.
        name: String,
    },
    /// The server cancelled the subscription: its queue was deleted, or moved to another node.
    Cancelled {
        /// The queue.
        queue: String,
    },
    /// The server closed the channel, for instance after the consumer timeout.
    ChannelClosed(lapin::Error),
    /// The connection was closed in an orderly way: by the server, say for its shutdown, or by
    /// [`Connection::close`](lapin::Connection::close).
    ConnectionClosed(lapin::Error),
    /// The connection broke.
    ConnectionLost(lapin::Error),
    /// The server did not answer in time, as for a quorum queue that has no leader.
    TimedOut {
        /// The queue.
        queue: String,
        /// The time that it had.
        limit: Duration,
    },
    /// The server refused to subscribe.
    Refused {
        /// The queue.
        queue: String,
        /// What the client says.
        error: lapin::Error,
    },
}

impl SubscriptionError {
    /// Sorts an error that ended a channel.
    pub(super) fn new(error: lapin::Error) -> Self {
        match error.kind() {
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

impl fmt::Display for SubscriptionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SubscriptionError::NameTooLong { name } => {
                write!(f, "the name \"{name}\" is too long for amqp")
            }
            SubscriptionError::Cancelled { queue } => {
                write!(f, "the server cancelled the subscription to \"{queue}\"")
            }
            SubscriptionError::ChannelClosed(error) => write!(f, "the channel was closed: {error}"),
            SubscriptionError::ConnectionClosed(error) => {
                write!(f, "the connection was closed: {error}")
            }
            SubscriptionError::ConnectionLost(error) => {
                write!(f, "the connection was lost: {error}")
            }
            SubscriptionError::TimedOut { queue, limit } => {
                write!(f, "no subscription to \"{queue}\" within {limit:?}")
            }
            SubscriptionError::Refused { queue, error } => {
                write!(f, "no subscription to \"{queue}\": {error}")
            }
        }
    }
}

impl Error for SubscriptionError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            SubscriptionError::ChannelClosed(error)
            | SubscriptionError::ConnectionClosed(error)
            | SubscriptionError::ConnectionLost(error)
            | SubscriptionError::Refused { error, .. } => Some(error),
            SubscriptionError::NameTooLong { .. }
            | SubscriptionError::Cancelled { .. }
            | SubscriptionError::TimedOut { .. } => None,
        }
    }
}

/// Why a delivery is not settled, or not kept alive.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum DeliveryError {
    /// It was settled before, or a settlement of it was tried; nothing was sent.
    AlreadySettled,
    /// Its channel is closed; it was neither answered nor republished. The server redelivers the job.
    Stale,
    /// The server has taken the job back, or is about to: it has cancelled the consumer, or the
    /// [consumer timeout](super::Queue::consumer_timeout) is over. Nothing was sent or republished.
    Lost,
    /// The client did not send the answer (lapin's `Ok(false)`): the channel closed meanwhile.
    NotSent,
    /// The client failed to send the answer, or to republish the job.
    Client(lapin::Error),
    /// The server did not confirm that it has the republished job; the original is not acked.
    NotConfirmed,
    /// No queue takes the dead letter; the original is not acked.
    Unroutable {
        /// The exchange it was published to.
        exchange: String,
        /// The routing key it was published with.
        routing_key: String,
    },
    /// The delay is longer than the 24 days that a retry queue can do; nothing was sent.
    DelayTooLong(Duration),
    /// RabbitMQ gives no more time to a delivery.
    NoKeepAlive,
}

impl fmt::Display for DeliveryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeliveryError::AlreadySettled => f.write_str("the delivery is settled already"),
            DeliveryError::Stale => f.write_str("the delivery belongs to a channel that is closed"),
            DeliveryError::Lost => f.write_str(
                "the server has taken the job back: let jobs end before its consumer timeout",
            ),
            DeliveryError::NotSent => f.write_str("the client did not send the answer"),
            DeliveryError::Client(error) => write!(f, "the answer failed: {error}"),
            DeliveryError::NotConfirmed => {
                f.write_str("the server did not confirm the republished job")
            }
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
            DeliveryError::NoKeepAlive => f.write_str("rabbitmq keeps no delivery alive"),
        }
    }
}

impl Error for DeliveryError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            DeliveryError::Client(error) => Some(error),
            _ => None,
        }
    }
}

impl From<lapin::Error> for DeliveryError {
    fn from(error: lapin::Error) -> Self {
        DeliveryError::Client(error)
    }
}
