//! A consumer group, and redis with a connection to read and one to ack.

use std::{collections::VecDeque, sync::Arc};

use futures_util::stream;
use tokio::sync::Semaphore;
use tower_sentinel::broker::redis::{
    ConsumerGroup,
    redis::{
        AsyncCommands, Client,
        aio::MultiplexedConnection,
        pipe,
        streams::{StreamReadOptions, StreamReadReply},
    },
};

use super::{BoxError, Broker, Figures, PREFETCH, by_hand, supervised};

const GROUP: &str = "workers";

pub(crate) struct Redis {
    address: String,
    client: Client,
    group: ConsumerGroup,
    stream: String,
}

impl Redis {
    async fn open(&self) -> Result<MultiplexedConnection, BoxError> {
        Ok(self.client.get_multiplexed_async_connection().await?)
    }
}

impl Broker for Redis {
    const NAME: &str = "redis";
    const ADDRESS: (&str, &str) = ("REDIS_ADDR", "redis://127.0.0.1:6379");
    const ACKS: &[&str] = &["XACK"];

    async fn connect(address: &str, stream: String) -> Result<Self, BoxError> {
        let group = ConsumerGroup::new(&stream, GROUP).prefetch(PREFETCH);
        // Makes the group.
        drop(group.connect(address).await?);
        Ok(Self {
            address: address.to_owned(),
            client: Client::open(address)?,
            group,
            stream,
        })
    }

    async fn publish(&self, jobs: u64) -> Result<(), BoxError> {
        let mut connection = self.open().await?;
        let mut batch = pipe();
        for n in 1..=jobs {
            batch
                .xadd(&self.stream, "*", &[("payload", "job")])
                .ignore();
            if n % 1_000 == 0 || n == jobs {
                () = batch.query_async(&mut connection).await?;
                batch.clear();
            }
        }
        Ok(())
    }

    async fn ours(&self, jobs: u64) -> Result<Figures, BoxError> {
        let deliveries = self.group.connect(self.address.as_str()).await?;
        let gate = deliveries.gate();
        supervised(deliveries, gate, jobs).await
    }

    async fn bare(&self, _: &str, jobs: u64) -> Result<Figures, BoxError> {
        let permits = Arc::new(Semaphore::new(PREFETCH));
        let free = Arc::clone(&permits);
        let state = (self.open().await?, VecDeque::new());
        let entries = stream::try_unfold(state, |(mut connection, mut read)| {
            let free = Arc::clone(&free);
            async move {
                while read.is_empty() {
                    // The one that waits has its permit already.
                    let options = StreamReadOptions::default()
                        .group(GROUP, "bare")
                        .count(1 + free.available_permits())
                        .block(100);
                    let reply: Option<StreamReadReply> = connection
                        .xread_options(&[&self.stream], &[">"], &options)
                        .await?;
                    let keys = reply.into_iter().flat_map(|reply| reply.keys);
                    read.extend(keys.flat_map(|key| key.ids));
                }
                let entry = read.pop_front();
                Ok::<_, BoxError>(entry.map(|entry| (entry.id, (connection, read))))
            }
        });
        let (connection, stream) = (self.open().await?, self.stream.clone());
        let ack = move |id: String| {
            let (mut connection, stream) = (connection.clone(), stream.clone());
            async move { Ok(connection.xack(stream, GROUP, &[id]).await?) }
        };
        by_hand(permits, entries, ack, jobs).await
    }

    async fn delete(self) -> Result<(), BoxError> {
        let mut connection = self.open().await?;
        let keys = [
            Some(self.stream.as_str()),
            Some(self.group.delayed_key()),
            self.group.dead_letter_key(),
        ];
        let keys: Vec<_> = keys.into_iter().flatten().collect();
        Ok(connection.del(keys).await?)
    }
}
