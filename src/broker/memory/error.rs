//! [`Error`]: what an embedded broker refuses.

use std::{error, fmt};

/// Why an embedded broker did not do what it was asked to.
///
/// ```
/// use tower_sentinel::broker::memory::Error;
///
/// assert_eq!(Error::AlreadySettled.to_string(), "the delivery is settled already");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Error {
    /// The connection was refused, as [`Broker::refuse_connections`](super::Broker) asked for.
    ConnectionRefused,
    /// The connection was lost.
    ConnectionLost,
    /// The delivery was made on a channel that is closed: it was given back, and nothing is sent
    /// for it on another one.
    StaleTag,
    /// The delivery is settled already, through another clone of its tag.
    AlreadySettled,
    /// The [lease](super::QueueBuilder::lease) of the delivery is over: the job was given back.
    LeaseLost,
    /// The queue has no [lease](super::QueueBuilder::lease) that could be prolonged.
    NoLease,
    /// The settlement failed, as [`Queue::fail_settlements`](super::Queue::fail_settlements) asked
    /// for.
    Injected,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Error::ConnectionRefused => "the connection was refused",
            Error::ConnectionLost => "the connection was lost",
            Error::StaleTag => "the delivery belongs to a channel that is closed",
            Error::AlreadySettled => "the delivery is settled already",
            Error::LeaseLost => "the lease of the delivery is over",
            Error::NoLease => "the queue has no lease to prolong",
            Error::Injected => "the settlement failed on demand",
        })
    }
}

impl error::Error for Error {}
