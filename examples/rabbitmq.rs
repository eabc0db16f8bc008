//! Jobs from a RabbitMQ queue that complete, fail, panic and hang, and their counts on the broker.
//!
//! ```sh
//! AMQP_ADDR=amqp://127.0.0.1:5672/%2f cargo run --features rabbitmq --example rabbitmq
//! ```
//!
//! This file has the code for RabbitMQ; the program is in `mixed_jobs`. Each run makes its own queues, which
//! are deleted with its connection. `PREFETCH` sets the number of jobs in flight.

mod mixed_jobs;

use std::process::ExitCode;

use tower_sentinel::broker::rabbitmq::{
    self, Connection, Deliveries, Delivery, Queue,
    lapin::{
        BasicProperties, Channel,
        options::{
            BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions, QueueDeleteOptions,
        },
        types::{AMQPValue, FieldTable},
    },
};

use self::mixed_jobs::BoxError;

/// Environment variable of the broker's address, and its default.
const ADDRESS: (&str, &str) = ("AMQP_ADDR", "amqp://127.0.0.1:5672/%2f");

#[tokio::main]
async fn main() -> ExitCode {
    mixed_jobs::main().await
}

/// A queue for the jobs, and one for the dead letters.
struct Broker {
    connection: Connection,
    channel: Channel,
    jobs: String,
    dead_letters: String,
}

impl Broker {
    async fn connect(address: &str, name: String) -> Result<Self, BoxError> {
        let connection = rabbitmq::connect(address).await?;
        let channel = connection.create_channel().await?;
        let confirms = ConfirmSelectOptions::default();
        channel.confirm_select(confirms).await?;

        let (jobs, dead_letters) = (format!("{name}.jobs"), format!("{name}.dead-letters"));
        // Exclusive, so that the broker deletes them if this process dies.
        let exclusive = QueueDeclareOptions::exclusive();
        // Jobs that the broker itself dead-letters go to the same queue as rejected ones.
        let mut arguments = FieldTable::default();
        for (key, value) in [
            ("x-dead-letter-exchange", ""),
            ("x-dead-letter-routing-key", &dead_letters),
        ] {
            arguments.insert(key.into(), AMQPValue::LongString(value.into()));
        }
        for (queue, arguments) in [(&dead_letters, FieldTable::default()), (&jobs, arguments)] {
            channel
                .queue_declare(queue.as_str().into(), exclusive, arguments)
                .await?;
        }
        Ok(Self {
            connection,
            channel,
            jobs,
            dead_letters,
        })
    }

    fn name(&self) -> &str {
        &self.jobs
    }

    async fn publish(&self, body: &str) -> Result<(), BoxError> {
        let (queue, options) = (self.jobs.as_str().into(), BasicPublishOptions::default());
        let properties = BasicProperties::default();
        let confirm = self
            .channel
            .basic_publish("".into(), queue, options, body.as_bytes(), properties)
            .await?;
        match confirm.await?.is_ack() {
            true => Ok(()),
            false => Err("the broker refused a job".into()),
        }
    }

    async fn subscribe(&self, prefetch: usize) -> Result<Deliveries, BoxError> {
        let queue = Queue::classic(&self.jobs)
            .prefetch(prefetch)
            .dead_letter(&self.dead_letters);
        Ok(queue.subscribe(&self.connection).await?)
    }

    async fn ready(&self) -> Result<u64, BoxError> {
        self.count(&self.jobs).await
    }

    /// Returns the ready jobs, since the broker counts no others. Unacked jobs became ready when their
    /// channel closed.
    async fn unsettled(&self) -> Result<u64, BoxError> {
        self.ready().await
    }

    async fn dead_lettered(&self) -> Result<u64, BoxError> {
        self.count(&self.dead_letters).await
    }

    async fn count(&self, queue: &str) -> Result<u64, BoxError> {
        let passive = QueueDeclareOptions::default().passive();
        let queue = self
            .channel
            .queue_declare(queue.into(), passive, FieldTable::default())
            .await?;
        Ok(queue.message_count().into())
    }

    async fn delete(self) -> Result<(), BoxError> {
        for queue in [&self.jobs, &self.dead_letters] {
            self.channel
                .queue_delete(queue.as_str().into(), QueueDeleteOptions::default())
                .await?;
        }
        // A dropped channel closes in the background, and then the close of the connection fails.
        self.channel.close(200, "done".into()).await?;
        Ok(self.connection.close(200, "done".into()).await?)
    }
}
