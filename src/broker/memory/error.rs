//! Why there is no subscription, why it ended, and why a delivery is not settled.

use std::{error::Error, fmt};

/// Why there is no subscription.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ConnectError {
    /// The connection was refused, as
    /// [`Broker::refuse_connections`](super::Broker::refuse_connections) asked for.
    Refused,
    /// The connection that was to be used is lost.
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

/// Why a subscription ended though nobody closed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SubscriptionError {
    /// Its connection is lost.
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

/// Why a delivery is not settled, or not kept.
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
    /// The channel that the delivery came from is closed or lost; the job went back to its queue.
    Stale,
    /// The [lease](super::QueueBuilder::lease) of the delivery is over; the job went back to its
    /// queue.
    LeaseLost,
    /// The queue has no [lease](super::QueueBuilder::lease) that could be prolonged.
    NoLease,
    /// The settlement failed, as [`Queue::fail_settlements`](super::Queue::fail_settlements) asked
    /// for.
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
