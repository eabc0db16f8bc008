//! Errors of subscriptions and settlements.

use std::{error::Error, fmt};

use ::redis::RedisError;

use super::standing::Standing;
use crate::broker::cause::write_cause;

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
    /// The server has become a read-only replica.
    ReadOnly(RedisError),
    /// By the sentinels another server is the primary now. This one may still take settlements, and would lose them.
    Replaced {
        /// Host and port of the primary.
        primary: String,
    },
    /// The server has lost the hash slot of the stream to another server of its cluster, which the error names.
    Moved(RedisError),
    /// The server could not serve the stream for 5 s: it moves the slot of the stream to another server, its cluster is
    /// down, it has too few replicas, or it loads its data.
    Unavailable(RedisError),
    /// The server refuses to deliver, for example since the stream, the group or a permission is gone.
    Refused(RedisError),
}

impl SubscriptionError {
    pub(super) fn of(error: RedisError) -> Self {
        match Standing::of(&error) {
            Some(Standing::Replica) => SubscriptionError::ReadOnly(error),
            Some(Standing::Elsewhere) => SubscriptionError::Moved(error),
            Some(Standing::Busy) => SubscriptionError::Unavailable(error),
            None if is_of_the_connection(&error) => SubscriptionError::Disconnected(Some(error)),
            None => SubscriptionError::Refused(error),
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
            SubscriptionError::ReadOnly(_) => Standing::Replica.fmt(f),
            SubscriptionError::Replaced { primary } => {
                write!(f, "by the redis sentinels {primary} is the primary now")
            }
            SubscriptionError::Moved(_) => Standing::Elsewhere.fmt(f),
            SubscriptionError::Unavailable(_) => Standing::Busy.fmt(f),
            SubscriptionError::Refused(_) => f.write_str("the server refuses to deliver"),
        }?;
        write_cause(f, self)
    }
}

impl Error for SubscriptionError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            SubscriptionError::Disconnected(error) => error.as_ref().map(|error| error as _),
            SubscriptionError::Replaced { .. } => None,
            SubscriptionError::ReadOnly(error)
            | SubscriptionError::Moved(error)
            | SubscriptionError::Unavailable(error)
            | SubscriptionError::Refused(error) => Some(error),
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
    /// The delivery is settled, and fewer replicas have confirmed it in time than
    /// [`wait_replicas`](super::ConsumerGroup::wait_replicas) asks for.
    ///
    /// If one that lacks it becomes the primary, the job may run once more.
    NotReplicated {
        /// The number of replicas that have confirmed it.
        confirmed: usize,
        /// The number that was asked for.
        wanted: usize,
    },
    /// The server has become a read-only replica. Nothing was done.
    ReadOnly(RedisError),
    /// The server has lost the hash slot of the stream to another server of its cluster, which the error names. Nothing
    /// was done.
    Moved(RedisError),
    /// The server can't serve the stream at present: it moves the slot of the stream to another server, its cluster is
    /// down, it has too few replicas, or it loads its data. Nothing was done.
    Unavailable(RedisError),
    /// The command failed. Whether it took effect is not known, unless the tag came back.
    Command(RedisError),
}

impl DeliveryError {
    pub(super) fn of(error: RedisError) -> Self {
        match Standing::of(&error) {
            Some(Standing::Replica) => DeliveryError::ReadOnly(error),
            Some(Standing::Elsewhere) => DeliveryError::Moved(error),
            Some(Standing::Busy) => DeliveryError::Unavailable(error),
            None => DeliveryError::Command(error),
        }
    }
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
            DeliveryError::NotReplicated { confirmed, wanted } => write!(
                f,
                "the settlement is on {confirmed} replicas in time, and not on {wanted}"
            ),
            DeliveryError::ReadOnly(_) => Standing::Replica.fmt(f),
            DeliveryError::Moved(_) => Standing::Elsewhere.fmt(f),
            DeliveryError::Unavailable(_) => Standing::Busy.fmt(f),
            DeliveryError::Command(_) => f.write_str("the request to redis failed"),
        }?;
        write_cause(f, self)
    }
}

impl Error for DeliveryError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            DeliveryError::ReadOnly(error)
            | DeliveryError::Moved(error)
            | DeliveryError::Unavailable(error)
            | DeliveryError::Command(error) => Some(error),
            DeliveryError::AlreadySettled
            | DeliveryError::Stale
            | DeliveryError::Lost
            | DeliveryError::SomeLost { .. }
            | DeliveryError::Gone
            | DeliveryError::NotReplicated { .. } => None,
        }
    }
}
