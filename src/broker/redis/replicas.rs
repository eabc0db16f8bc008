//! [`Replicas`] that have to confirm settlements.

use std::sync::atomic::{AtomicU64, Ordering};

use ::redis::{RedisError, aio::MultiplexedConnection, cmd};
use tokio::sync::Mutex;

use super::reply::Reply;

/// Replicas that have to confirm settlements, by `WAIT` on the connection of the settlements.
///
/// One `WAIT` covers all that was written on its connection before, and the connection serves nothing else until it
/// returns. So there is one at a time, and all settlements that come meanwhile share the next.
pub(super) struct Replicas {
    wanted: usize,
    /// Limit of a wait, in milliseconds.
    limit: u64,
    /// The number of settlements that ask.
    asked: AtomicU64,
    last: Mutex<Last>,
}

/// The last `WAIT`.
struct Last {
    /// The number of settlements that it covers.
    covers: u64,
    confirmed: usize,
}

impl Replicas {
    pub(super) fn new(wanted: usize, limit: u64) -> Self {
        Self {
            wanted,
            limit,
            asked: AtomicU64::new(0),
            last: Mutex::new(Last {
                covers: 0,
                confirmed: 0,
            }),
        }
    }

    /// Waits for the replicas after a settlement whose reply has come.
    pub(super) async fn confirm(&self, connection: &MultiplexedConnection) -> Reply {
        let number = self.asked.fetch_add(1, Ordering::AcqRel) + 1;
        let mut last = self.last.lock().await;
        if last.covers < number {
            // Those that have come by now have been written.
            let covers = self.asked.load(Ordering::Acquire);
            let mut wait = cmd("WAIT");
            wait.arg(self.wanted).arg(self.limit);
            let reply: Result<usize, RedisError> = wait.query_async(&mut connection.clone()).await;
            // Nobody has confirmed it to a connection that is lost, or to a server that has become a replica.
            let confirmed = reply.unwrap_or(0);
            *last = Last { covers, confirmed };
        }
        match last.confirmed >= self.wanted {
            true => Reply::Settled,
            false => Reply::NotReplicated {
                confirmed: last.confirmed,
                wanted: self.wanted,
            },
        }
    }
}
