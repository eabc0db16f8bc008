//! Jobs from a Redis stream that complete, fail, panic and hang, and their counts on the broker.
//!
//! ```sh
//! REDIS_ADDR=redis://127.0.0.1:6379 cargo run --features redis --example redis
//! ```
//!
//! This file has the code for Redis; the program is in `mixed_jobs`. Each run makes its own keys; a run that
//! is killed leaves them behind. `PREFETCH` sets the number of jobs in flight.

mod mixed_jobs;

use std::process::ExitCode;

use tower_sentinel::broker::redis::{
    ConsumerGroup, Deliveries, Delivery,
    redis::{
        AsyncCommands, Client,
        aio::MultiplexedConnection,
        streams::{StreamInfoGroupsReply, StreamPendingReply},
    },
};

use self::mixed_jobs::BoxError;

/// Environment variable of the broker's address, and its default.
const ADDRESS: (&str, &str) = ("REDIS_ADDR", "redis://127.0.0.1:6379");

/// The consumer group.
const GROUP: &str = "workers";

#[tokio::main]
async fn main() -> ExitCode {
    mixed_jobs::main().await
}

/// A stream for the jobs, and the keys of its consumer group.
struct Broker {
    address: String,
    connection: MultiplexedConnection,
    group: ConsumerGroup,
    jobs: String,
}

impl Broker {
    async fn connect(address: &str, jobs: String) -> Result<Self, BoxError> {
        let group = ConsumerGroup::new(&jobs, GROUP);
        // Creates the group. Its error names the address.
        drop(group.connect(address).await?);
        let client = Client::open(address)?;
        Ok(Self {
            address: address.to_owned(),
            connection: client.get_multiplexed_async_connection().await?,
            group,
            jobs,
        })
    }

    fn name(&self) -> &str {
        &self.jobs
    }

    async fn publish(&self, body: &str) -> Result<(), BoxError> {
        let fields = [("payload", body)];
        let mut connection = self.connection.clone();
        Ok(connection.xadd(&self.jobs, "*", &fields).await?)
    }

    async fn subscribe(&self, prefetch: usize) -> Result<Deliveries, BoxError> {
        let group = self.group.clone().prefetch(prefetch);
        Ok(group.connect(self.address.as_str()).await?)
    }

    /// Returns the number of jobs that the group has not read yet, and of those that wait for a redelivery.
    async fn ready(&self) -> Result<u64, BoxError> {
        let mut connection = self.connection.clone();
        let delayed: u64 = connection.zcard(self.group.delayed_key()).await?;
        let info: StreamInfoGroupsReply = connection.xinfo_groups(&self.jobs).await?;
        let group = info.groups.iter().find(|group| group.name == GROUP);
        let unread = group.and_then(|group| group.lag);
        Ok(delayed + unread.ok_or("the group is gone")? as u64)
    }

    async fn unsettled(&self) -> Result<u64, BoxError> {
        let mut connection = self.connection.clone();
        let pending: StreamPendingReply = connection.xpending(&self.jobs, GROUP).await?;
        Ok(self.ready().await? + pending.count() as u64)
    }

    async fn dead_lettered(&self) -> Result<u64, BoxError> {
        let mut connection = self.connection.clone();
        Ok(connection.xlen(self.group.dead_letter_key()).await?)
    }

    async fn delete(mut self) -> Result<(), BoxError> {
        let keys = [
            Some(self.jobs.as_str()),
            Some(self.group.delayed_key()),
            self.group.dead_letter_key(),
        ];
        let keys: Vec<_> = keys.into_iter().flatten().collect();
        Ok(self.connection.del(keys).await?)
    }
}
