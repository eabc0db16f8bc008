//! What the deliveries of one subscription share: the connection that they are settled on.

use std::{
    fmt,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use ::redis::{
    ErrorKind, RedisError, ScriptInvocation, ServerErrorKind, aio::MultiplexedConnection,
};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::{DeliveryError, scripts};
use crate::{Lease, Reason, Verdict};

/// The keys of a group, all in the hash slot of its stream.
#[derive(Clone, Debug)]
pub(super) struct Keys {
    pub(super) stream: String,
    pub(super) delayed: String,
    pub(super) dead: Option<String>,
}

/// The settling side of a subscription.
pub(super) struct Channel {
    pub(super) connection: MultiplexedConnection,
    pub(super) keys: Keys,
    pub(super) group: String,
    pub(super) consumer: String,
    pub(super) delete_settled: bool,
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
    pub(super) count: u32,
}

/// Whether a script found the entry as it should be.
enum Reply {
    Settled,
    Lost,
    Gone,
}

/// A settlement that failed, and whether nothing of it was done.
pub(super) struct Failed {
    pub(super) error: DeliveryError,
    pub(super) may_repeat: bool,
}

impl Channel {
    pub(super) fn is_stale(&self) -> bool {
        self.closed.load(Ordering::Acquire) || self.lost.is_cancelled()
    }

    /// Carries `verdict` out and frees the delivery's place.
    pub(super) async fn settle(
        &self,
        id: &DeliveryId,
        verdict: Verdict,
        reason: Reason,
    ) -> Result<(), Failed> {
        let last = |error| Failed {
            error,
            may_repeat: false,
        };
        let done = match verdict {
            // Nothing is sent, so the connection doesn't matter.
            Verdict::Abandon => Ok(Reply::Settled),
            _ if self.is_stale() => return Err(last(DeliveryError::Stale)),
            Verdict::Ack => self.ack(id).await,
            Verdict::Retry { after } => {
                self.park(id, id.count, after.unwrap_or(Duration::ZERO))
                    .await
            }
            // The next delivery raises it again.
            Verdict::Release => {
                self.park(id, id.count.saturating_sub(1), Duration::ZERO)
                    .await
            }
            Verdict::Reject => self.reject(id, reason).await,
        };
        let error = match done {
            Ok(Reply::Settled) => None,
            Ok(Reply::Lost) => Some(DeliveryError::Lost),
            Ok(Reply::Gone) => Some(DeliveryError::Gone),
            Err(error) => {
                let may_repeat = is_refused_whole(&error);
                return Err(Failed {
                    error: DeliveryError::Command(error),
                    may_repeat,
                });
            }
        };
        self.free.add_permits(1);
        error.map_or(Ok(()), |error| Err(last(error)))
    }

    pub(super) async fn keep_alive(&self, id: &DeliveryId) -> Result<Lease, DeliveryError> {
        if self.is_stale() {
            return Err(DeliveryError::Stale);
        }
        let mut script = scripts::KEEP_ALIVE.prepare_invoke();
        match self.run(&mut script, id).await {
            Ok(Reply::Settled) => Ok(Lease::Held),
            Ok(Reply::Lost | Reply::Gone) => Ok(Lease::Lost),
            Err(error) => Err(DeliveryError::Command(error)),
        }
    }

    async fn ack(&self, id: &DeliveryId) -> Result<Reply, RedisError> {
        let mut script = scripts::ACK.prepare_invoke();
        self.owned(&mut script, id).arg(self.delete_settled);
        self.invoke(&script).await
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
        self.invoke(&script).await
    }

    async fn reject(&self, id: &DeliveryId, reason: Reason) -> Result<Reply, RedisError> {
        if self.keys.dead.is_none() {
            return self.ack(id).await;
        }
        let mut script = scripts::DEAD_LETTER.prepare_invoke();
        self.owned(&mut script, id)
            .arg(self.delete_settled)
            .arg(reason.kind.as_str());
        if let Some(message) = reason.message {
            script.arg(message);
        }
        self.invoke(&script).await
    }

    async fn run(
        &self,
        script: &mut ScriptInvocation<'_>,
        id: &DeliveryId,
    ) -> Result<Reply, RedisError> {
        self.owned(script, id);
        self.invoke(script).await
    }

    /// Adds what `owned.lua` reads.
    fn owned<'a, 's>(
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

    async fn invoke(&self, script: &ScriptInvocation<'_>) -> Result<Reply, RedisError> {
        let reply: Result<String, _> = script.invoke_async(&mut self.connection.clone()).await;
        match reply.as_deref() {
            Ok("settled") => Ok(Reply::Settled),
            Ok("gone") => Ok(Reply::Gone),
            Ok(_) => Ok(Reply::Lost),
            Err(error) => {
                if error.is_unrecoverable_error() {
                    self.lost.cancel();
                }
                Err(error.clone())
            }
        }
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

/// Returns whether the server refused a script before its first write.
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
