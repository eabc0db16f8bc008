//! [`Pull`], the settings of a pull consumer's subscription.

use std::time::Duration;

use async_nats::Subject;
use tower::limit::ConcurrencyLimitLayer;

use super::priority::Priority;
use crate::settle::policy::TRY_TIMEOUT;

/// Default time that a settlement waits for the server's confirmation.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(4);
const _: () = assert!(CONFIRM_TIMEOUT.as_millis() < TRY_TIMEOUT.as_millis());

/// Builder of [`Deliveries`](super::Deliveries): the name of a pull consumer, and the settings to read it.
///
/// It knows stream and consumer by name and needs no connection before [`subscribe`](Self::subscribe). The
/// consumer must exist by then.
///
/// ```no_run
/// use tower_sentinel::broker::nats::{Pull, async_nats::jetstream, connect};
///
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let pull = Pull::new("jobs", "workers").prefetch(64).dead_letter("dead.jobs");
/// let context = jetstream::new(connect("nats://127.0.0.1:4222").await?);
/// let deliveries = pull.subscribe(&context).await?;
/// assert_eq!(deliveries.prefetch(), 64);
/// # Ok(())
/// # }
/// ```
///
/// One of a group, in a network that is often cut:
///
/// ```
/// use std::time::Duration;
/// use tower_sentinel::broker::nats::Pull;
///
/// let pull = Pull::new("jobs", "workers")
///     .group("all")
///     .min_pending(1_000) // helps when more jobs wait,
///     .min_ack_pending(100) // or are unacked
///     .confirm_timeout(Duration::from_secs(8))
///     .idle_heartbeat(Duration::from_secs(5))
///     .reconnect_limit(Duration::from_secs(60));
/// let gate = pull.gate(); // a concurrency limit of as many jobs as the prefetch
///
/// let standby = Pull::new("jobs", "workers").group("all").priority(1);
/// let connector = standby.connector("nats://127.0.0.1:4222");
/// # drop((pull, gate, connector));
/// ```
#[derive(Clone, Debug)]
#[must_use = "nothing is delivered before `subscribe`"]
pub struct Pull {
    pub(super) stream: String,
    pub(super) consumer: String,
    pub(super) prefetch: usize,
    pub(super) priority: Priority,
    pub(super) dead_letter: Option<Subject>,
    pub(super) suspects: Option<Subject>,
    pub(super) schedules: Option<Subject>,
    pub(super) confirm_timeout: Duration,
    pub(super) idle_heartbeat: Duration,
    pub(super) reconnect_limit: Duration,
}

impl Pull {
    /// Creates the builder for `consumer`, which reads `stream`.
    pub fn new(stream: impl Into<String>, consumer: impl Into<String>) -> Self {
        Self {
            stream: stream.into(),
            consumer: consumer.into(),
            prefetch: 64,
            priority: Priority::default(),
            dead_letter: None,
            suspects: None,
            schedules: None,
            confirm_timeout: CONFIRM_TIMEOUT,
            idle_heartbeat: Duration::from_secs(2),
            reconnect_limit: Duration::from_secs(30),
        }
    }

    /// Sets the greatest number of deliveries that are requested, waiting, or unsettled at once; 64 by
    /// default.
    ///
    /// # Panics
    ///
    /// Panics if it is zero.
    #[track_caller]
    pub fn prefetch(mut self, prefetch: usize) -> Self {
        assert!(prefetch > 0, "a prefetch of zero delivers nothing");
        self.prefetch = prefetch;
        self
    }

    /// Returns tower's concurrency limit of the [prefetch](Self::prefetch), to be placed outside the
    /// sentinel.
    ///
    /// For [`Consumer::reconnecting`](crate::Consumer::reconnecting), whose service is made before there is a
    /// subscription. It equals the [`gate`](super::Deliveries::gate) of the deliveries.
    pub fn gate(&self) -> ConcurrencyLimitLayer {
        ConcurrencyLimitLayer::new(self.prefetch)
    }

    /// Sets the subject that rejected messages are published to; none by default.
    ///
    /// A stream must store this subject, and must not be the stream of the jobs. Without a subject a rejected
    /// message is terminated and no copy of it is kept.
    pub fn dead_letter(mut self, subject: impl Into<String>) -> Self {
        self.dead_letter = Some(Subject::from(subject.into()));
        self
    }

    /// Sets the subject of [suspects](crate::settle::Settle::is_suspect), to which they are published unless they
    /// are run here; none by default.
    ///
    /// A suspect is a message that the server delivers again. The server does not report whether its worker gave
    /// it back or is gone, so each `Retry` and `Release` by a NAK makes a suspect. One by a
    /// [schedule](Self::schedules) does not: with this setting let schedules delay retries, and give each a
    /// delay.
    ///
    /// A stream must store this subject, and must not be the stream of the jobs. It takes a
    /// [`SentinelLayer::delivery_limit`](crate::SentinelLayer::delivery_limit) to keep suspects from being run
    /// here, and a second worker, which reads that stream with a [prefetch](Self::prefetch) of one.
    ///
    /// ```
    /// use tower_sentinel::broker::nats::Pull;
    ///
    /// let pull = Pull::new("jobs", "workers").dead_letter("dead.jobs").suspects("suspects.jobs");
    /// // A consumer of the stream with the subject `suspects.*`.
    /// let lane = Pull::new("suspects", "workers").dead_letter("dead.jobs").prefetch(1);
    /// # drop((pull, lane));
    /// ```
    pub fn suspects(mut self, subject: impl Into<String>) -> Self {
        self.suspects = Some(Subject::from(subject.into()));
        self
    }

    /// Sets the prefix of the schedules' subjects, and lets schedules delay retries; none by default.
    ///
    /// A delayed NAK counts toward the consumer's `max_ack_pending` until it is due, so many of them
    /// [stall](crate::_guide::nats#delayed-retries) the consumer. A schedule does not count. It is a copy of
    /// the message, published to `prefix.` followed by its sequence, and the server makes a new message from
    /// it at the time of the retry.
    ///
    /// It takes a server of 2.12 or later, and a work-queue stream with `allow_msg_schedules` that has the
    /// subjects `prefix.*` besides those of the jobs. The consumer's `filter_subject` must leave them out.
    ///
    /// ```
    /// use tower_sentinel::broker::nats::Pull;
    ///
    /// // A stream with the subjects `jobs` and `delayed.*`, and a consumer of `jobs`.
    /// let pull = Pull::new("jobs", "workers").schedules("delayed");
    /// ```
    pub fn schedules(mut self, prefix: impl Into<String>) -> Self {
        self.schedules = Some(Subject::from(prefix.into()));
        self
    }

    /// Sets the priority group of the worker; none by default.
    ///
    /// A consumer with priority groups, which servers have from 2.11 on, serves no request without a group.
    /// Of its policies `overflow` and `prioritized` work; `pinned_client` is refused.
    ///
    /// ```
    /// use tower_sentinel::broker::nats::Pull;
    ///
    /// // Helps when more than 1 000 jobs wait.
    /// let pull = Pull::new("jobs", "workers").group("all").min_pending(1_000);
    /// ```
    pub fn group(mut self, group: impl Into<String>) -> Self {
        self.priority.group = Some(group.into());
        self
    }

    /// Sets the number of jobs that must wait before the worker gets one, in a [group](Self::group) with the
    /// policy `overflow`.
    pub fn min_pending(mut self, jobs: usize) -> Self {
        self.priority.min_pending = Some(jobs);
        self
    }

    /// Sets the number of jobs that must be unacked before the worker gets one, in a [group](Self::group)
    /// with the policy `overflow`.
    pub fn min_ack_pending(mut self, jobs: usize) -> Self {
        self.priority.min_ack_pending = Some(jobs);
        self
    }

    /// Sets the worker's rank in a [group](Self::group) with the policy `prioritized`, from 0, which is
    /// served first, to 9; servers have it from 2.12 on.
    ///
    /// # Panics
    ///
    /// Panics above 9.
    #[track_caller]
    pub fn priority(mut self, rank: u8) -> Self {
        assert!(rank <= 9, "a priority is from 0 to 9");
        self.priority.rank = Some(rank.into());
        self
    }

    /// Sets the time that one settlement attempt waits for the server's confirmation; 4 s by default.
    ///
    /// A settlement that nobody takes, as while a leader is elected, is sent again within this time. So is one without
    /// a response, after 1 s and 3 s, unless it is a NAK.
    ///
    /// It has to be shorter than [`SettlePolicy::try_timeout`](crate::SettlePolicy::try_timeout), after which
    /// the tag is dropped: then a settlement can be tried again.
    pub fn confirm_timeout(mut self, limit: Duration) -> Self {
        self.confirm_timeout = limit;
        self
    }

    /// Sets the interval at which the server reports that a request still waits; 2 s by default.
    ///
    /// After twice this time without such a report, the request is treated as lost and made anew: so long may a worker
    /// wait after the leader of a cluster was killed. While
    /// nothing is requested, a deleted consumer is noticed after this time, too.
    ///
    /// # Panics
    ///
    /// Panics below 100 ms.
    #[track_caller]
    pub fn idle_heartbeat(mut self, interval: Duration) -> Self {
        let least = Duration::from_millis(100);
        assert!(interval >= least, "a heartbeat is at least 100 ms apart");
        self.idle_heartbeat = interval;
        self
    }

    /// Sets the time that JetStream may be silent before the subscription ends; 30 s by default.
    ///
    /// Until then a lost connection is bridged. The value is at least three times the
    /// [`idle_heartbeat`](Self::idle_heartbeat), as silence is not noticed earlier.
    pub fn reconnect_limit(mut self, limit: Duration) -> Self {
        self.reconnect_limit = limit;
        self
    }
}
