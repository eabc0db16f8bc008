//! Jobs in Redis.

use std::env;

use tower_sentinel::broker::redis::{
    ConsumerGroup, Deliveries,
    redis::{AsyncCommands, Client, aio::MultiplexedConnection, pipe},
};

use super::{BODY, IN_FLIGHT};

/// A Redis, with names that nobody else uses.
pub(crate) struct Queue {
    pub(crate) address: String,
    pub(crate) prefix: String,
    pub(crate) connection: MultiplexedConnection,
    count: u32,
}

impl Queue {
    pub(crate) async fn connect() -> Result<Self, String> {
        let address = env::var("REDIS_ADDR").unwrap_or_else(|_| "redis://127.0.0.1:6379".into());
        let client = Client::open(address.as_str()).map_err(|error| error.to_string())?;
        let connecting = client.get_multiplexed_async_connection().await;
        Ok(Self {
            connection: connecting.map_err(|error| error.to_string())?,
            address,
            prefix: format!("bench-process-{}", std::process::id()),
            count: 0,
        })
    }

    /// Publishes jobs to a new stream, and returns its group.
    pub(crate) async fn publish(&mut self, jobs: u32) -> ConsumerGroup {
        self.count += 1;
        let stream = format!("{}-{}", self.prefix, self.count);
        let group = ConsumerGroup::new(&stream, "workers").prefetch(IN_FLIGHT);
        // Makes the group.
        drop(self.subscribe(&group).await);
        let mut batch = pipe();
        for _ in 0..jobs {
            batch.xadd(&stream, "*", &[("payload", BODY)]).ignore();
        }
        let () = batch
            .query_async(&mut self.connection)
            .await
            .expect("Redis takes jobs");
        group
    }

    pub(crate) async fn subscribe(&self, group: &ConsumerGroup) -> Deliveries {
        let connecting = group.connect(self.address.as_str()).await;
        connecting.expect("Redis is there")
    }

    /// Deletes all keys of this program.
    pub(crate) async fn clear(&mut self) {
        let pattern = format!("*{}*", self.prefix);
        let keys: Vec<String> = self.connection.keys(pattern).await.expect("Redis is there");
        if !keys.is_empty() {
            let () = self.connection.del(keys).await.expect("Redis is there");
        }
    }
}
