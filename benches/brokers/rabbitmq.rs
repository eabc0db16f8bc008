//! A classic queue or a quorum queue, and lapin.

use std::sync::Arc;

use tokio::sync::Semaphore;
use tower_sentinel::broker::rabbitmq::{
    self, Connection, Queue,
    lapin::{
        BasicProperties, Channel,
        message::Delivery,
        options::{
            BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicPublishOptions,
            BasicQosOptions, ConfirmSelectOptions, QueueDeclareOptions, QueueDeleteOptions,
        },
        types::{AMQPValue, FieldTable},
    },
};

use super::{BoxError, Broker, Figures, PREFETCH, by_hand, supervised};

/// After how long without use the server deletes a queue that was left behind, in milliseconds.
const EXPIRES: i32 = 600_000;

pub(crate) struct Rabbitmq<const QUORUM: bool> {
    connection: Connection,
    channel: Channel,
    queue: String,
}

impl<const QUORUM: bool> Broker for Rabbitmq<QUORUM> {
    const NAME: &str = if QUORUM { "quorum" } else { "rabbitmq" };
    const ADDRESS: (&str, &str) = ("AMQP_ADDR", "amqp://127.0.0.1:5672/%2f");
    const ACKS: &[&str] = &["ack"];

    async fn connect(address: &str, queue: String) -> Result<Self, BoxError> {
        let connection = rabbitmq::connect(address).await?;
        let channel = connection.create_channel().await?;
        let confirms = ConfirmSelectOptions::default();
        channel.confirm_select(confirms).await?;
        let kind = if QUORUM { "quorum" } else { "classic" };
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), AMQPValue::LongString(kind.into()));
        arguments.insert("x-expires".into(), AMQPValue::LongInt(EXPIRES));
        let durable = QueueDeclareOptions::durable();
        channel
            .queue_declare(queue.as_str().into(), durable, arguments)
            .await?;
        Ok(Self {
            connection,
            channel,
            queue,
        })
    }

    async fn publish(&self, jobs: u64) -> Result<(), BoxError> {
        let mut confirms = Vec::new();
        for _ in 0..jobs {
            let (queue, options) = (self.queue.as_str().into(), BasicPublishOptions::default());
            let properties = BasicProperties::default();
            let published =
                self.channel
                    .basic_publish("".into(), queue, options, b"job", properties);
            confirms.push(published.await?);
        }
        for confirm in confirms {
            confirm.await?;
        }
        Ok(())
    }

    async fn ours(&self, jobs: u64) -> Result<Figures, BoxError> {
        let queue = match QUORUM {
            true => Queue::quorum(&self.queue),
            false => Queue::classic(&self.queue),
        };
        let queue = queue.prefetch(PREFETCH);
        let deliveries = queue.subscribe(&self.connection).await?;
        let gate = deliveries.gate();
        supervised(deliveries, gate, jobs).await
    }

    async fn bare(&self, _: &str, jobs: u64) -> Result<Figures, BoxError> {
        let channel = self.connection.create_channel().await?;
        let qos = BasicQosOptions::default();
        channel.basic_qos(PREFETCH as u16, qos).await?;
        let options = BasicConsumeOptions::default();
        let queue = self.queue.as_str().into();
        let consumer = channel
            .basic_consume(queue, "bare".into(), options, FieldTable::default())
            .await?;
        let permits = Arc::new(Semaphore::new(PREFETCH));
        let ack = async |delivery: Delivery| match delivery.ack(BasicAckOptions::default()).await? {
            true => Ok(()),
            false => Err("the ack was not sent".into()),
        };
        let figures = by_hand(permits, consumer, ack, jobs).await?;
        // Or a quorum queue loses the last acks with the channel, and the next round gets those jobs.
        let options = BasicCancelOptions::default();
        channel.basic_cancel("bare".into(), options).await?;
        channel.close(200, "done".into()).await?;
        Ok(figures)
    }

    async fn delete(self) -> Result<(), BoxError> {
        let options = QueueDeleteOptions::default();
        self.channel
            .queue_delete(self.queue.as_str().into(), options)
            .await?;
        self.channel.close(200, "done".into()).await?;
        Ok(self.connection.close(200, "done".into()).await?)
    }
}
