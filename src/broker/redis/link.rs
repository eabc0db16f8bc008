//! [`Link`] to the server: the connection for settlements, with its keys and its places.

use std::{
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use ::redis::{Cmd, FromRedisValue, RedisError, ScriptInvocation, aio::MultiplexedConnection};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::{
    error::{SubscriptionError, is_of_the_connection},
    keys::Keys,
    probe::Newer,
    replicas::Replicas,
    reply::{DeliveryId, Reply},
    standing::Standing,
};

/// A subscription's link to the server: its connection, its keys and its places.
pub(super) struct Link {
    pub(super) connection: MultiplexedConnection,
    pub(super) keys: Keys,
    pub(super) group: String,
    pub(super) consumer: String,
    pub(super) newer: Newer,
    pub(super) delete_settled: bool,
    pub(super) min_idle: Duration,
    /// Time after the request for an entry in which nobody else can take it before an ack gets its reply.
    pub(super) lease: Duration,
    /// One permit for each delivery that may still be read. Only the reader takes permits.
    pub(super) free: Semaphore,
    /// Replicas that have to confirm a settlement.
    pub(super) replicas: Option<Replicas>,
    /// Cancelled when a connection of the subscription is lost, or its server can't serve the stream any more.
    pub(super) lost: CancellationToken,
    /// The reason then, if there is one.
    pub(super) cause: OnceLock<SubscriptionError>,
    pub(super) closed: AtomicBool,
}

impl Link {
    pub(super) fn is_stale(&self) -> bool {
        self.closed.load(Ordering::Acquire) || self.lost.is_cancelled()
    }

    /// Returns the error with which a lost subscription ends.
    pub(super) fn loss(&self) -> SubscriptionError {
        let cause = self.cause.get().cloned();
        cause.unwrap_or(SubscriptionError::Disconnected(None))
    }

    /// Returns the command by which scripts delete settled entries, or an empty text if they don't.
    pub(super) fn delete_command(&self) -> &'static str {
        match (self.delete_settled, self.newer.ack_delete) {
            (false, _) => "",
            (true, false) => "XDEL",
            (true, true) => "XACKDEL",
        }
    }

    /// Runs a script that settles a delivery, and frees its place.
    pub(super) async fn answer(&self, script: &ScriptInvocation<'_>) -> Result<Reply, RedisError> {
        let reply = self.invoke(script).await?;
        self.free.add_permits(1);
        Ok(self.replicated(reply).await)
    }

    /// Waits until the replicas have a settlement, if that is wanted.
    pub(super) async fn replicated(&self, reply: Reply) -> Reply {
        match (&self.replicas, reply) {
            (Some(replicas), Reply::Settled) => replicas.confirm(&self.connection).await,
            _ => reply,
        }
    }

    /// Adds the keys and arguments that `owned.lua` reads.
    pub(super) fn owned<'a, 's>(
        &self,
        script: &'a mut ScriptInvocation<'s>,
        id: &DeliveryId,
    ) -> &'a mut ScriptInvocation<'s> {
        script.key(&self.keys.stream).key(&self.keys.delayed);
        if let Some(dead) = &self.keys.dead {
            script.key(dead);
        }
        script
            .arg(&self.group)
            .arg(&self.consumer)
            .arg(&id.entry)
            .arg(id.count)
    }

    pub(super) async fn invoke<T: FromRedisValue>(
        &self,
        script: &ScriptInvocation<'_>,
    ) -> Result<T, RedisError> {
        let reply = script.invoke_async(&mut self.connection.clone()).await;
        reply.inspect_err(|error| self.heed(error))
    }

    pub(super) async fn query<T: FromRedisValue>(&self, command: &Cmd) -> Result<T, RedisError> {
        let reply = command.query_async(&mut self.connection.clone()).await;
        reply.inspect_err(|error| self.heed(error))
    }

    /// Ends the subscription after an error that all later commands would meet.
    fn heed(&self, error: &RedisError) {
        let is_elsewhere = matches!(
            Standing::of(error),
            Some(Standing::Replica | Standing::Elsewhere)
        );
        if is_elsewhere || is_of_the_connection(error) {
            self.lose(SubscriptionError::of(error.clone()));
        }
    }

    /// Ends the subscription.
    pub(super) fn lose(&self, cause: SubscriptionError) {
        // The first one is the cause.
        drop(self.cause.set(cause));
        self.lost.cancel();
    }
}

/// Returns whole milliseconds, rounded up, so that no entry is seen before its time.
pub(super) fn millis(delay: Duration) -> u64 {
    // The range in which a score, a double, counts whole milliseconds.
    const FAR: u128 = 1 << 52;
    let millis = delay.as_nanos().div_ceil(1_000_000).min(FAR);
    u64::try_from(millis).unwrap_or(1 << 52)
}
