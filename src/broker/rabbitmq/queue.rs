//! [`Queue`], the builder of a subscription.

use std::{collections::BTreeMap, time::Duration};

use lapin::{
    Channel,
    options::{BasicConsumeOptions, BasicQosOptions},
    types::{AMQPValue, FieldTable, ShortString},
};
use tokio::time::timeout;
use tower::limit::ConcurrencyLimitLayer;

use super::{
    connection::Connection,
    deliveries::Deliveries,
    delivery_limit::DeliveryLimit,
    error::SubscriptionError,
    kind::QueueKind,
    message::Reading,
    moves::Moves,
    opening::Opening,
    publish::Target,
    publisher::Publisher,
    retry_queues::RetryQueues,
    server,
    targets::{self, Targets, Unmet},
};
use crate::outcome::guard;

/// Default limit of a subscription.
const SUBSCRIBE_LIMIT: Duration = Duration::from_secs(10);

/// Builder of [`Deliveries`]: the name of a queue, and the settings to read it and to settle its jobs.
///
/// The queue must exist: its owner declares it, or a [connector](Self::connector) does if it is told to.
///
/// A classic queue that is read as a quorum one is an error of [`subscribe`](Self::subscribe). The type is
/// found by a request for an invalid consumer: the server names the type in its refusal (and logs a line). If
/// the names of the queue and of the virtual host have more than about 130 bytes together, the server cuts
/// the type off, and the queue is read as a quorum one. No job is lost then, but no redelivery is counted:
/// [`deliveries`](crate::settle::Settle::deliveries) is `None`. A quorum queue that is read as a classic one
/// works, and a `Retry` is slower than necessary.
///
/// ```no_run
/// use std::time::Duration;
/// use tower_sentinel::broker::rabbitmq::{self, Queue};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let connection = rabbitmq::connect("amqp://guest:guest@127.0.0.1:5672/%2f").await?;
/// let orders = Queue::quorum("orders")
///     .prefetch(64)
///     .dead_letter("orders.dead")
///     .suspects("orders.suspects")
///     .consumer_tag("billing-1")
///     .subscribe_timeout(Duration::from_secs(20))
///     .subscribe(&connection)
///     .await?;
///
/// let mails = Queue::classic("mails")
///     .dead_letter_exchange("dead", "mails")
///     .consumer_timeout(Duration::from_secs(300)) // as the server has it
///     .exclusive();
/// let gate = mails.gate(); // a concurrency limit of as many jobs as the prefetch
///
/// // On a server of version 4.3 or later, whose queue delays retries, and counts no release.
/// let reports = Queue::quorum("reports").delayed_retry().free_release();
/// let connector = reports.connector("amqp://guest:guest@127.0.0.1:5672/%2f");
/// # drop((orders, gate, connector));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
#[must_use = "nothing is delivered before `subscribe`"]
pub struct Queue {
    pub(super) name: String,
    pub(super) kind: QueueKind,
    prefetch: u16,
    pub(super) dead_letter: Option<(String, String)>,
    pub(super) suspects: Option<(String, Moves)>,
    /// Those into this queue, if it is a lane.
    pub(super) moves: Option<Moves>,
    retry_queues: BTreeMap<Duration, String>,
    pub(super) reading: Reading,
    consumer: ConsumerSettings,
    pub(super) subscribe_timeout: Option<Duration>,
}

/// Settings of the consumer.
#[derive(Clone, Debug, Default)]
struct ConsumerSettings {
    tag: String,
    is_exclusive: bool,
    arguments: FieldTable,
}

impl Queue {
    /// Creates the builder for the classic queue `name`.
    pub fn classic(name: impl Into<String>) -> Self {
        Self::new(name.into(), QueueKind::Classic)
    }

    /// Creates the builder for the quorum queue `name`.
    pub fn quorum(name: impl Into<String>) -> Self {
        Self::new(name.into(), QueueKind::Quorum)
    }

    pub(super) fn new(name: String, kind: QueueKind) -> Self {
        Self {
            name,
            kind,
            prefetch: 64,
            dead_letter: None,
            suspects: None,
            moves: None,
            retry_queues: BTreeMap::new(),
            reading: Reading {
                delivery_limit: DeliveryLimit::Assumed,
                delayed_retry: false,
                consumer_timeout: None,
                free_release: false,
            },
            consumer: ConsumerSettings::default(),
            subscribe_timeout: None,
        }
    }

    /// Sets the greatest number of unsettled jobs at a time; 64 by default.
    ///
    /// It is the prefetch of the channel and the number of the [`gate`](Deliveries::gate).
    ///
    /// # Panics
    ///
    /// Panics if it is zero, which means no limit in AMQP, or above 65535, the largest value in AMQP.
    #[track_caller]
    pub fn prefetch(mut self, prefetch: usize) -> Self {
        assert!(prefetch > 0, "a prefetch of zero is no limit in amqp");
        self.prefetch = u16::try_from(prefetch).expect("a prefetch is at most 65535");
        self
    }

    /// Returns tower's concurrency limit of the [prefetch](Self::prefetch), to be placed outside the
    /// sentinel.
    ///
    /// For [`Consumer::reconnecting`](crate::Consumer::reconnecting), whose service is made before there is a
    /// subscription. It equals the [`gate`](Deliveries::gate) of the deliveries.
    pub fn gate(&self) -> ConcurrencyLimitLayer {
        ConcurrencyLimitLayer::new(self.prefetch.into())
    }

    /// Sets the queue that rejected jobs are published to, with the reason in their headers.
    ///
    /// It is not declared here: if it does not exist, `subscribe` fails. If it is deleted later, a `Reject`
    /// fails as [misconfigured](crate::settle::Unsettled::misconfigured), and the job stays.
    pub fn dead_letter(self, queue: impl Into<String>) -> Self {
        self.dead_letter_exchange("", queue)
    }

    /// Sets the exchange and the routing key that rejected jobs are published with.
    ///
    /// As with [`dead_letter`](Self::dead_letter), the exchange has to exist. A queue has to take the jobs.
    pub fn dead_letter_exchange(
        mut self,
        exchange: impl Into<String>,
        routing_key: impl Into<String>,
    ) -> Self {
        self.dead_letter = Some((exchange.into(), routing_key.into()));
        self
    }

    /// Returns the queue of the dead letters, if they go to one by its name.
    pub(super) fn dead_letter_queue(&self) -> Option<&str> {
        let (exchange, queue) = self.dead_letter.as_ref()?;
        exchange.is_empty().then_some(queue)
    }

    /// Adds a retry queue for a `delay`, which its owner declares. By default there are none, and retry
    /// queues are [declared](crate::_guide::rabbitmq#delays) when they are needed.
    ///
    /// With one that is added, none is declared, so the user needs no right to configure queues. A `Retry`
    /// waits in the queue with the least delay that is not below its own. A longer delay than all of them
    /// fails as [misconfigured](crate::settle::Unsettled::misconfigured). Each queue must exist at the time
    /// of `subscribe`.
    ///
    /// Declare it with these arguments, and without `x-expires`. With another type, or without
    /// `at-least-once`, the way back is not confirmed, and a job can be lost there.
    ///
    /// | argument | value |
    /// | --- | --- |
    /// | `x-queue-type` | `quorum` |
    /// | `x-message-ttl` | the delay in milliseconds |
    /// | `x-dead-letter-exchange` | `""` |
    /// | `x-dead-letter-routing-key` | the name of the queue that is read |
    /// | `x-dead-letter-strategy` | `at-least-once` |
    /// | `x-overflow` | `reject-publish` |
    ///
    /// ```
    /// use std::time::Duration;
    /// use tower_sentinel::broker::rabbitmq::Queue;
    ///
    /// let orders = Queue::classic("orders")
    ///     .retry_queue(Duration::from_secs(10), "orders.in-10-s")
    ///     .retry_queue(Duration::from_secs(600), "orders.in-10-min");
    /// ```
    pub fn retry_queue(mut self, delay: Duration, name: impl Into<String>) -> Self {
        self.retry_queues.insert(delay, name.into());
        self
    }

    /// Sets the delivery limit of a quorum queue, its `x-delivery-limit`; `None` if it has none (`-1`).
    ///
    /// If a job fails more often than the limit, the queue sends it to its own dead-letter exchange, or drops
    /// it. AMQP does not report the limit. By default this crate assumes the 20 that servers from 4.0 on give
    /// to a queue without one, and [`subscribe`](Self::subscribe) logs a warning.
    ///
    /// A `Retry` or `Release` that would bring a job over half of the limit publishes it anew, to the end of
    /// the queue, so that its failures don't exceed the limit. Its count goes on in `x-deliveries`. The other
    /// half is left to the ends of channels, which count and which no adapter can replace. To lose no job by
    /// them either, declare the queue with `x-delivery-limit: -1` (from 4.0 on; before, there is no limit
    /// unless one is set) or with a dead-letter exchange, and set `delivery_limit(None)`. Then each `Retry`
    /// without a delay is a `basic.reject`, and the queue applies its limit. To bound the number of attempts,
    /// use [`DecisionExt::delivery_limit`](crate::DecisionExt::delivery_limit).
    ///
    /// Without effect on classic queues.
    ///
    /// ```
    /// use tower_sentinel::broker::rabbitmq::Queue;
    ///
    /// let orders = Queue::quorum("orders").delivery_limit(None); // x-delivery-limit: -1
    /// let mails = Queue::quorum("mails").delivery_limit(50);
    /// # drop((orders, mails));
    /// ```
    pub fn delivery_limit(mut self, limit: impl Into<Option<u32>>) -> Self {
        self.reading.delivery_limit = DeliveryLimit::Known(limit.into());
        self
    }

    /// Sets the time for which the server waits for the settlement of a delivery, as the consumer's
    /// `x-consumer-timeout`; by default that of the queue or of the server.
    ///
    /// For quorum queues from RabbitMQ 4.3 on, tested with 4.3.6; 3.10 and 4.0 ignore it. It is rounded up to
    /// milliseconds. A later settlement is refused as [lost](super::DeliveryError::Lost), and nothing is
    /// published: the server gives the job to others. The time counts from the receipt here, and the server
    /// counts from its send. So an ack of the last moment may be in time here and too late at the server, by
    /// the time that the delivery was on its way. See [the consumer
    /// timeout](crate::_guide::rabbitmq#the-consumer-timeout).
    ///
    /// Without effect on classic queues, which have none from 4.3 on.
    ///
    /// # Panics
    ///
    /// Panics if it is zero, or above 2³² − 1 ms (49 days).
    #[track_caller]
    pub fn consumer_timeout(mut self, timeout: Duration) -> Self {
        assert!(
            !timeout.is_zero(),
            "a consumer timeout of zero lets no job end"
        );
        let millis = u32::try_from(timeout.as_nanos().div_ceil(1_000_000));
        let millis = millis.expect("a consumer timeout is at most 49 days");
        if self.kind == QueueKind::Quorum {
            self.reading.consumer_timeout = Some(Duration::from_millis(millis.into()));
            let millis = AMQPValue::LongLongInt(millis.into());
            let arguments = &mut self.consumer.arguments;
            arguments.insert("x-consumer-timeout".into(), millis);
        }
        self
    }

    /// States that the quorum queue delays rejected jobs, by `x-delayed-retry-type`, from RabbitMQ 4.3 on:
    /// then a `Retry` after a delay is `basic.reject`, without a retry queue.
    ///
    /// **The delay is the queue's, and not that of the verdict**: `x-delayed-retry-min` times the failed
    /// deliveries that the queue has counted, at most `x-delayed-retry-max`. The verdict's own delay is
    /// ignored, except that there is one. So don't set this if the verdict's delay matters.
    ///
    /// The type should be `failed`: with `all`, released jobs are delayed, too. A `Retry` without a delay is
    /// published to the end of the queue. Near the [delivery limit](Self::delivery_limit) a delayed one goes
    /// by a retry queue, with the verdict's delay. So does each delayed `Release`, which the queue would
    /// count.
    ///
    /// A queue without such a delay gives the job back at once; this crate can't detect that. Without effect
    /// on classic queues.
    pub fn delayed_retry(mut self) -> Self {
        self.reading.delayed_retry = self.kind == QueueKind::Quorum;
        self
    }

    /// Sets the consumer tag, by which the server lists the subscription; the server chooses it by default.
    pub fn consumer_tag(mut self, tag: impl Into<String>) -> Self {
        self.consumer.tag = tag.into();
        self
    }

    /// Sets an argument of the consumer, such as `x-priority`.
    ///
    /// ```
    /// use tower_sentinel::broker::rabbitmq::Queue;
    ///
    /// let standby = Queue::quorum("orders").consumer_argument("x-priority", -10);
    /// # drop(standby);
    /// ```
    ///
    /// # Panics
    ///
    /// Panics if the name is longer than AMQP's 255 bytes.
    #[track_caller]
    pub fn consumer_argument(mut self, name: &str, value: impl Into<AMQPValue>) -> Self {
        let name =
            ShortString::try_new(name).expect("the name of an argument has at most 255 bytes");
        self.consumer.arguments.insert(name, value.into());
        self
    }

    /// Reads the queue exclusively: the server refuses any other consumer, and refuses this one if there is
    /// another.
    ///
    /// For classic queues. Quorum queues ignore it (tested on 3.10, 4.0 and 4.3): declare them with
    /// `x-single-active-consumer`.
    pub fn exclusive(mut self) -> Self {
        self.consumer.is_exclusive = true;
        self
    }

    /// States that the server charges no delivery for a `Release`, as with quorum queues from RabbitMQ 4.3
    /// on.
    ///
    /// [`subscribe`](Self::subscribe) detects it by itself if the user may configure the queue's retry
    /// queues.
    ///
    /// Without effect on classic queues, where it is always so.
    pub fn free_release(mut self) -> Self {
        self.reading.free_release = true;
        self
    }

    /// Sets the time that [`subscribe`](Self::subscribe) waits for the server; 10 s by default, or 5 s for each
    /// of several addresses of a [connector](Self::connector).
    ///
    /// A quorum queue without a leader makes it wait.
    pub fn subscribe_timeout(mut self, limit: Duration) -> Self {
        self.subscribe_timeout = Some(limit);
        self
    }

    /// Opens a channel on `connection` and subscribes.
    ///
    /// A second channel, with publisher confirms, republishes jobs. It is on the [connection that
    /// publishes](Connection).
    ///
    /// If the user does not have the right to configure the [retry queues](crate::_guide::rabbitmq#delays),
    /// it logs an event at level WARN. Then each verdict with a delay fails as
    /// [misconfigured](crate::settle::Unsettled::misconfigured).
    ///
    /// # Errors
    ///
    /// If the queue does not exist, is read exclusively or has another type, if the queue or exchange of its
    /// dead letters, suspects or retries does not exist, if a name is too long, if a connection is lost, or if the
    /// [time](Self::subscribe_timeout) is up.
    ///
    /// Some of them also end the connection, for example if a quorum queue has lost its leader. So connect
    /// anew before you try again.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: channels that were opened are closed, and delivered jobs go back. This also holds at the
    /// end of the [time](Self::subscribe_timeout). If the server does not close the channel, for example since
    /// the queue has no leader, the connection that consumes is closed: 5 s and two heartbeats later, 25 s by
    /// default.
    pub async fn subscribe(self, connection: &Connection) -> Result<Deliveries, SubscriptionError> {
        let name = short(self.name.clone())?;
        let retry_queues = RetryQueues::new(&name, &self.retry_queues)?;
        let dead_letter = match &self.dead_letter {
            Some((exchange, routing_key)) => Some(Target {
                exchange: short(exchange.clone())?,
                routing_key: short(routing_key.clone())?,
            }),
            None => None,
        };
        let suspects = match &self.suspects {
            Some((queue, moves)) => Some((Target::of_queue(short(queue.clone())?), moves.clone())),
            None => None,
        };
        let targets = Targets {
            dead_letter,
            suspects,
        };
        let tag = short(self.consumer.tag.clone())?;
        let limit = self.subscribe_timeout.unwrap_or(SUBSCRIBE_LIMIT);
        let opening = self.open(connection, name, tag, targets, retry_queues);
        match timeout(limit, opening).await {
            Ok(opened) => opened,
            Err(_) => Err(SubscriptionError::TimedOut {
                queue: self.name,
                limit,
            }),
        }
    }

    async fn open(
        &self,
        connection: &Connection,
        name: ShortString,
        tag: ShortString,
        targets: Targets,
        mut retry_queues: RetryQueues,
    ) -> Result<Deliveries, SubscriptionError> {
        let refused = |error| self.refused(error);
        if self.kind == QueueKind::Quorum {
            let is_classic = server::is_classic(connection, &name).await;
            if is_classic.map_err(refused)? {
                return Err(SubscriptionError::NotQuorum {
                    queue: self.name.clone(),
                });
            }
        }
        targets::check(connection, &name, &targets, &mut retry_queues)
            .await
            .map_err(|unmet| match unmet {
                Unmet::NoTarget { target, error } => SubscriptionError::NoTarget {
                    queue: self.name.clone(),
                    target,
                    error: Box::new(error),
                },
                Unmet::Client(error) => self.refused(error),
            })?;
        let publishing = connection.publisher();
        let opened = publishing.open().await;
        let opened = opened.map_err(|error| SubscriptionError::NoPublisher {
            queue: self.name.clone(),
            error: Box::new(error),
        })?;
        let publisher = Publisher::open(
            (publishing, opened),
            name.clone(),
            self.kind,
            targets,
            retry_queues,
        );
        let publisher = publisher.await.map_err(refused)?;
        let consumed = self.consume(connection, name, tag).await;
        let (channel, consumer, reading) = consumed.map_err(refused)?;
        guard(|| {
            let (queue, prefetch) = (&self.name, self.prefetch);
            tracing::info!(queue, prefetch, "subscribed to a queue of rabbitmq");
        });
        Ok(Deliveries::new(
            channel,
            consumer,
            connection.consuming(),
            publisher,
            self.moves.clone(),
            self.prefetch,
            reading,
        ))
    }

    async fn consume(
        &self,
        connection: &Connection,
        name: ShortString,
        tag: ShortString,
    ) -> lapin::Result<(Channel, lapin::Consumer, Reading)> {
        let opening = Opening::open(connection.consuming()).await?;
        let channel = opening.channel();
        channel
            .basic_qos(self.prefetch, BasicQosOptions::default())
            .await?;
        let mut reading = self.reading;
        if self.kind == QueueKind::Quorum {
            reading.free_release |= server::counts_no_nack(connection, &self.name).await?;
            self.warn();
        }
        let options = BasicConsumeOptions {
            exclusive: self.consumer.is_exclusive,
            ..BasicConsumeOptions::default()
        };
        let arguments = self.consumer.arguments.clone();
        let consumer = channel.basic_consume(name, tag, options, arguments).await?;
        Ok((opening.made(), consumer, reading))
    }

    /// Logs a warning for settings that no adapter can mend.
    fn warn(&self) {
        if self.reading.delivery_limit == DeliveryLimit::Assumed {
            guard(|| {
                tracing::warn!(
                    queue = self.name,
                    "a quorum queue may drop jobs over its delivery limit, which is 20 from rabbitmq 4.0 \
                 on and counts the ends of channels: set x-delivery-limit to -1, or a dead-letter \
                 exchange, and tell it by `Queue::delivery_limit`"
                );
            });
        }
    }

    fn refused(&self, error: lapin::Error) -> SubscriptionError {
        match error.is_io_error() {
            true => SubscriptionError::ConnectionLost(error),
            false => SubscriptionError::Refused {
                queue: self.name.clone(),
                error,
            },
        }
    }
}

pub(super) fn short(name: String) -> Result<ShortString, SubscriptionError> {
    ShortString::try_new(name.as_str()).map_err(|_| SubscriptionError::NameTooLong { name })
}
