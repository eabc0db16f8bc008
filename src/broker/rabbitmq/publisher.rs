//! What is republished: retries, and dead letters.

use std::{
    collections::HashMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use lapin::{
    BasicProperties, Channel, Confirmation,
    options::{BasicPublishOptions, QueueDeclareOptions},
    types::{AMQPValue, FieldTable, ShortString},
};
use tokio::{
    sync::RwLock,
    time::{Instant, sleep_until},
};

use super::{DeliveryError, QueueKind};

/// How long a retry queue outlives its last message.
///
/// The server deletes a queue with all that is in it. So it must also cover a target that takes
/// nothing for a while, such as a quorum queue without a majority.
const RETRY_QUEUE_MARGIN: Duration = Duration::from_secs(3600);

/// How long a new queue may be lost by a server that is killed, though it has said that the queue is
/// declared: up to 2 s, see [Queues that are new](super#queues-that-are-new).
const UNWRITTEN: Duration = Duration::from_millis(2_500);

/// The longest delay in milliseconds: with the margin it fits into the 32 bits of `x-expires`.
const LONGEST_DELAY: u64 = 1 << 31;

#[derive(Clone, Debug)]
pub(super) struct Target {
    pub(super) exchange: ShortString,
    pub(super) routing_key: ShortString,
}

#[derive(Clone, Copy, Debug)]
struct RetryQueue {
    used: Instant,
    /// From when on it outlives the server.
    written: Instant,
}

/// A channel with publisher confirms.
#[derive(Debug)]
pub(super) struct Publisher {
    channel: Channel,
    queue: ShortString,
    kind: QueueKind,
    dead_letter: Option<Target>,
    /// The retry queues that were used, by their time to live.
    retry_queues: Mutex<HashMap<u64, RetryQueue>>,
    /// Taken exclusively by a publish that may be returned. lapin pairs a returned message with the
    /// next confirmation, so a second one in flight could take the blame, and the returned one be
    /// taken for stored.
    turn: RwLock<()>,
    /// Set while a publish may be returned, and left so if its future is dropped: from then on a
    /// return can't be told from that of another.
    is_torn: AtomicBool,
}

impl Publisher {
    pub(super) fn new(
        channel: Channel,
        queue: ShortString,
        kind: QueueKind,
        dead_letter: Option<Target>,
    ) -> Self {
        Self {
            channel,
            queue,
            kind,
            dead_letter,
            retry_queues: Mutex::default(),
            turn: RwLock::new(()),
            is_torn: AtomicBool::new(false),
        }
    }

    pub(super) fn queue(&self) -> &str {
        self.queue.as_str()
    }

    pub(super) fn kind(&self) -> QueueKind {
        self.kind
    }

    pub(super) fn dead_letter(&self) -> Option<&Target> {
        self.dead_letter.as_ref()
    }

    /// Publishes to the end of `queue`: a retry queue, or the one that the original is in.
    ///
    /// Not mandatory: the first was just declared, and with the second goes the original.
    pub(super) async fn retry(
        &self,
        queue: ShortString,
        payload: &[u8],
        properties: BasicProperties,
    ) -> Result<(), DeliveryError> {
        let turn = self.turn.read().await;
        self.publish("".into(), queue, false, payload, properties)
            .await?;
        drop(turn);
        Ok(())
    }

    /// Declares the retry queue of `delay`, waits until it outlives the server, and returns its name.
    ///
    /// It is declared each time, so that its life is prolonged.
    pub(super) async fn retry_queue(&self, delay: Duration) -> Result<ShortString, DeliveryError> {
        let millis = rounded_up(delay).ok_or(DeliveryError::DelayTooLong(delay))?;
        // Invariant: `Queue::subscribe` has checked the longest of these names.
        let name = ShortString::from(format!("{}.retry.{millis}", self.queue));
        let options = QueueDeclareOptions::durable();
        self.channel
            .queue_declare(name.clone(), options, self.retry_arguments(millis))
            .await?;
        sleep_until(self.written(millis)).await;
        Ok(name)
    }

    /// Returns from when on a retry queue that was just declared outlives the server.
    ///
    /// It may have been new, unless it was used so short a time ago that it can't have expired.
    fn written(&self, millis: u64) -> Instant {
        let now = Instant::now();
        let new = RetryQueue {
            used: now,
            written: now + UNWRITTEN,
        };
        let queues = self.retry_queues.lock();
        let mut queues = queues.unwrap_or_else(PoisonError::into_inner);
        let queue = queues.entry(millis).or_insert(new);
        if now - queue.used >= RETRY_QUEUE_MARGIN {
            *queue = new;
        }
        queue.used = now;
        queue.written
    }

    fn retry_arguments(&self, millis: u64) -> FieldTable {
        let expires = millis + RETRY_QUEUE_MARGIN.as_millis() as u64;
        let mut arguments = FieldTable::default();
        let mut set = |name: &str, value| {
            arguments.insert(name.into(), value);
        };
        let text = |text: &str| AMQPValue::LongString(text.into());
        set("x-message-ttl", AMQPValue::LongLongInt(millis as i64));
        set("x-expires", AMQPValue::LongLongInt(expires as i64));
        set("x-dead-letter-exchange", text(""));
        set("x-dead-letter-routing-key", text(self.queue.as_str()));
        match self.kind {
            QueueKind::Classic => set("x-queue-type", text("classic")),
            QueueKind::Quorum => {
                set("x-queue-type", text("quorum"));
                set("x-dead-letter-strategy", text("at-least-once"));
                // What at-least-once dead-lettering requires.
                set("x-overflow", text("reject-publish"));
            }
        }
        arguments
    }

    /// Publishes a dead letter to `target`.
    pub(super) async fn bury(
        &self,
        target: &Target,
        payload: &[u8],
        properties: BasicProperties,
    ) -> Result<(), DeliveryError> {
        let Target {
            exchange,
            routing_key,
        } = target.clone();
        let turn = self.turn.write().await;
        if self.is_torn.swap(true, Ordering::Relaxed) {
            return Err(DeliveryError::NotConfirmed);
        }
        let published = self
            .publish(exchange, routing_key, true, payload, properties)
            .await;
        self.is_torn.store(false, Ordering::Relaxed);
        drop(turn);
        published
    }

    async fn publish(
        &self,
        exchange: ShortString,
        routing_key: ShortString,
        mandatory: bool,
        payload: &[u8],
        properties: BasicProperties,
    ) -> Result<(), DeliveryError> {
        let options = BasicPublishOptions {
            mandatory,
            ..BasicPublishOptions::default()
        };
        let confirm = self
            .channel
            .basic_publish(exchange, routing_key, options, payload, properties)
            .await?;
        match confirm.await? {
            Confirmation::Ack(None) => Ok(()),
            Confirmation::Ack(Some(returned)) | Confirmation::Nack(Some(returned)) => {
                Err(DeliveryError::Unroutable {
                    exchange: returned.exchange.to_string(),
                    routing_key: returned.routing_key.to_string(),
                })
            }
            Confirmation::Nack(None) | Confirmation::NotRequested => {
                Err(DeliveryError::NotConfirmed)
            }
        }
    }
}

/// Rounds up to milliseconds of which the three leading bits count, so that jitter does not make a
/// queue for each job; `None` if that is too long.
fn rounded_up(delay: Duration) -> Option<u64> {
    let millis = u64::try_from(delay.as_nanos().div_ceil(1_000_000)).ok()?;
    let step = 1 << millis.max(1).ilog2().saturating_sub(2);
    let rounded = millis.max(1).checked_next_multiple_of(step)?;
    (rounded <= LONGEST_DELAY).then_some(rounded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_delay_is_rounded_up_by_at_most_a_quarter() {
        for millis in (0..100_000).chain([LONGEST_DELAY - 1, LONGEST_DELAY]) {
            let rounded = rounded_up(Duration::from_millis(millis)).unwrap();
            assert!(rounded >= millis.max(1), "{millis} became {rounded}");
            assert!(
                4 * rounded <= 5 * millis.max(1),
                "{millis} became {rounded}"
            );
        }
        let micros = Duration::from_micros(1_001);
        assert_eq!(rounded_up(micros), Some(2));
        let too_long = Duration::from_millis(LONGEST_DELAY + 1);
        assert_eq!(rounded_up(too_long), None);
        assert_eq!(rounded_up(Duration::MAX), None);
    }

    #[test]
    fn a_minute_of_delays_needs_few_queues() {
        let delays = (1..=60_000).map(|millis| rounded_up(Duration::from_millis(millis)));
        let queues: std::collections::BTreeSet<_> = delays.collect();
        assert_eq!(queues.len(), 60);
    }
}
