//! [`DeliveryError`], the error of a settlement.

use std::{error::Error, fmt, sync::Arc, time::Duration};

use async_nats::{client::RequestError, jetstream::context::PublishError};

use crate::broker::cause::write_cause;

/// Error of a delivery that is not settled, or not kept alive.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum DeliveryError {
    /// It was settled before; nothing was sent.
    AlreadySettled,
    /// Its subscription was closed, or ended; nothing was sent.
    Stale,
    /// The ack wait is over, so JetStream gives the job to another worker; nothing was sent.
    LeaseLost,
    /// There was no connection for the whole time limit; nothing was sent.
    Disconnected {
        /// The limit.
        limit: Duration,
    },
    /// The server did not confirm it in time. It may have received it or not.
    Unconfirmed {
        /// The limit.
        limit: Duration,
    },
    /// Nobody receives the settlement: the consumer is deleted, or was without a leader for the whole time
    /// limit.
    NoConsumer,
    /// No stream stores the dead letter; the job was not rejected.
    DeadLetter(Arc<PublishError>),
    /// No stream stores the schedule of the retry; the job was not given back. The next try does so by a NAK.
    Schedule(Arc<PublishError>),
    /// The client can't send the settlement.
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
            DeliveryError::NoConsumer => f.write_str("no consumer takes the settlement"),
            DeliveryError::DeadLetter(_) => f.write_str("the dead letter is not kept"),
            DeliveryError::Schedule(_) => f.write_str("the schedule of the retry is not kept"),
            DeliveryError::Request(_) => f.write_str("the request to nats failed"),
        }?;
        write_cause(f, self)
    }
}

impl Error for DeliveryError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            DeliveryError::DeadLetter(error) | DeliveryError::Schedule(error) => Some(error),
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
