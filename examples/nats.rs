//! Jobs from a JetStream consumer that complete, fail, panic and hang, and their counts on the broker.
//!
//! ```sh
//! NATS_ADDR=nats://127.0.0.1:4222 cargo run --features nats --example nats
//! ```
//!
//! This file has the code for JetStream; the program is in `mixed_jobs`. Each run makes its own streams; a
//! run that is killed leaves them behind. `PREFETCH` sets the number of jobs in flight.

mod mixed_jobs;

use std::process::ExitCode;

use tower_sentinel::broker::nats::{
    self, Deliveries, Delivery, Pull,
    async_nats::jetstream::{
        self, Context,
        consumer::{self, AckPolicy, PullConsumer, pull},
        stream::{self, RetentionPolicy, StorageType},
    },
};

use self::mixed_jobs::BoxError;

/// Environment variable of the broker's address, and its default.
const ADDRESS: (&str, &str) = ("NATS_ADDR", "nats://127.0.0.1:4222");

#[tokio::main]
async fn main() -> ExitCode {
    mixed_jobs::main().await
}

/// A stream for the jobs, a stream for the dead letters, and a consumer of the first one.
struct Broker {
    context: Context,
    consumer: PullConsumer,
    jobs: String,
    dead_letters: String,
}

impl Broker {
    async fn connect(address: &str, name: String) -> Result<Self, BoxError> {
        let context = jetstream::new(nats::connect(address).await?);
        let (jobs, dead_letters) = (format!("{name}-jobs"), format!("{name}-dead-letters"));
        for (name, retention) in [
            (&dead_letters, RetentionPolicy::Limits),
            (&jobs, RetentionPolicy::WorkQueue),
        ] {
            let config = stream::Config {
                name: name.clone(),
                subjects: vec![name.clone()],
                retention,
                storage: StorageType::Memory,
                ..stream::Config::default()
            };
            context.create_stream(config).await?;
        }
        let config = pull::Config {
            durable_name: Some("workers".to_owned()),
            ack_policy: AckPolicy::Explicit,
            ..pull::Config::default()
        };
        let consumer = context.create_consumer_on_stream(config, &jobs).await?;
        Ok(Self {
            context,
            consumer,
            jobs,
            dead_letters,
        })
    }

    fn name(&self) -> &str {
        &self.jobs
    }

    async fn publish(&self, body: &'static str) -> Result<(), BoxError> {
        let subject = self.jobs.clone();
        self.context.publish(subject, body.into()).await?.await?;
        Ok(())
    }

    async fn subscribe(&self, prefetch: usize) -> Result<Deliveries, BoxError> {
        let pull = Pull::new(&self.jobs, "workers")
            .prefetch(prefetch)
            .dead_letter(&self.dead_letters);
        Ok(pull.subscribe(&self.context).await?)
    }

    async fn ready(&self) -> Result<u64, BoxError> {
        Ok(self.info().await?.num_pending)
    }

    async fn unsettled(&self) -> Result<u64, BoxError> {
        let info = self.info().await?;
        Ok(info.num_pending + info.num_ack_pending as u64)
    }

    async fn info(&self) -> Result<consumer::Info, BoxError> {
        Ok(self.consumer.get_info().await?)
    }

    async fn dead_lettered(&self) -> Result<u64, BoxError> {
        let stream = self.context.get_stream(&self.dead_letters).await?;
        Ok(stream.cached_info().state.messages)
    }

    async fn delete(self) -> Result<(), BoxError> {
        for stream in [&self.jobs, &self.dead_letters] {
            self.context.delete_stream(stream).await?;
        }
        Ok(())
    }
}
