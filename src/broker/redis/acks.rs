//! [`Acks`]: those that come at the same time go to the server together.

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

/// How many acks a batch has at most: a command keeps all other clients of the server waiting.
const LIMIT: usize = 64;

/// Collects the acks of a channel into batches.
///
/// They are [gathered](Gathering). A batch is one command, or a script for those that have to ask. No
/// batch waits for the answer to another. Should the task that sends them end early, since its runtime
/// does, each ack is answered with an error.
pub(super) struct Acks {
    gathering: Gathering<Ack>,
}

struct Ack {
    id: DeliveryId,
    /// Whether it asks whose the entry is, though it comes early.
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

    /// Acks the delivery and frees its place. If it comes early it asks whose the entry is only if it
    /// `asks`.
    ///
    /// # Cancel safety
    ///
    /// Once it was polled, the ack goes out whether or not anybody waits for its answer.
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
        // What is deleted is asked for, or a mistake of the others' would delete what one has parked.
        let may_trust = !self.delete_settled && !self.is_stale();
        let now = Instant::now();
        let is_leased =
            |ack: &Ack| may_trust && !ack.asks && now.duration_since(ack.id.asked_at) < self.lease;
        let (leased, others): (Vec<_>, Vec<_>) = acks.into_iter().partition(is_leased);
        let leased = batches(leased).map(|acks| self.send_leased(acks));
        let others = batches(others).map(|acks| self.send_others(acks));
        join(join_all(leased), join_all(others)).await;
    }

    /// Acks what nobody else can have yet.
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
        self.answer_all(acks, &reply.map(|reply| move |_| reply));
    }

    /// Acks what is still this consumer's.
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
        self.answer_all(acks, &reply);
    }

    /// Frees the places of what was done, and tells each ack the reply to its position, from 1 on.
    fn answer_all(&self, acks: Vec<Ack>, reply: &Result<impl Fn(usize) -> Reply, RedisError>) {
        if reply.is_ok() {
            // At once, so that the reader learns of all of them at once.
            self.free.add_permits(acks.len());
        }
        for (position, ack) in (1..).zip(acks) {
            let reply = match reply {
                Ok(reply) => Ok(reply(position)),
                Err(error) => Err(error.clone()),
            };
            // Whoever has stopped waiting has told that it doesn't know.
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

/// By this ids are in the order that they have in the stream. They are two decimal numbers without
/// leading zeros, of which the longer is the larger.
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
