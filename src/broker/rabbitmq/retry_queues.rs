//! [`RetryQueues`], in which jobs wait for their next attempt.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use lapin::types::{AMQPValue, FieldTable, ShortString};
use tokio::time::Instant;

use super::{
    delivery_error::{DeliveryError, Right},
    error::SubscriptionError,
};

/// Time that a retry queue outlives its last message.
///
/// The server deletes a queue with all its messages. So it must also cover a target that takes nothing for a
/// while, such as one that is full over a weekend.
const MARGIN: Duration = Duration::from_secs(7 * 24 * 3600);

/// Time in which a server that is killed may lose a new queue, though it has confirmed the declaration: up to
/// 2 s, see [Queues that are new](crate::_guide::rabbitmq#queues-that-are-new).
const UNWRITTEN: Duration = Duration::from_millis(2_500);

/// The least difference between two delays in milliseconds: each retry queue is a Raft group of its own.
const STEP: u64 = 128;

/// The longest delay in milliseconds: with the margin it fits into the 32 bits of `x-expires`.
const LONGEST_DELAY: u64 = 1 << 31;

/// The retry queues of one queue.
#[derive(Debug)]
pub(super) enum RetryQueues {
    /// Declared when they are needed.
    Own {
        queue: ShortString,
        /// `true` if the user has the right to declare them.
        is_permitted: bool,
        used: Mutex<HashMap<u64, Used>>,
    },
    /// Declared by their owner, by their delays.
    Given(BTreeMap<Duration, ShortString>),
}

/// An own retry queue that was used.
#[derive(Clone, Copy, Debug)]
pub(super) struct Used {
    at: Instant,
    /// Time from which it survives the end of the server.
    written: Instant,
}

impl Used {
    /// Returns whether it may have expired.
    fn may_be_gone(self, now: Instant) -> bool {
        now - self.at >= MARGIN
    }
}

/// A retry queue for one delay.
#[derive(Debug)]
pub(super) enum RetryQueue {
    /// To be declared before each use, so that its life is prolonged.
    Own {
        millis: u64,
        name: ShortString,
    },
    Given(ShortString),
}

impl RetryQueues {
    /// Creates them for `queue` from the `given` ones; if there are none, they are declared.
    ///
    /// # Errors
    ///
    /// If a name is too long.
    pub(super) fn new(
        queue: &ShortString,
        given: &BTreeMap<Duration, String>,
    ) -> Result<Self, SubscriptionError> {
        super::queue::short(name_of(queue, LONGEST_DELAY))?;
        if given.is_empty() {
            return Ok(Self::Own {
                queue: queue.clone(),
                is_permitted: true,
                used: Mutex::default(),
            });
        }
        let given = given.iter().map(|(delay, name)| {
            let name = super::queue::short(name.clone())?;
            Ok((*delay, name))
        });
        given.collect::<Result<_, _>>().map(Self::Given)
    }

    /// Returns a name like that of an own retry queue, which none of them has.
    pub(super) fn probe(&self) -> Option<ShortString> {
        match self {
            Self::Own { queue, .. } => Some(name_of(queue, 0).into()),
            Self::Given(_) => None,
        }
    }

    /// Notes that the user does not have the right to declare them.
    pub(super) fn forbid(&mut self) {
        if let Self::Own { is_permitted, .. } = self {
            *is_permitted = false;
        }
    }

    /// Returns the error for one that can't be declared.
    pub(super) fn undeclared(&self, name: &str, error: lapin::Error) -> DeliveryError {
        match self {
            Self::Own {
                is_permitted: false,
                ..
            } => DeliveryError::of_declaration(Right::Configure, name, error),
            // A queue with dead letters takes this right, too.
            _ => DeliveryError::of_declaration(Right::Read, name, error),
        }
    }

    /// Returns the names of the given ones.
    pub(super) fn given(&self) -> impl Iterator<Item = &ShortString> {
        let given = match self {
            Self::Own { .. } => None,
            Self::Given(given) => Some(given.values()),
        };
        given.into_iter().flatten()
    }

    /// Returns the one with the least delay that is not below `delay`.
    pub(super) fn of(&self, delay: Duration) -> Result<RetryQueue, DeliveryError> {
        let too_long = DeliveryError::DelayTooLong(delay);
        match self {
            Self::Own { queue, .. } => {
                let millis = rounded_up(delay).ok_or(too_long)?;
                // Invariant: `new` has checked the longest of these names.
                let name = name_of(queue, millis).into();
                Ok(RetryQueue::Own { millis, name })
            }
            Self::Given(given) => {
                let (_, name) = given.range(delay..).next().ok_or(too_long)?;
                Ok(RetryQueue::Given(name.clone()))
            }
        }
    }

    /// Returns the known ones for at least `millis` and at most four times as long, with their delays; the
    /// shortest first. They survive the end of the server, and should not have expired.
    pub(super) fn longer(&self, millis: u64) -> Vec<(u64, ShortString)> {
        let Self::Own { queue, used, .. } = self else {
            return Vec::new();
        };
        let now = Instant::now();
        let used = used.lock().unwrap_or_else(PoisonError::into_inner);
        let known = used.iter().filter(|(longer, used)| {
            (millis..=4 * millis).contains(*longer) && used.written <= now && !used.may_be_gone(now)
        });
        let mut known: Vec<_> = known.map(|(longer, _)| *longer).collect();
        known.sort_unstable();
        let named = known.into_iter();
        named
            .map(|longer| (longer, name_of(queue, longer).into()))
            .collect()
    }

    /// Notes that an own retry queue is gone.
    pub(super) fn forget(&self, millis: u64) {
        if let Self::Own { used, .. } = self {
            let mut used = used.lock().unwrap_or_else(PoisonError::into_inner);
            used.remove(&millis);
        }
    }

    /// Returns the time from which an own retry queue that was just declared survives the end of the server.
    ///
    /// It may be new, unless it was used so recently that it can't have expired.
    pub(super) fn written(&self, millis: u64) -> Instant {
        let now = Instant::now();
        let new = Used {
            at: now,
            written: now + UNWRITTEN,
        };
        let Self::Own { used, .. } = self else {
            return now;
        };
        let mut used = used.lock().unwrap_or_else(PoisonError::into_inner);
        let queue = used.entry(millis).or_insert(new);
        if queue.may_be_gone(now) {
            *queue = new;
        }
        queue.at = now;
        queue.written
    }
}

/// The kind of the queue is part of its name. So must be each other of its [`arguments`] that changes, since
/// the server refuses the declaration while the old queue is there.
fn name_of(queue: &ShortString, millis: u64) -> String {
    format!("{queue}.retry.quorum.{millis}")
}

/// Returns the arguments of an own retry queue of `queue`.
///
/// It is always a quorum queue: no other type confirms the way back. A classic one forgets a message that its
/// target does not take, or has not written down.
pub(super) fn arguments(queue: &str, millis: u64) -> FieldTable {
    let expires = millis + MARGIN.as_millis() as u64;
    let mut arguments = FieldTable::default();
    let mut set = |name: &str, value| {
        arguments.insert(name.into(), value);
    };
    let text = |text: &str| AMQPValue::LongString(text.into());
    set("x-queue-type", text("quorum"));
    set("x-message-ttl", AMQPValue::LongLongInt(millis as i64));
    set("x-expires", AMQPValue::LongLongInt(expires as i64));
    set("x-dead-letter-exchange", text(""));
    set("x-dead-letter-routing-key", text(queue));
    set("x-dead-letter-strategy", text("at-least-once"));
    // At-least-once dead-lettering requires this.
    set("x-overflow", text("reject-publish"));
    arguments
}

/// Rounds up to milliseconds with three leading bits, and in steps of at least [`STEP`], so that jitter does
/// not make a queue for each job; `None` if that is too long.
fn rounded_up(delay: Duration) -> Option<u64> {
    let millis = u64::try_from(delay.as_nanos().div_ceil(1_000_000)).ok()?;
    let millis = millis.max(1);
    let step = STEP.max(1 << millis.ilog2().saturating_sub(2));
    let rounded = millis.checked_next_multiple_of(step)?;
    (rounded <= LONGEST_DELAY).then_some(rounded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_delay_is_rounded_up_by_at_most_a_quarter_or_a_step() {
        for millis in (0..100_000).chain([LONGEST_DELAY - 1, LONGEST_DELAY]) {
            let rounded = rounded_up(Duration::from_millis(millis)).unwrap();
            assert!(rounded >= millis.max(1), "{millis} became {rounded}");
            let most = (millis + STEP).max(5 * millis / 4);
            assert!(rounded <= most, "{millis} became {rounded}");
        }
        let micros = Duration::from_micros(256_001);
        assert_eq!(rounded_up(micros), Some(384));
        let too_long = Duration::from_millis(LONGEST_DELAY + 1);
        assert_eq!(rounded_up(too_long), None);
        assert_eq!(rounded_up(Duration::MAX), None);
    }

    #[test]
    fn a_minute_of_delays_needs_few_queues() {
        for (longest, number) in [(4_000, 16), (60_000, 32)] {
            let delays = (1..=longest).map(|millis| rounded_up(Duration::from_millis(millis)));
            let queues: std::collections::BTreeSet<_> = delays.collect();
            assert_eq!(queues.len(), number, "up to {longest} ms");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_longer_queue_stands_in_if_it_is_known() {
        let queues = RetryQueues::new(&"jobs".into(), &BTreeMap::new()).unwrap();
        let longer = |millis| Vec::from_iter(queues.longer(millis).into_iter().map(|(it, _)| it));
        for millis in [256, 512, 1_024, 2_048] {
            queues.written(millis);
        }
        assert_eq!(longer(256), [0; 0], "none is old enough");
        tokio::time::advance(UNWRITTEN).await;
        queues.written(128);
        assert_eq!(longer(256), [256, 512, 1_024]);
        assert_eq!(longer(384), [512, 1_024]);
        queues.forget(512);
        assert_eq!(longer(384), [1_024]);
        let (_, name) = queues.longer(384).remove(0);
        assert_eq!(name.as_str(), "jobs.retry.quorum.1024");
        tokio::time::advance(MARGIN).await;
        assert_eq!(longer(256), [0; 0], "each may have expired");
    }

    #[test]
    fn the_longest_life_of_a_retry_queue_fits_into_its_argument() {
        let longest = LONGEST_DELAY + MARGIN.as_millis() as u64;
        assert!(u32::try_from(longest).is_ok(), "{longest}");
    }

    #[test]
    fn a_delay_is_rounded_up_to_the_next_queue_that_is_given() {
        let second = Duration::from_secs(1);
        let given = [(second, "a".to_owned()), (60 * second, "b".to_owned())];
        let queues = RetryQueues::new(&"jobs".into(), &given.into()).unwrap();
        for (delay, expected) in [(1, "a"), (1_000, "a"), (1_001, "b"), (60_000, "b")] {
            let queue = queues.of(Duration::from_millis(delay)).unwrap();
            assert!(
                matches!(&queue, RetryQueue::Given(name) if name.as_str() == expected),
                "{delay} ms: {queue:?}"
            );
        }
        assert!(queues.of(61 * second).is_err());
    }
}
