//! [`ConsumerGroup`], the builder of a subscription.

use std::{
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use ::redis::{Client, Value, aio::MultiplexedConnection, cmd};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tower::limit::ConcurrencyLimitLayer;

use super::{
    ConnectError, Deliveries,
    acks::Acks,
    channel::Channel,
    connect::Server,
    keys::Keys,
    link::Link,
    probe::{Newer, Unfit, probe},
    reader::{Reader, Timing},
};
use crate::outcome::guard;

/// Builder of [`Deliveries`]: a consumer group of a stream, and the settings of one consumer.
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
#[derive(Clone, Debug)]
pub struct ConsumerGroup {
    keys: Keys,
    group: String,
    consumer: String,
    start: String,
    prefetch: usize,
    payload_field: String,
    delete_settled: bool,
    response_timeout: Duration,
    timing: Timing,
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
    /// subscription. It equals the [`gate`](Deliveries::gate) of the deliveries.
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

    /// Connects to the server at `address`, creates the group and its stream if they are missing, and
    /// begins to read.
    ///
    /// An address is `redis://user:password@host:6379/0`, `rediss://…` by TLS, or
    /// `unix:///path?user=…&pass=…`; `valkey` is the same as `redis`. The signs `/`, `?`, `#`, `@`, `:`
    /// and `%` are percent-encoded in a user and a password: `redis://me:p%40ss%2Fw@host`. IPv6 has
    /// brackets: `redis://[::1]:6379`.
    ///
    /// `rediss` needs the feature `rustls` or `native-tls`; see [TLS](crate::_guide::redis#tls).
    ///
    /// # Errors
    ///
    /// [`ConnectError`], a line that names the address. There is one attempt: use a reconnect loop for more.
    /// A missing [right](crate::_guide::redis#rights) is an error here, since a script that is refused a
    /// command in its middle would be half done.
    ///
    /// # Panics
    ///
    /// Panics outside of a tokio runtime.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: only the group is left behind.
    pub async fn connect(&self, address: impl AsRef<str>) -> Result<Deliveries, ConnectError> {
        self.connect_to(Server::parse(address.as_ref())?).await
    }

    /// Connects to the server of `client`, like [`connect`](Self::connect).
    ///
    /// The client can hold more than an address: a certificate authority, your own certificate, or a password
    /// with any signs. It makes no connection itself.
    ///
    /// # Errors
    ///
    /// The errors of [`connect`](Self::connect).
    ///
    /// # Panics
    ///
    /// Panics outside of a tokio runtime.
    ///
    /// # Cancel safety
    ///
    /// The same as for [`connect`](Self::connect).
    pub async fn connect_with(&self, client: &Client) -> Result<Deliveries, ConnectError> {
        self.connect_to(Server::new(client)?).await
    }

    async fn connect_to(&self, server: Server) -> Result<Deliveries, ConnectError> {
        let lost = CancellationToken::new();
        let mut settling = server.open(self.response_timeout, &lost).await?;
        let patience = self
            .response_timeout
            .saturating_add(self.timing.poll_interval);
        let reading = server.open(patience, &lost).await?;
        let consumer = format!("{}-{:016x}", self.consumer, fastrand::u64(..));
        let probed = probe(&settling, &self.keys, self.delete_settled, &consumer).await;
        let newer = probed.map_err(|unfit| self.unfit(&server, unfit))?;
        let created = self.create(&mut settling).await;
        created.map_err(|error| self.unfit(&server, error))?;
        guard(|| {
            tracing::info!(
                address = server.place,
                stream = self.keys.stream,
                group = self.group,
                consumer,
                prefetch = self.prefetch,
                "subscribed to a group of redis"
            );
        });
        Ok(self.subscribe(consumer, newer, settling, reading, lost))
    }

    fn unfit(&self, server: &Server, unfit: Unfit) -> ConnectError {
        let (address, stream) = (server.place.clone(), self.keys.stream.clone());
        match unfit {
            Unfit::Failed(error) => server.refusal(error),
            Unfit::Forbidden {
                command,
                key,
                error,
            } => ConnectError::Forbidden {
                address,
                command,
                key,
                error,
            },
            Unfit::OtherSlot { key, error } => ConnectError::OtherSlot {
                address,
                stream,
                key,
                error,
            },
            Unfit::NoGroup(error) => ConnectError::Group {
                address,
                stream,
                group: self.group.clone(),
                error,
            },
        }
    }

    /// Creates the group, unless it is there.
    async fn create(&self, connection: &mut MultiplexedConnection) -> Result<(), Unfit> {
        let created: Result<Value, _> = cmd("XGROUP")
            .arg("CREATE")
            .arg(&self.keys.stream)
            .arg(&self.group)
            .arg(&self.start)
            .arg("MKSTREAM")
            .query_async(connection)
            .await;
        match created {
            Err(error) if error.code() == Some("NOPERM") => Err(Unfit::Forbidden {
                command: "XGROUP CREATE",
                key: Some(self.keys.stream.clone()),
                error,
            }),
            Err(error) if error.code() != Some("BUSYGROUP") => Err(Unfit::NoGroup(error)),
            _ => Ok(()),
        }
    }

    fn subscribe(
        &self,
        consumer: String,
        newer: Newer,
        settling: MultiplexedConnection,
        reading: MultiplexedConnection,
        lost: CancellationToken,
    ) -> Deliveries {
        let link = Arc::new(Link {
            connection: settling,
            keys: self.keys.clone(),
            group: self.group.clone(),
            consumer,
            newer,
            delete_settled: self.delete_settled,
            min_idle: self.timing.min_idle,
            lease: self.timing.min_idle.saturating_sub(self.response_timeout),
            free: Semaphore::new(self.prefetch),
            lost,
            closed: AtomicBool::new(false),
        });
        let acks = Acks::new();
        let channel = Arc::new(Channel { link, acks });
        let (incoming, reads) = mpsc::unbounded_channel();
        let (close, closing) = oneshot::channel();
        let reader = Reader::new(
            reading,
            Arc::clone(&channel),
            incoming,
            closing,
            self.timing,
            self.payload_field.clone(),
        );
        let reader = tokio::spawn(reader.run());
        let min_idle = self.timing.min_idle;
        Deliveries::new(reads, close, reader, channel, self.prefetch, min_idle)
    }
}
