//! [`Channel`]: the settling side of a subscription, which its deliveries share.

use std::{fmt, sync::Arc, time::Duration};

use ::redis::RedisError;

use super::{
    acks::Acks,
    dead_letter::Rejected,
    error::DeliveryError,
    keys::Keys,
    link::{Link, millis},
    reply::{DeliveryId, Reply},
    scripts,
    standing::Standing,
};
use crate::settle::{Lease, Reason, Verdict};

/// The settling side of a subscription.
pub(super) struct Channel {
    pub(super) link: Arc<Link>,
    pub(super) acks: Acks,
}

/// A settlement that failed, and its reach.
pub(super) struct Failed {
    pub(super) error: DeliveryError,
    pub(super) left: Left,
}

#[derive(Clone, Copy)]
pub(super) enum Left {
    /// Nothing was done, so it may be tried again.
    Again,
    /// No further action: the entry is not pending for this delivery, whose place is free.
    Nothing,
    /// The channel has to be given up: it is not known what was done.
    Channel,
}

impl Channel {
    /// Carries `verdict` out and frees the delivery's place.
    ///
    /// An early ack checks the owner of the entry only if the entry is known to be lost.
    pub(super) async fn settle(
        &self,
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
                self.link.free.add_permits(1);
                Ok(Reply::Settled)
            }
            _ if self.link.is_stale() => return failed(Left::Channel, DeliveryError::Stale),
            Verdict::Ack => self.acks.ack(&self.link, id, is_lost).await,
            Verdict::Retry { .. } => {
                let count = id.deliveries();
                self.give_back(id, verdict.delay(), "FAIL", count).await
            }
            Verdict::Release { .. } => {
                // The next delivery raises the count again.
                let count = id.deliveries().saturating_sub(1);
                self.give_back(id, verdict.delay(), "SILENT", count).await
            }
            Verdict::Reject => self.reject(id, fields, &reason).await,
        };
        match done {
            Ok(Reply::Settled) => Ok(()),
            Ok(Reply::Lost) => moot(DeliveryError::Lost),
            Ok(Reply::SomeLost { lost, of }) => moot(DeliveryError::SomeLost { lost, of }),
            Ok(Reply::Gone) => moot(DeliveryError::Gone),
            Ok(Reply::NotReplicated { confirmed, wanted }) => {
                moot(DeliveryError::NotReplicated { confirmed, wanted })
            }
            Err(error) => {
                let left = match is_refused_whole(&error) {
                    true => Left::Again,
                    false => Left::Channel,
                };
                failed(left, DeliveryError::of(error))
            }
        }
    }

    pub(super) async fn keep_alive(&self, id: &DeliveryId) -> Result<Lease, DeliveryError> {
        if self.link.is_stale() {
            return Err(DeliveryError::Stale);
        }
        let mut script = scripts::KEEP_ALIVE.prepare_invoke();
        self.link.owned(&mut script, id);
        match self.link.invoke(&script).await {
            Ok(Reply::Settled | Reply::NotReplicated { .. }) => Ok(Lease::Held),
            Ok(Reply::Lost | Reply::SomeLost { .. } | Reply::Gone) => Ok(Lease::Lost),
            Err(error) => Err(DeliveryError::of(error)),
        }
    }

    /// Stores the entry among the suspects or as a dead letter, if there is a stream for them, and acks it.
    async fn reject(
        &self,
        id: &DeliveryId,
        fields: &[(Vec<u8>, Vec<u8>)],
        reason: &Reason,
    ) -> Result<Reply, RedisError> {
        let Keys { suspects, dead, .. } = &self.link.keys;
        let suspects = suspects.as_deref().filter(|_| reason.is_suspect());
        let rejected = Rejected {
            id,
            fields,
            reason,
            is_suspect: suspects.is_some(),
        };
        if let Some(destination) = suspects.or(dead.as_deref()) {
            let reply = self.link.reject(destination, rejected).await?;
            if let Some(reply) = reply {
                return Ok(reply);
            }
        }
        // An entry without a dead letter must belong to this delivery: the next one may succeed.
        self.acks.ack(&self.link, id, true).await
    }

    /// Gives the entry back: at once in this `mode` if the server has `XNACK`, or else with this `count`.
    async fn give_back(
        &self,
        id: &DeliveryId,
        delay: Option<Duration>,
        mode: &str,
        count: u32,
    ) -> Result<Reply, RedisError> {
        match delay {
            None if self.link.newer.nack => self.nack(id, mode).await,
            _ => self.park(id, count, delay.unwrap_or_default()).await,
        }
    }

    /// Parks the entry outside the pending list until it is due.
    async fn park(
        &self,
        id: &DeliveryId,
        count: u32,
        delay: Duration,
    ) -> Result<Reply, RedisError> {
        let mut script = scripts::PARK.prepare_invoke();
        self.link
            .owned(&mut script, id)
            .arg(count)
            .arg(millis(delay));
        self.link.answer(&script).await
    }

    /// Gives the entry back within the pending list, for the next consumer that claims.
    async fn nack(&self, id: &DeliveryId, mode: &str) -> Result<Reply, RedisError> {
        let mut script = scripts::NACK.prepare_invoke();
        self.link.owned(&mut script, id).arg(mode);
        self.link.answer(&script).await
    }
}

impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Channel")
            .field("stream", &self.link.keys.stream)
            .field("group", &self.link.group)
            .field("consumer", &self.link.consumer)
            .field("stale", &self.link.is_stale())
            .finish_non_exhaustive()
    }
}

/// Returns whether the server refused a command or a script before its first write.
///
/// The scripts read before they write, and these conditions refuse their first write. After any other error
/// it is not known what was done.
fn is_refused_whole(error: &RedisError) -> bool {
    Standing::of(error).is_some() || matches!(error.code(), Some("BUSY" | "MISCONF" | "OOM"))
}
