//! Why there is no connection or subscription, why one ended, and why a delivery is not settled.

use std::{error::Error, fmt, sync::Arc, time::Duration};

use async_nats::{
    client::{RequestError, SubscribeError},
    jetstream::{
        ErrorCode,
        context::{ConsumerInfoError, ConsumerInfoErrorKind, GetStreamByNameError, PublishError},
        stream::{ConsumerError, ConsumerErrorKind},
    },
};

/// Why there is no connection.
///
/// The message is one line that names the server's address, and never a user or a password.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum ConnectError {
    /// The address is not one of NATS.
    InvalidAddress(Arc<std::io::Error>),
    /// The server can't be reached, or does not answer.
    Unreachable {
        /// Host and port.
        address: String,
        /// What the client says.
        error: Arc<async_nats::ConnectError>,
    },
    /// The server refuses the credentials.
    Denied {
        /// Host and port.
        address: String,
        /// What the client says.
        error: Arc<async_nats::ConnectError>,
    },
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ConnectError::InvalidAddress(error) => {
                write!(f, "the address of the nats server is not valid: {error}")
            }
            ConnectError::Unreachable { address, error } => {
                write!(f, "nats at {address} can't be reached: {error}")
            }
            ConnectError::Denied { address, error } => {
                write!(f, "nats at {address} refuses the credentials: {error}")
            }
        }
    }
}

impl Error for ConnectError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            ConnectError::InvalidAddress(error) => Some(error),
            ConnectError::Unreachable { error, .. } | ConnectError::Denied { error, .. } => {
                Some(error)
            }
        }
    }
}

/// Why there is no subscription, or why it ended though nobody closed it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum SubscriptionError {
    /// The consumer's ack policy is not *explicit*, so its deliveries can't be answered one by one.
    NotExplicit,
    /// No stream keeps what is published to the subject of the dead letters.
    NoDeadLetterStream {
        /// The subject.
        subject: String,
        /// What the client says.
        error: Arc<GetStreamByNameError>,
    },
    /// The client was drained, or gave up reconnecting.
    ClientClosed,
    /// The consumer does not exist.
    ConsumerDeleted,
    /// The stream does not exist.
    StreamDeleted,
    /// Nothing was heard of JetStream for longer than [`Pull::reconnect_limit`](super::Pull::reconnect_limit).
    Unreachable {
        /// How long.
        silence: Duration,
    },
    /// The server refuses to deliver, for instance as the prefetch is above the consumer's
    /// `max_batch`.
    Refused {
        /// What the server says.
        description: String,
    },
    /// The server pushes the consumer's messages; [`Pull`](super::Pull) reads pull consumers.
    NotPull,
    /// The consumer can't be asked for.
    Consumer(Arc<ConsumerError>),
    /// The client can't subscribe.
    Subscribe(Arc<SubscribeError>),
}

impl SubscriptionError {
    /// Returns why there is no consumer to subscribe to.
    pub(super) fn no_consumer(error: ConsumerError) -> Self {
        match error.kind() {
            ConsumerErrorKind::InvalidConsumerType => Some(Self::NotPull),
            ConsumerErrorKind::JetStream(error) => Self::by_code(error.error_code()),
            _ => None,
        }
        .unwrap_or_else(|| Self::Consumer(Arc::new(error)))
    }

    /// Returns what is deleted, if that is why the consumer does not tell its state.
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
            SubscriptionError::NoDeadLetterStream { subject, error } => {
                write!(
                    f,
                    "no stream keeps the dead letters of \"{subject}\": {error}"
                )
            }
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
            SubscriptionError::Subscribe(error) => write!(f, "the client can't subscribe: {error}"),
        }
    }
}

impl Error for SubscriptionError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            SubscriptionError::NoDeadLetterStream { error, .. } => Some(error),
            SubscriptionError::Consumer(error) => Some(error),
            SubscriptionError::Subscribe(error) => Some(error),
            SubscriptionError::NotExplicit
            | SubscriptionError::NotPull
            | SubscriptionError::ClientClosed
            | SubscriptionError::ConsumerDeleted
            | SubscriptionError::StreamDeleted
            | SubscriptionError::Unreachable { .. }
            | SubscriptionError::Refused { .. } => None,
        }
    }
}

/// Why a delivery is not settled, or not kept alive.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum DeliveryError {
    /// It was settled before; nothing was sent.
    AlreadySettled,
    /// Its subscription was closed, or ended; nothing was sent.
    Stale,
    /// The ack wait passed, so JetStream gives the job to somebody else; nothing was sent.
    LeaseLost,
    /// There was no connection for the whole time limit; nothing was sent.
    Disconnected {
        /// The limit.
        limit: Duration,
    },
    /// The server did not confirm it in time: it may have it or not.
    Unconfirmed {
        /// The limit.
        limit: Duration,
    },
    /// Nobody listens for the answer: the consumer is deleted, or JetStream is starting.
    NoConsumer,
    /// The dead letter is not kept; the job was not rejected.
    DeadLetter(Arc<PublishError>),
    /// The client can't send it.
    Request(Arc<RequestError>),
}

impl fmt::Display for DeliveryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeliveryError::AlreadySettled => f.write_str("the delivery was settled before"),
            DeliveryError::Stale => f.write_str("the subscription of the delivery has ended"),
            DeliveryError::LeaseLost => f.write_str("the ack wait of the delivery has passed"),
            DeliveryError::Disconnected { limit } => {
                write!(f, "there was no connection for {limit:?}")
            }
            DeliveryError::Unconfirmed { limit } => {
                write!(f, "the server did not confirm within {limit:?}")
            }
            DeliveryError::NoConsumer => f.write_str("no consumer takes the answer"),
            DeliveryError::DeadLetter(error) => write!(f, "the dead letter is not kept: {error}"),
            DeliveryError::Request(error) => write!(f, "the answer can't be sent: {error}"),
        }
    }
}

impl Error for DeliveryError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            DeliveryError::DeadLetter(error) => Some(error),
            DeliveryError::Request(error) => Some(error),
            DeliveryError::AlreadySettled
            | DeliveryError::Stale
            | DeliveryError::LeaseLost
            | DeliveryError::Disconnected { .. }
            | DeliveryError::Unconfirmed { .. }
            | DeliveryError::NoConsumer => None,
        }
    }
}
