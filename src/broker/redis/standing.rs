//! [`Standing`] of a server among others.

use std::fmt;

use ::redis::{ErrorKind, RedisError, ServerErrorKind};

/// Standing of a server that refuses a command before it does anything, since it is not the one to serve it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// It is a replica, or has just become one.
    Replica,
    /// It does not own the slot of the stream.
    Elsewhere,
    /// It may serve the stream later: in a failover, while it moves the slot, or while it loads its data.
    Busy,
}

impl Standing {
    pub(super) fn of(error: &RedisError) -> Option<Self> {
        use ServerErrorKind::{
            Ask, BusyLoading, ClusterDown, MasterDown, Moved, ReadOnly, TryAgain,
        };
        match error.kind() {
            ErrorKind::Server(ReadOnly) => Some(Standing::Replica),
            ErrorKind::Server(Moved) => Some(Standing::Elsewhere),
            ErrorKind::Server(Ask | BusyLoading | ClusterDown | MasterDown | TryAgain) => {
                Some(Standing::Busy)
            }
            // So ends a read that waits, since the server becomes a replica, or since the stream is gone: by a deletion, or
            // by the move of its slot, which the next read tells.
            _ if error.code() == Some("UNBLOCKED") => {
                let detail = error.detail().unwrap_or_default();
                match detail.contains("instance state changed") {
                    true => Some(Standing::Replica),
                    false => Some(Standing::Busy),
                }
            }
            _ if error.code() == Some("NOREPLICAS") => Some(Standing::Busy),
            _ => None,
        }
    }
}

impl fmt::Display for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Standing::Replica => "the server of redis has become a read-only replica",
            Standing::Elsewhere => "the server of redis has lost the slot of the stream",
            Standing::Busy => "the server of redis can't serve the stream at present",
        })
    }
}
