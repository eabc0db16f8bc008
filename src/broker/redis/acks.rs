//! [`Acks`] of a channel, sent to the server in batches.

use std::{io, iter, sync::Arc};

use ::redis::{RedisError, cmd};
use futures_util::future::{join, join_all};
use tokio::{sync::oneshot, time::Instant};

use super::{
    link::Link,
    reply::{DeliveryId, Reply},
    scripts,
};
use crate::broker::gathering::Gathering;

/// Greatest number of acks in a batch: a command keeps all other clients of the server waiting.
const LIMIT: usize = 64;

/// Collects the acks of a channel into batches.
///
/// They are [gathered](Gathering). A batch is one command, or a script for those that have to check the owner
/// of their entries. No batch waits for the reply to another. If the task that sends them ends early, since
/// its runtime ends, each ack fails with an error.
pub(super) struct Acks {
    gathering: Gathering<Ack>,
}

struct Ack {
    id: DeliveryId,
    /// `true` if it checks the owner of the entry, though it comes early.
    asks: bool,
    answer: oneshot::Sender<Result<Reply, RedisError>>,
}

impl Acks {
    /// Creates it without acks.
    ///
    /// # Panics
    ///
    /// Panics outside of a tokio runtime.
    pub(super) fn new() -> Self {
        Self {
            gathering: Gathering::new(),
        }
    }

    /// Acks the delivery and frees its place. An early ack checks the owner of the entry only if `asks` is
    /// set.
    ///
    /// # Cancel safety
    ///
    /// Once it was polled, the ack is sent, whether or not anybody waits for its result.
    pub(super) async fn ack(
        &self,
        link: &Arc<Link>,
        id: &DeliveryId,
        asks: bool,
    ) -> Result<Reply, RedisError> {
        let (answer, answered) = oneshot::channel();
        let id = id.clone();
        let link = Arc::clone(link);
        let ack = Ack { id, asks, answer };
        self.gathering.add(ack, |acks| link.send(acks));
        answered
            .await
            .unwrap_or_else(|_| Err(io::Error::from(io::ErrorKind::BrokenPipe).into()))
    }
}

impl Link {
    /// Sends acks in batches.
    async fn send(self: Arc<Self>, acks: Vec<Ack>) {
        // An ack that deletes its entry always checks it: after a mistake of another consumer it could delete
        // an entry that has been parked.
        let may_trust = !self.delete_settled && !self.is_stale();
        let now = Instant::now();
        let is_leased =
            |ack: &Ack| may_trust && !ack.asks && now.duration_since(ack.id.asked_at) < self.lease;
        let (leased, others): (Vec<_>, Vec<_>) = acks.into_iter().partition(is_leased);
        let leased = batches(leased).map(|acks| self.send_leased(acks));
        let others = batches(others).map(|acks| self.send_others(acks));
        join(join_all(leased), join_all(others)).await;
    }

    /// Acks entries that nobody else can have yet.
    async fn send_leased(&self, acks: Vec<Ack>) {
        let ids: Vec<_> = acks.iter().map(|ack| &ack.id.entry).collect();
        let mut ack = cmd("XACK");
        ack.arg(&self.keys.stream).arg(&self.group).arg(&ids);
        let pending: Result<usize, _> = self.query(&ack).await;
        let of = acks.len();
        let reply = pending.map(|pending| match of.saturating_sub(pending) {
            0 => Reply::Settled,
            lost if lost == of => Reply::Lost,
            lost => Reply::SomeLost { lost, of },
        });
        self.answer_all(acks, &reply.map(|reply| move |_| reply))
            .await;
    }

    /// Acks the entries that still belong to this consumer.
    async fn send_others(&self, mut acks: Vec<Ack>) {
        acks.sort_unstable_by(|a, b| order(&a.id.entry).cmp(&order(&b.id.entry)));
        let mut script = scripts::ACK.prepare_invoke();
        script
            .key(&self.keys.stream)
            .arg(&self.consumer)
            .arg(self.delete_command())
            .arg(&self.group);
        for ack in &acks {
            script.arg(&ack.id.entry);
        }
        for ack in &acks {
            script.arg(ack.id.count);
        }
        let lost: Result<Vec<usize>, _> = self.invoke(&script).await;
        let reply = lost.map(|lost| {
            move |position| match lost.contains(&position) {
                true => Reply::Lost,
                false => Reply::Settled,
            }
        });
        self.answer_all(acks, &reply).await;
    }

    /// Frees the places of settled entries, and gives each ack the reply to its position, from 1 on.
    async fn answer_all(
        &self,
        acks: Vec<Ack>,
        reply: &Result<impl Fn(usize) -> Reply, RedisError>,
    ) {
        if reply.is_ok() {
            // All at once, so that the reader learns of them together.
            self.free.add_permits(acks.len());
        }
        // The replicas have all of the batch, or not.
        let settled = match reply {
            Ok(_) => self.replicated(Reply::Settled).await,
            Err(_) => Reply::Settled,
        };
        for (position, ack) in (1..).zip(acks) {
            let reply = match reply {
                Ok(reply) => Ok(match reply(position) {
                    Reply::Settled => settled,
                    other => other,
                }),
                Err(error) => Err(error.clone()),
            };
            // A settlement that no longer waits has reported that it does not know the result.
            drop(ack.answer.send(reply));
        }
    }
}

fn batches(acks: Vec<Ack>) -> impl Iterator<Item = Vec<Ack>> {
    let mut acks = acks.into_iter();
    iter::from_fn(move || {
        let batch: Vec<_> = acks.by_ref().take(LIMIT).collect();
        (!batch.is_empty()).then_some(batch)
    })
}

/// Returns a key that sorts ids in the order of the stream. They are two decimal numbers without leading
/// zeros, of which the longer is the larger.
fn order(id: &str) -> (usize, &str, usize, &str) {
    let (time, sequence) = id.split_once('-').unwrap_or((id, ""));
    (time.len(), time, sequence.len(), sequence)
}

#[cfg(test)]
mod tests {
    use super::order;

    #[test]
    fn ids_are_ordered_as_in_the_stream() {
        let ids = ["9-1", "10-2", "10-10", "11-0", "1526919030474-55"];
        assert!(ids.is_sorted_by_key(|id| order(id)));
    }
}
