//! What the deliveries of one subscription share: the connection that they are settled on.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use ::redis::{
    Cmd, ErrorKind, FromRedisValue, ParsingError, RedisError, ScriptInvocation, ServerErrorKind,
    Value, aio::MultiplexedConnection,
};
use tokio::{sync::Semaphore, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{
    DeliveryError, acks::Acks, error::is_of_the_connection, keys::Keys, probe::Newer, scripts,
};
use crate::settle::{Lease, Reason, Verdict};

/// The settling side of a subscription.
pub(super) struct Channel {
    pub(super) connection: MultiplexedConnection,
    pub(super) keys: Keys,
    pub(super) group: String,
    pub(super) consumer: String,
    pub(super) newer: Newer,
    pub(super) delete_settled: bool,
    pub(super) min_idle: Duration,
    /// How long after an entry was asked for nobody else can take it before an ack is answered.
    pub(super) lease: Duration,
    pub(super) acks: Acks,
    /// One permit for each delivery that may still be read. Only the reader takes permits.
    pub(super) free: Semaphore,
    /// Cancelled when a connection of the subscription is lost.
    pub(super) lost: CancellationToken,
    pub(super) closed: AtomicBool,
}

/// Which delivery of which entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DeliveryId {
    pub(super) entry: String,
    /// As the server counts, which may be more than anybody can.
    pub(super) count: i64,
    /// When the server was asked for it, which is before it was delivered.
    pub(super) asked_at: Instant,
}

impl DeliveryId {
    pub(super) fn deliveries(&self) -> u32 {
        // The server's count wraps around after that of an entry that somebody gave up for good.
        u32::try_from(self.count).unwrap_or(u32::MAX)
    }
}

/// Whether the entry was found as it should be.
#[derive(Clone, Copy)]
pub(super) enum Reply {
    Settled,
    Lost,
    SomeLost { lost: usize, of: usize },
    Gone,
}

/// A settlement that failed, and what is left to do.
pub(super) struct Failed {
    pub(super) error: DeliveryError,
    pub(super) left: Left,
}

#[derive(Clone, Copy)]
pub(super) enum Left {
    /// Nothing was done, so it may be tried again.
    Again,
    /// Nothing: the entry is not pending for this delivery, whose place is free.
    Nothing,
    /// To give up the channel: what was done is not known.
    Channel,
}

impl Channel {
    pub(super) fn is_stale(&self) -> bool {
        self.closed.load(Ordering::Acquire) || self.lost.is_cancelled()
    }

    /// Carries `verdict` out and frees the delivery's place.
    ///
    /// An early ack asks whose the entry is only if it is known to be lost.
    pub(super) async fn settle(
        self: &Arc<Self>,
        id: &DeliveryId,
        is_lost: bool,
        fields: &[(Vec<u8>, Vec<u8>)],
        verdict: Verdict,
        reason: Reason,
    ) -> Result<(), Failed> {
        let failed = |left, error| Err(Failed { error, left });
        let moot = |error| failed(Left::Nothing, error);
        let done = match verdict {
            // Nothing is sent, so the connection doesn't matter.
            Verdict::Abandon => {
                self.free.add_permits(1);
                Ok(Reply::Settled)
            }
            _ if self.is_stale() => return failed(Left::Channel, DeliveryError::Stale),
            Verdict::Ack => self.ack(id, is_lost).await,
            Verdict::Retry { .. } => {
                let count = id.deliveries();
                self.give_back(id, verdict.delay(), "FAIL", count).await
            }
            Verdict::Release { .. } => {
                // The next delivery raises it again.
                let count = id.deliveries().saturating_sub(1);
                self.give_back(id, verdict.delay(), "SILENT", count).await
            }
            Verdict::Reject => self.reject(id, fields, reason).await,
        };
        match done {
            Ok(Reply::Settled) => Ok(()),
            Ok(Reply::Lost) => moot(DeliveryError::Lost),
            Ok(Reply::SomeLost { lost, of }) => moot(DeliveryError::SomeLost { lost, of }),
            Ok(Reply::Gone) => moot(DeliveryError::Gone),
            Err(error) => {
                let left = match is_refused_whole(&error) {
                    true => Left::Again,
                    false => Left::Channel,
                };
                failed(left, DeliveryError::Command(error))
            }
        }
    }

    pub(super) async fn keep_alive(&self, id: &DeliveryId) -> Result<Lease, DeliveryError> {
        if self.is_stale() {
            return Err(DeliveryError::Stale);
        }
        let mut script = scripts::KEEP_ALIVE.prepare_invoke();
        self.owned(&mut script, id);
        match self.invoke(&script).await {
            Ok(Reply::Settled) => Ok(Lease::Held),
            Ok(Reply::Lost | Reply::SomeLost { .. } | Reply::Gone) => Ok(Lease::Lost),
            Err(error) => Err(DeliveryError::Command(error)),
        }
    }

    /// Gives the entry back: at once in this `mode` if the server has one, or with this `count`.
    async fn give_back(
        &self,
        id: &DeliveryId,
        delay: Option<Duration>,
        mode: &str,
        count: u32,
    ) -> Result<Reply, RedisError> {
        match delay {
            None if self.newer.nack => self.nack(id, mode).await,
            _ => self.park(id, count, delay.unwrap_or_default()).await,
        }
    }

    /// Lets the entry wait, out of the pending list, until it is due.
    async fn park(
        &self,
        id: &DeliveryId,
        count: u32,
        delay: Duration,
    ) -> Result<Reply, RedisError> {
        let mut script = scripts::PARK.prepare_invoke();
        self.owned(&mut script, id).arg(count).arg(millis(delay));
        self.answer(&script).await
    }

    /// Gives the entry back within the pending list, for whoever claims next.
    async fn nack(&self, id: &DeliveryId, mode: &str) -> Result<Reply, RedisError> {
        let mut script = scripts::NACK.prepare_invoke();
        self.owned(&mut script, id).arg(mode);
        self.answer(&script).await
    }

    /// Returns the command by which scripts delete what is settled, if they are to.
    pub(super) fn delete_command(&self) -> &'static str {
        match (self.delete_settled, self.newer.ack_delete) {
            (false, _) => "",
            (true, false) => "XDEL",
            (true, true) => "XACKDEL",
        }
    }

    /// Runs a script that answers for a delivery, and frees its place.
    async fn answer(&self, script: &ScriptInvocation<'_>) -> Result<Reply, RedisError> {
        let reply = self.invoke(script).await?;
        self.free.add_permits(1);
        Ok(reply)
    }

    /// Adds what `owned.lua` reads.
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

    fn heed(&self, error: &RedisError) {
        if is_of_the_connection(error) {
            self.lost.cancel();
        }
    }
}

impl From<&str> for Reply {
    fn from(reply: &str) -> Self {
        match reply {
            "settled" => Reply::Settled,
            "gone" => Reply::Gone,
            _ => Reply::Lost,
        }
    }
}

impl FromRedisValue for Reply {
    fn from_redis_value(value: Value) -> Result<Self, ParsingError> {
        Ok(Reply::from(&*String::from_redis_value(value)?))
    }
}

impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Channel")
            .field("stream", &self.keys.stream)
            .field("group", &self.group)
            .field("consumer", &self.consumer)
            .field("stale", &self.is_stale())
            .finish_non_exhaustive()
    }
}

/// Returns whether the server refused a command or a script before its first write.
///
/// The scripts read before they write, and their first write is the one that these conditions
/// refuse. After any other error it is not known what was done.
fn is_refused_whole(error: &RedisError) -> bool {
    use ServerErrorKind::{BusyLoading, ClusterDown, MasterDown, ReadOnly, TryAgain};
    match error.kind() {
        ErrorKind::Server(kind) => matches!(
            kind,
            BusyLoading | ClusterDown | MasterDown | ReadOnly | TryAgain
        ),
        _ => matches!(
            error.code(),
            Some("BUSY" | "MISCONF" | "NOREPLICAS" | "OOM")
        ),
    }
}

/// Returns whole milliseconds, rounded up, so that no entry is seen before its time.
pub(super) fn millis(delay: Duration) -> u64 {
    // As far as a score, a double, counts in whole milliseconds.
    const FAR: u128 = 1 << 52;
    let millis = delay.as_nanos().div_ceil(1_000_000).min(FAR);
    u64::try_from(millis).unwrap_or(1 << 52)
}
