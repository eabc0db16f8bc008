//! [`Queue`]: how a queue is read, and what happens to the jobs that fail.

use std::time::Duration;

use lapin::{
    Channel, Connection,
    options::{BasicConsumeOptions, BasicQosOptions, ConfirmSelectOptions},
    types::{FieldTable, ShortString},
};
use tokio::time::timeout;
use tower::limit::ConcurrencyLimitLayer;

use super::{
    Deliveries, SubscriptionError,
    publisher::{Publisher, Target},
};

/// Of which type a queue is: RabbitMQ does not tell a consumer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum QueueKind {
    /// A classic queue, which counts no deliveries.
    Classic,
    /// A quorum queue, which counts failed deliveries in `x-delivery-count`.
    Quorum,
}

/// How a queue is read: the builder of [`Deliveries`].
///
/// The queue must exist; its owner declares it.
///
/// If a classic queue is taken for a quorum one, no job is lost, but none of its redeliveries is
/// counted: [`deliveries`](crate::Settle::deliveries) is `None` then. The other way round all works,
/// and a `Retry` is slower than it need be.
#[derive(Clone, Debug)]
#[must_use = "nothing is delivered before `subscribe`"]
pub struct Queue {
    pub(super) name: String,
    pub(super) kind: QueueKind,
    prefetch: u16,
    dead_letter: Option<(String, String)>,
    free_release: bool,
    subscribe_timeout: Duration,
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

    fn new(name: String, kind: QueueKind) -> Self {
        Self {
            name,
            kind,
            prefetch: 64,
            dead_letter: None,
            free_release: false,
            subscribe_timeout: Duration::from_secs(10),
        }
    }

    /// Sets how many jobs may be unanswered at a time; 64 by default.
    ///
    /// It is the prefetch of the channel and the number of the [`gate`](Deliveries::gate).
    ///
    /// # Panics
    ///
    /// Panics if it is zero, which AMQP takes for no limit, or above 65535, the largest that AMQP
    /// has.
    #[track_caller]
    pub fn prefetch(mut self, prefetch: usize) -> Self {
        assert!(prefetch > 0, "a prefetch of zero is no limit in amqp");
        self.prefetch = u16::try_from(prefetch).expect("a prefetch is at most 65535");
        self
    }

    /// Returns tower's concurrency limit of the [prefetch](Self::prefetch), for the outside of the
    /// sentinel.
    ///
    /// For [`Consumer::reconnecting`](crate::Consumer::reconnecting), whose service is made before
    /// there is a subscription; it is the [`gate`](Deliveries::gate) of what this subscribes.
    pub fn gate(&self) -> ConcurrencyLimitLayer {
        ConcurrencyLimitLayer::new(self.prefetch.into())
    }

    /// Sets the queue that rejected jobs are published to, with the reason in their headers.
    ///
    /// It is not declared here: without it a `Reject` fails, and the job is redelivered.
    pub fn dead_letter(self, queue: impl Into<String>) -> Self {
        self.dead_letter_exchange("", queue)
    }

    /// Sets the exchange and the routing key that rejected jobs are published with.
    ///
    /// As for [`dead_letter`](Self::dead_letter), a queue has to take them.
    pub fn dead_letter_exchange(
        mut self,
        exchange: impl Into<String>,
        routing_key: impl Into<String>,
    ) -> Self {
        self.dead_letter = Some((exchange.into(), routing_key.into()));
        self
    }

    /// Says that the server charges no delivery for a `Release`, as quorum queues do from RabbitMQ
    /// 4.3 on.
    ///
    /// Without effect on classic queues, where it is always so.
    pub fn free_release(mut self) -> Self {
        self.free_release = true;
        self
    }

    /// Sets how long [`subscribe`](Self::subscribe) waits for the server; 10 s by default.
    ///
    /// A quorum queue that has no leader yet lets it wait.
    pub fn subscribe_timeout(mut self, limit: Duration) -> Self {
        self.subscribe_timeout = limit;
        self
    }

    /// Opens a channel on `connection` and subscribes.
    ///
    /// A second channel, with publisher confirms, is for what has to be republished: an exchange
    /// that does not exist then ends no subscription.
    ///
    /// # Errors
    ///
    /// If the queue does not exist or is read exclusively, if a name is too long, if the connection
    /// is lost, or if the [time](Self::subscribe_timeout) is up.
    ///
    /// Some of them end the connection too, such as that of a quorum queue that has lost its leader.
    /// So whoever tries again connects anew.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: channels that were opened are closed, and what was delivered goes back.
    pub async fn subscribe(self, connection: &Connection) -> Result<Deliveries, SubscriptionError> {
        let longest = format!("{}.retry.2147483648", self.name);
        short(longest)?;
        let name = short(self.name.clone())?;
        let dead_letter = match &self.dead_letter {
            Some((exchange, routing_key)) => Some(Target {
                exchange: short(exchange.clone())?,
                routing_key: short(routing_key.clone())?,
            }),
            None => None,
        };
        let limit = self.subscribe_timeout;
        let Ok(opened) = timeout(limit, self.open(connection, name.clone())).await else {
            let queue = self.name;
            return Err(SubscriptionError::TimedOut { queue, limit });
        };
        let (channel, publishing, consumer) =
            opened.map_err(|error| match error.is_io_error() {
                true => SubscriptionError::ConnectionLost(error),
                false => SubscriptionError::Refused {
                    queue: self.name,
                    error,
                },
            })?;
        let publisher = Publisher::new(publishing, name, self.kind, dead_letter);
        Ok(Deliveries::new(
            channel,
            consumer,
            connection.status().clone(),
            publisher,
            self.prefetch,
            self.free_release,
        ))
    }

    async fn open(
        &self,
        connection: &Connection,
        name: ShortString,
    ) -> lapin::Result<(Channel, Channel, lapin::Consumer)> {
        let publishing = connection.create_channel().await?;
        publishing
            .confirm_select(ConfirmSelectOptions::default())
            .await?;
        let channel = connection.create_channel().await?;
        channel
            .basic_qos(self.prefetch, BasicQosOptions::default())
            .await?;
        let options = BasicConsumeOptions::default();
        let consumer = channel
            .basic_consume(name, "".into(), options, FieldTable::default())
            .await?;
        Ok((channel, publishing, consumer))
    }
}

fn short(name: String) -> Result<ShortString, SubscriptionError> {
    ShortString::try_new(name.as_str()).map_err(|_| SubscriptionError::NameTooLong { name })
}
