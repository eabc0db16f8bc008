//! Errors of connections, subscriptions and settlements.

use std::{error::Error, fmt};

/// Error of a connection or a subscription that could not be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ConnectError {
    /// The connection was refused on demand of
    /// [`Broker::refuse_connections`](super::Broker::refuse_connections).
    Refused,
    /// The connection to subscribe over is lost.
    Disconnected,
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ConnectError::Refused => "the connection was refused",
            ConnectError::Disconnected => "the connection is lost",
        })
    }
}

impl Error for ConnectError {}

/// Error of a subscription that ended although nobody closed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SubscriptionError {
    /// The connection of the subscription is lost.
    Disconnected,
}

impl fmt::Display for SubscriptionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SubscriptionError::Disconnected => "the connection is lost",
        })
    }
}

impl Error for SubscriptionError {}

/// Error of a settlement or a keep-alive.
///
/// ```
/// use tower_sentinel::broker::memory::DeliveryError;
///
/// assert_eq!(DeliveryError::AlreadySettled.to_string(), "the delivery was settled before");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DeliveryError {
    /// The delivery was settled before, by this tag or a clone of it.
    AlreadySettled,
    /// The channel of the delivery is closed or lost; the job went back to its queue.
    Stale,
    /// The [lease](super::QueueBuilder::lease) of the delivery is over; the job went back to its
    /// queue.
    LeaseLost,
    /// The queue has no [lease](super::QueueBuilder::lease) to prolong.
    NoLease,
    /// The settlement failed on demand of [`Queue::fail_settlements`](super::Queue::fail_settlements).
    Injected,
}

impl fmt::Display for DeliveryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DeliveryError::AlreadySettled => "the delivery was settled before",
            DeliveryError::Stale => "the channel of the delivery is closed",
            DeliveryError::LeaseLost => "the lease of the delivery is over",
            DeliveryError::NoLease => "the queue has no lease to prolong",
            DeliveryError::Injected => "the settlement failed on demand",
        })
    }
}

impl Error for DeliveryError {}
