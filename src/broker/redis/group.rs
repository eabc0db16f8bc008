//! [`ConsumerGroup`], the builder of a subscription.

use std::time::Duration;

use tower::limit::ConcurrencyLimitLayer;

use super::{keys::Keys, reader::Timing};
use crate::broker::addresses::LIMIT_OF_ONE;

/// Builder of [`Deliveries`](super::Deliveries): a consumer group of a stream, and the settings of one consumer.
///
/// ```no_run
/// use std::time::Duration;
/// use tower_sentinel::broker::redis::ConsumerGroup;
///
/// # async fn example() -> Result<(), tower_sentinel::broker::redis::ConnectError> {
/// let deliveries = ConsumerGroup::new("jobs", "workers")
///     .prefetch(64)
///     .min_idle(Duration::from_secs(120))
///     .connect("redis://127.0.0.1:6379")
///     .await?;
/// assert_eq!(deliveries.prefetch(), 64);
/// # Ok(())
/// # }
/// ```
///
/// All of its settings, and the ways to connect:
///
/// ```no_run
/// use std::time::Duration;
/// use tower_sentinel::broker::redis::{ConsumerGroup, redis::Client};
///
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let group = ConsumerGroup::new("jobs", "workers")
///     .consumer("billing") // a prefix of the name that each subscription has
///     .payload_field("body")
///     .start("0") // a new group begins with the first entry
///     .poll_interval(Duration::from_millis(200))
///     .dead_letter("jobs.dead")
///     .suspects("jobs.suspects")
///     .delete_settled()
///     .connect_timeout(Duration::from_secs(5))
///     .response_timeout(Duration::from_secs(5))
///     .failover_timeout(Duration::from_secs(60));
/// println!("{} and {:?}", group.delayed_key(), group.dead_letter_key());
/// let gate = group.gate(); // a concurrency limit of as many jobs as the prefetch
///
/// let client = Client::open("redis://127.0.0.1:6379")?;
/// let deliveries = group.connect_with(&client).await?;
/// let sentinels = ["redis://10.0.0.1:26379", "redis://10.0.0.2:26379"];
/// let deliveries = group.connect_sentinel(sentinels, "redis://mymaster").await?;
///
/// // For `Consumer::reconnecting`.
/// let connector = group.connector("redis://127.0.0.1:6379");
/// let connector = group.clone().no_dead_letter().connector_with([&client]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct ConsumerGroup {
    pub(super) keys: Keys,
    pub(super) group: String,
    pub(super) consumer: String,
    pub(super) start: String,
    pub(super) prefetch: usize,
    pub(super) payload_field: String,
    pub(super) delete_settled: bool,
    pub(super) response_timeout: Duration,
    /// Limit of the connection to one server, if it is set.
    pub(super) connect_timeout: Option<Duration>,
    pub(super) failover_timeout: Duration,
    /// The number of replicas that have to confirm a settlement, and the time that they have.
    pub(super) replicas: Option<(usize, Duration)>,
    pub(super) timing: Timing,
}

impl ConsumerGroup {
    /// Creates the builder for `group`, which reads `stream`.
    pub fn new(stream: impl Into<String>, group: impl Into<String>) -> Self {
        let (stream, group) = (stream.into(), group.into());
        Self {
            keys: Keys::new(stream, &group, ""),
            group,
            consumer: "tower-sentinel".to_owned(),
            start: "0".to_owned(),
            prefetch: 64,
            payload_field: "payload".to_owned(),
            delete_settled: false,
            response_timeout: Duration::from_secs(5),
            connect_timeout: None,
            failover_timeout: Duration::from_secs(10),
            replicas: None,
            timing: Timing {
                poll_interval: Duration::from_millis(100),
                min_idle: Duration::from_secs(60),
            },
        }
    }

    /// Sets the greatest number of unsettled deliveries; 64 by default.
    ///
    /// Each read of new entries asks for a third of the free places, so that jobs come in a flow and not in
    /// bursts.
    ///
    /// # Panics
    ///
    /// Panics if it is 0: nothing would ever be read.
    #[track_caller]
    pub fn prefetch(mut self, prefetch: usize) -> Self {
        assert!(prefetch > 0, "a prefetch of 0 reads nothing");
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

    /// Sets the time without a settlement or a keep-alive after which an entry is given to another consumer;
    /// 60 s by default.
    ///
    /// It must be longer than the longest job, or each job must be kept alive. All consumers of a group must
    /// set the same value: for [this time](super#verdicts) they trust that an entry is theirs.
    ///
    /// # Panics
    ///
    /// Panics if it is less than 1 ms: each entry would be taken from the consumer that has just read it.
    #[track_caller]
    pub fn min_idle(mut self, min_idle: Duration) -> Self {
        assert!(
            min_idle >= Duration::from_millis(1),
            "an idle time of less than 1 ms"
        );
        self.timing.min_idle = min_idle;
        self
    }

    /// Sets the interval between two reads of entries that came back or whose delay is over; 100 ms by
    /// default.
    ///
    /// New entries don't wait for it. It is also the longest time that a close waits for the reader. Values
    /// above a minute count as a minute.
    ///
    /// # Panics
    ///
    /// Panics if it is less than 1 ms, the shortest that the server can wait.
    #[track_caller]
    pub fn poll_interval(mut self, interval: Duration) -> Self {
        assert!(
            interval >= Duration::from_millis(1),
            "a poll interval of less than 1 ms"
        );
        self.timing.poll_interval = interval.min(Duration::from_secs(60));
        self
    }

    /// Sets the time that the server may take to reply to a command before the connection counts as lost; 5 s
    /// by default.
    pub fn response_timeout(mut self, limit: Duration) -> Self {
        self.response_timeout = limit;
        self
    }

    /// Sets the time that the connection to one server may take, until it reads; 10 s by default, or 3 s where another
    /// server may serve as well: of several addresses, in a cluster, and for a sentinel and its primary.
    pub fn connect_timeout(mut self, limit: Duration) -> Self {
        self.connect_timeout = Some(limit);
        self
    }

    /// Sets the time for which a connect waits for the end of a failover; 10 s by default.
    ///
    /// It waits while servers respond, and none can serve the stream: a sentinel names a primary that is down or a
    /// replica; a cluster is down, or moves the stream's hash slot; a server loads its data. It asks again every 250 ms,
    /// so that it needs no longer than that after the failover. A server that does not respond at all is no failover.
    pub fn failover_timeout(mut self, limit: Duration) -> Self {
        self.failover_timeout = limit;
        self
    }

    /// Waits after each settlement, for up to `timeout`, until `number` replicas have it (`WAIT`); for none by default.
    ///
    /// A primary that is killed takes with it what its replicas don't have yet, and the new primary delivers those jobs
    /// again. This makes the time in which that can happen visible, and shorter.
    ///
    /// The settlement has taken effect on the primary in any case. If fewer replicas confirm it in time, the settlement
    /// ends with [`DeliveryError::NotReplicated`](super::DeliveryError::NotReplicated). That is
    /// [moot](crate::settle::Unsettled::moot): an event and a count, and the consumer goes on, since to give the job back
    /// is not possible any more.
    ///
    /// It promises no more than it says. `WAIT` is no consensus: a replica that has not confirmed may become the primary,
    /// and a replica confirms what it has in memory, not on its disk. Deliveries, keep-alives and entries that a close
    /// gives back are not waited for.
    ///
    /// The price is one more round trip, to the server and on to its replicas. Settlements that come at the same time
    /// share it. The connection of the settlements serves nothing else meanwhile, so if a replica is down each batch
    /// takes the whole `timeout`. It needs the right `+wait`.
    ///
    /// ```
    /// use std::time::Duration;
    /// use tower_sentinel::broker::redis::ConsumerGroup;
    ///
    /// let group = ConsumerGroup::new("jobs", "workers").wait_replicas(1, Duration::from_millis(200));
    /// # drop(group);
    /// ```
    ///
    /// # Panics
    ///
    /// Panics if `number` is 0, which waits for nothing, or `timeout` is less than 1 ms, which the server would take for
    /// no limit at all.
    #[track_caller]
    pub fn wait_replicas(mut self, number: usize, timeout: Duration) -> Self {
        assert!(number > 0, "a wait for no replica");
        assert!(
            timeout >= Duration::from_millis(1),
            "a wait of less than 1 ms"
        );
        self.replicas = Some((number, timeout));
        self
    }

    /// Sets the prefix of the consumer's name; `tower-sentinel` by default.
    ///
    /// Each subscription adds 16 random digits, so that no two have the same name: the name tells a consumer
    /// that lost an entry from the one that has it now.
    pub fn consumer(mut self, prefix: impl Into<String>) -> Self {
        self.consumer = prefix.into();
        self
    }

    /// Sets the name of the field that is an entry's payload; `payload` by default.
    pub fn payload_field(mut self, field: impl Into<String>) -> Self {
        self.payload_field = field.into();
        self
    }

    /// Sets the id after which the group begins to read if it is created; `0` by default, so that it begins
    /// with the stream's first entry.
    ///
    /// With `$` it reads the entries that are added from then on.
    pub fn start(mut self, id: impl Into<String>) -> Self {
        self.start = id.into();
        self
    }

    /// Sets the prefix of the [keys](crate::_guide::redis#keys) that are made for the group; empty by
    /// default.
    ///
    /// A stream of dead letters that is [named](Self::dead_letter) keeps its name.
    ///
    /// ```
    /// use tower_sentinel::broker::redis::ConsumerGroup;
    ///
    /// let group = ConsumerGroup::new("jobs", "workers").key_prefix("acme:");
    /// assert_eq!(group.delayed_key(), "acme:{jobs}:workers:delayed");
    /// assert_eq!(group.dead_letter_key(), Some("acme:{jobs}:workers:dead"));
    /// ```
    pub fn key_prefix(mut self, prefix: impl AsRef<str>) -> Self {
        self.keys = self.keys.prefixed(&self.group, prefix.as_ref());
        self
    }

    /// Sets the stream of dead letters; `{stream}:group:dead` by default.
    ///
    /// In a cluster it must be in the hash slot of the stream, or [`connect`](Self::connect) fails. Without a
    /// cluster it may have any name.
    pub fn dead_letter(mut self, stream: impl Into<String>) -> Self {
        self.keys.dead = Some(stream.into());
        self
    }

    /// Drops rejected entries.
    pub fn no_dead_letter(mut self) -> Self {
        self.keys.dead = None;
        self
    }

    /// Sets the stream of [suspects](crate::settle::Settle::is_suspect), to which they go unless they are run
    /// here; none by default.
    ///
    /// A suspect is an entry that was [reclaimed](Self::min_idle), as nobody has settled it. To tell it from one
    /// that was given back, with this setting `XNACK` is not used; so all consumers of the group must set it.
    ///
    /// It takes a [`SentinelLayer::delivery_limit`](crate::SentinelLayer::delivery_limit) to keep suspects from
    /// being run here, and a worker for the [lane](Self::lane). In a cluster the stream must be in the hash slot
    /// of the stream that is read, or [`connect`](Self::connect) fails.
    pub fn suspects(mut self, stream: impl Into<String>) -> Self {
        self.keys.suspects = Some(stream.into());
        self
    }

    /// Returns the builder for the stream of the [suspects](Self::suspects), which is read from its beginning
    /// with a prefetch of one. All other settings are the same, and so are the dead letters.
    ///
    /// ```
    /// use tower_sentinel::broker::redis::ConsumerGroup;
    ///
    /// let orders = ConsumerGroup::new("orders", "workers").suspects("{orders}:suspects");
    /// let lane = orders.lane();
    /// assert_eq!(lane.dead_letter_key(), orders.dead_letter_key());
    /// ```
    ///
    /// # Panics
    ///
    /// Panics if no [suspects](Self::suspects) are set.
    #[track_caller]
    pub fn lane(&self) -> Self {
        let keys = self.keys.of_suspects(&self.group);
        Self {
            keys: keys.expect("the group has a stream of suspects"),
            prefetch: 1,
            start: "0".to_owned(),
            ..self.clone()
        }
    }

    /// Deletes entries from the stream when they are acked or rejected.
    ///
    /// By default they stay until somebody trims the stream, since other groups may want them. From Redis 8.2
    /// on ([`XACKDEL`](crate::_guide::redis#servers)) an entry is deleted when the last group has acked it;
    /// before, and on Valkey, at once.
    pub fn delete_settled(mut self) -> Self {
        self.delete_settled = true;
        self
    }

    /// Returns the key of the sorted set of the entries that wait to be delivered again.
    pub fn delayed_key(&self) -> &str {
        &self.keys.delayed
    }

    /// Returns the key of the stream of dead letters, if they are kept.
    pub fn dead_letter_key(&self) -> Option<&str> {
        self.keys.dead.as_deref()
    }

    /// Returns the limit of the connection to one server, which is the only one or not.
    pub(super) fn limit_of_one(&self, is_only: bool) -> Duration {
        self.connect_timeout.unwrap_or(match is_only {
            true => Duration::from_secs(10),
            false => LIMIT_OF_ONE,
        })
    }

    /// Returns the time that a settlement may take until its reply.
    pub(super) fn patience(&self) -> Duration {
        // It may stand behind a wait for the replicas.
        let wait = self.replicas.map_or(Duration::ZERO, |(_, limit)| limit);
        self.response_timeout.saturating_add(wait)
    }
}
