//! A pull consumer of a work queue in memory, and async-nats.
//!
//! The adapter waits for the server's confirmation of each ack, which the client calls
//! `double_ack`; its `ack` sends and does not wait.

use std::sync::Arc;

use tokio::sync::Semaphore;
use tower_sentinel::broker::nats::{
    self, Pull,
    async_nats::jetstream::{
        self, Context, Message,
        consumer::{AckPolicy, PullConsumer, pull},
        stream::{self, RetentionPolicy, StorageType},
    },
};

use super::{BoxError, Broker, Figures, PREFETCH, by_hand, supervised};

pub(crate) struct Nats {
    context: Context,
    consumer: PullConsumer,
    stream: String,
}

impl Broker for Nats {
    const NAME: &str = "nats";
    const ADDRESS: (&str, &str) = ("NATS_ADDR", "nats://127.0.0.1:4222");
    const ACKS: &[&str] = &["double_ack", "ack"];

    async fn connect(address: &str, stream: String) -> Result<Self, BoxError> {
        let context = jetstream::new(nats::connect(address).await?);
        let config = stream::Config {
            name: stream.clone(),
            subjects: vec![stream.clone()],
            retention: RetentionPolicy::WorkQueue,
            storage: StorageType::Memory,
            ..stream::Config::default()
        };
        context.create_stream(config).await?;
        let config = pull::Config {
            durable_name: Some("workers".to_owned()),
            ack_policy: AckPolicy::Explicit,
            ..pull::Config::default()
        };
        let consumer = context.create_consumer_on_stream(config, &stream).await?;
        Ok(Self {
            context,
            consumer,
            stream,
        })
    }

    async fn publish(&self, jobs: u64) -> Result<(), BoxError> {
        let mut confirms = Vec::new();
        for _ in 0..jobs {
            let subject = self.stream.clone();
            confirms.push(self.context.publish(subject, "job".into()).await?);
            if confirms.len() == 1_000 {
                for confirm in confirms.drain(..) {
                    confirm.await?;
                }
            }
        }
        for confirm in confirms {
            confirm.await?;
        }
        Ok(())
    }

    async fn ours(&self, jobs: u64) -> Result<Figures, BoxError> {
        let consumer = &self.consumer.cached_info().name;
        let pull = Pull::new(&self.stream, consumer).prefetch(PREFETCH);
        let deliveries = pull.subscribe(&self.context).await?;
        let gate = deliveries.gate();
        supervised(deliveries, gate, jobs).await
    }

    async fn bare(&self, ack: &str, jobs: u64) -> Result<Figures, BoxError> {
        let messages = self
            .consumer
            .stream()
            .max_messages_per_batch(PREFETCH)
            .messages()
            .await?;
        let permits = Arc::new(Semaphore::new(PREFETCH));
        match ack {
            "ack" => {
                let ack = async |message: Message| message.ack().await;
                by_hand(permits, messages, ack, jobs).await
            }
            _ => {
                let ack = async |message: Message| message.double_ack().await;
                by_hand(permits, messages, ack, jobs).await
            }
        }
    }

    async fn delete(self) -> Result<(), BoxError> {
        self.context.delete_stream(&self.stream).await?;
        Ok(())
    }
}
