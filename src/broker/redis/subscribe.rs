//! Subscription of a [`ConsumerGroup`] at one server.

use std::{
    sync::{Arc, OnceLock, atomic::AtomicBool},
    time::Duration,
};

use ::redis::{Value, aio::MultiplexedConnection, cmd};
use tokio::{
    sync::{Semaphore, mpsc, oneshot},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::{
    ConnectError, ConsumerGroup, Deliveries,
    acks::Acks,
    channel::Channel,
    connect::Server,
    link::{Link, millis},
    probe::{Needs, Newer, Unfit, probe},
    reader::Reader,
    replicas::Replicas,
    standing::Standing,
};
use crate::outcome::guard;

impl ConsumerGroup {
    /// Connects to one server within `limit`, and begins to read.
    pub(super) async fn subscribe_at(
        &self,
        server: &Server,
        limit: Duration,
    ) -> Result<Deliveries, ConnectError> {
        let subscribed = timeout(limit, self.try_at(server)).await;
        subscribed.unwrap_or_else(|_| Err(server.timed_out()))
    }

    async fn try_at(&self, server: &Server) -> Result<Deliveries, ConnectError> {
        let lost = CancellationToken::new();
        let mut settling = server.open(self.patience(), &lost).await?;
        let patience = self
            .response_timeout
            .saturating_add(self.timing.poll_interval);
        let reading = server.open(patience, &lost).await?;
        let consumer = format!("{}-{:016x}", self.consumer, fastrand::u64(..));
        let needs = Needs {
            keys: &self.keys,
            deletes: self.delete_settled,
            waits: self.replicas.is_some(),
        };
        let probed = probe(&settling, needs, &consumer).await;
        let newer = probed.map_err(|unfit| self.unfit(server, unfit))?;
        let created = self.create(&mut settling).await;
        created.map_err(|error| self.unfit(server, error))?;
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
            Unfit::Misplaced(Standing::Replica, error) => ConnectError::ReadOnly { address, error },
            Unfit::Misplaced(Standing::Elsewhere, error) => ConnectError::Moved {
                address,
                stream,
                owner: server.owner(&error),
                error: None,
            },
            Unfit::Misplaced(Standing::Busy, error) => ConnectError::Unavailable {
                address,
                stream,
                error,
            },
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
            Err(error) if error.code() != Some("BUSYGROUP") => {
                Err(Unfit::of(&error).unwrap_or(Unfit::NoGroup(error)))
            }
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
        let newer = Newer {
            // An entry that comes back by it looks like one that nobody has settled.
            nack: newer.nack && self.keys.suspects.is_none(),
            ..newer
        };
        let link = Arc::new(Link {
            connection: settling,
            keys: self.keys.clone(),
            group: self.group.clone(),
            consumer,
            newer,
            delete_settled: self.delete_settled,
            min_idle: self.timing.min_idle,
            lease: self.timing.min_idle.saturating_sub(self.patience()),
            free: Semaphore::new(self.prefetch),
            replicas: self
                .replicas
                .map(|(number, limit)| Replicas::new(number, millis(limit))),
            lost,
            cause: OnceLock::new(),
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
