//! Errors of connections, and of a connector.

use std::{error::Error, fmt, sync::Arc};

use async_nats::jetstream::{context::CreateStreamError, stream::ConsumerError};

use super::error::SubscriptionError;
use crate::broker::{addresses::write_errors, cause::write_cause};

/// Error of a connection that can't be made.
///
/// The message is one line that names the server's address, and never a user or a password. With `{:#}` it
/// includes the cause.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum ConnectError {
    /// The address is not valid for NATS.
    InvalidAddress(Arc<std::io::Error>),
    /// The address asks for a WebSocket, and this crate is built without them; nothing was sent.
    NoWebSockets {
        /// Host and port.
        address: String,
    },
    /// The server can't be reached, or does not respond.
    Unreachable {
        /// Host and port.
        address: String,
        /// The client's error.
        error: Arc<async_nats::ConnectError>,
    },
    /// The server refuses the credentials.
    Denied {
        /// Host and port.
        address: String,
        /// The client's error.
        error: Arc<async_nats::ConnectError>,
    },
    /// Two of several addresses have different credentials. A client has one user for all servers.
    DifferentCredentials,
    /// None of several addresses works.
    ///
    /// The message has all their errors, each with its cause.
    AllFailed {
        /// The error of each address, in the order of the tries.
        errors: Vec<ConnectError>,
    },
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ConnectError::InvalidAddress(_) => {
                f.write_str("the address of the nats server is not valid")
            }
            ConnectError::NoWebSockets { address } => write!(
                f,
                "no websocket to nats at {address}: \
                 turn on the feature `websockets` of tower-sentinel"
            ),
            ConnectError::Unreachable { address, .. } => {
                write!(f, "nats at {address} can't be reached")
            }
            ConnectError::Denied { address, .. } => {
                write!(f, "nats at {address} refuses the credentials")
            }
            ConnectError::DifferentCredentials => f.write_str(
                "the addresses of nats have different credentials: give all the same, or an auth callback",
            ),
            ConnectError::AllFailed { errors } => write_errors(f, "nats", errors),
        }?;
        write_cause(f, self)
    }
}

impl Error for ConnectError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            ConnectError::NoWebSockets { .. }
            | ConnectError::DifferentCredentials
            | ConnectError::AllFailed { .. } => None,
            ConnectError::InvalidAddress(error) => Some(error),
            ConnectError::Unreachable { error, .. } | ConnectError::Denied { error, .. } => {
                Some(error)
            }
        }
    }
}

/// Error of a [`Connector`](super::Connector): an attempt of a reconnecting consumer that failed.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum ConnectorError {
    /// No server can be connected to.
    Connect(ConnectError),
    /// A stream can't be created.
    Stream {
        /// Its name.
        name: String,
        /// The client's error; `None` if JetStream did not respond.
        error: Option<Arc<CreateStreamError>>,
    },
    /// The consumer can't be created.
    Consumer {
        /// Its name.
        name: String,
        /// The client's error; `None` if JetStream did not respond.
        error: Option<Arc<ConsumerError>>,
    },
    /// The consumer can't be subscribed to.
    Subscribe(SubscriptionError),
}

/// The message of a connection or a subscription is that of its own error.
impl fmt::Display for ConnectorError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_silent = match self {
            ConnectorError::Connect(error) => return error.fmt(f),
            ConnectorError::Subscribe(error) => return error.fmt(f),
            ConnectorError::Stream { name, error } => {
                write!(f, "stream \"{name}\" can't be created")?;
                error.is_none()
            }
            ConnectorError::Consumer { name, error } => {
                write!(f, "consumer \"{name}\" can't be created")?;
                error.is_none()
            }
        };
        if is_silent {
            f.write_str(", as jetstream does not respond")?;
        }
        write_cause(f, self)
    }
}

impl Error for ConnectorError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            ConnectorError::Connect(error) => error.source(),
            ConnectorError::Subscribe(error) => error.source(),
            ConnectorError::Stream { error, .. } => error.as_ref().map(|error| error as _),
            ConnectorError::Consumer { error, .. } => error.as_ref().map(|error| error as _),
        }
    }
}
