//! RabbitMQ: effects of each verdict on a job, and of a lost channel or connection on its jobs.

mod acks;
mod conformance;
mod connecting;
mod connector;
mod consumer_timeout;
mod consumers;
mod dead_letter_queue;
mod dead_letters;
mod delayed_retry;
mod delays;
mod delivery_limit;
mod kills;
mod losing;
mod prefetch;
mod program;
mod queue_types;
mod republishing;
mod retry_queues;
pub(crate) mod server;
mod slow_servers;
mod stopping;
mod subscribing;
mod suspects;
mod tracing;
mod verdicts;

use std::{
    future::{poll_fn, ready},
    pin::{Pin, pin},
    time::Duration,
};

use futures_util::StreamExt;
use tokio::time::{sleep, timeout};
use tower_sentinel::{
    Verdict,
    broker::rabbitmq::{
        self, Connection, Deliveries, Delivery, DeliveryError, DeliveryTag, Queue, QueueKind,
        SubscriptionError,
        lapin::{
            BasicProperties, Channel, ConnectionProperties, Event,
            message::BasicGetMessage,
            options::{
                BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions,
            },
            types::{AMQPValue, FieldTable},
        },
    },
    consumer::Subscription,
    settle::{Reason, Settle},
};

use self::server::{Server, shared};

const KINDS: [QueueKind; 2] = [QueueKind::Classic, QueueKind::Quorum];

/// A queue, and a connection of the test's own beside that of the subscription.
struct Scene {
    name: String,
    kind: QueueKind,
    admin: Channel,
    connection: Connection,
}

impl Scene {
    async fn new(test: &str, kind: QueueKind) -> Self {
        Self::on(shared(), test, kind).await
    }

    async fn on(server: &Server, test: &str, kind: QueueKind) -> Self {
        Self::declare(server, test, kind, FieldTable::default()).await
    }

    async fn declare(server: &Server, test: &str, kind: QueueKind, arguments: FieldTable) -> Self {
        let name = format!("{test}.{kind:?}").to_lowercase();
        let connection = named(server, &name, ConnectionProperties::default()).await;
        let admin = rabbitmq::connect(&server.address()).await.unwrap();
        let admin = admin.create_channel().await.unwrap();
        let options = ConfirmSelectOptions::default();
        admin.confirm_select(options).await.unwrap();
        declare(&admin, &name, kind, arguments).await;
        Self {
            name,
            kind,
            admin,
            connection,
        }
    }

    fn queue(&self) -> Queue {
        match self.kind {
            QueueKind::Quorum => Queue::quorum(&self.name),
            _ => Queue::classic(&self.name),
        }
    }

    async fn subscribe(&self) -> Deliveries {
        self.queue().subscribe(&self.connection).await.unwrap()
    }

    fn dead(&self) -> String {
        format!("{}.dead", self.name)
    }

    async fn declare_dead(&self) {
        declare(
            &self.admin,
            &self.dead(),
            QueueKind::Classic,
            FieldTable::default(),
        )
        .await;
    }

    async fn publish(&self, body: &str) {
        self.publish_with(body, BasicProperties::default()).await;
    }

    async fn publish_with(&self, body: &str, properties: BasicProperties) {
        let confirm = self.admin.basic_publish(
            "".into(),
            self.name.as_str().into(),
            BasicPublishOptions::default(),
            body.as_bytes(),
            properties.with_delivery_mode(2),
        );
        assert!(confirm.await.unwrap().await.unwrap().is_ack());
    }

    async fn get(&self, queue: &str) -> Option<BasicGetMessage> {
        let options = BasicGetOptions { no_ack: true };
        self.admin.basic_get(queue.into(), options).await.unwrap()
    }

    /// Waits until `n` jobs wait in the queue for a consumer; those of a channel come back after its end.
    async fn wait_for_ready(&self, n: u32) {
        let options = QueueDeclareOptions {
            passive: true,
            ..QueueDeclareOptions::default()
        };
        let waiting = async {
            loop {
                let name = self.name.as_str().into();
                let queue = self
                    .admin
                    .queue_declare(name, options, FieldTable::default());
                if queue.await.unwrap().message_count() == n {
                    return;
                }
                sleep(Duration::from_millis(20)).await;
            }
        };
        let waited = timeout(Duration::from_secs(20), waiting).await;
        waited.unwrap_or_else(|_| panic!("{} has {n} jobs within 20 s", self.name));
    }

    /// Asserts that the queue is empty; unsettled jobs would go back first.
    async fn assert_empty(&self, jobs: Deliveries) {
        close(jobs).await;
        let left = self.get(&self.name).await;
        assert!(left.is_none(), "{} has {left:?}", self.name);
    }
}

async fn named(server: &Server, name: &str, properties: ConnectionProperties) -> Connection {
    let properties = properties.with_connection_name(name.into());
    let connected = rabbitmq::connect_with(properties, Default::default(), &server.address()).await;
    connected.unwrap()
}

async fn declare(channel: &Channel, name: &str, kind: QueueKind, mut arguments: FieldTable) {
    let queue_type = format!("{kind:?}").to_lowercase();
    let queue_type = AMQPValue::LongString(queue_type.into());
    arguments.insert("x-queue-type".into(), queue_type);
    let options = QueueDeclareOptions::durable();
    let declared = channel.queue_declare(name.into(), options, arguments);
    declared.await.unwrap();
}

async fn next(jobs: &mut Deliveries) -> Delivery {
    let job = timeout(Duration::from_secs(20), jobs.next()).await;
    job.expect("a job within 20 s").unwrap().unwrap()
}

/// Returns why the stream ends, and asserts that it says so once.
async fn end(jobs: &mut Deliveries) -> SubscriptionError {
    let end = timeout(Duration::from_secs(20), jobs.next()).await;
    let end = end.expect("an end within 20 s").unwrap().unwrap_err();
    assert!(jobs.next().await.is_none());
    end
}

async fn closed(jobs: &mut Deliveries) -> Result<(), SubscriptionError> {
    let closed = poll_fn(|cx| Pin::new(&mut *jobs).poll_closed(cx));
    let closed = timeout(Duration::from_secs(20), closed).await;
    closed.expect("the end within 20 s")
}

async fn close(jobs: Deliveries) {
    let mut jobs = close_now(jobs).await;
    closed(&mut jobs).await.unwrap();
}

/// Closes the channel after any end of the stream.
async fn close_now(mut jobs: Deliveries) -> Deliveries {
    let closed_now = poll_fn(|cx| Pin::new(&mut jobs).poll_close(cx));
    let closed_now = timeout(Duration::from_secs(20), closed_now).await;
    closed_now.expect("a channel closes within 20 s");
    assert!(jobs.next().await.is_none());
    jobs
}

fn reason() -> Reason {
    Reason::completed(Duration::ZERO)
}

async fn settle(tag: DeliveryTag, verdict: Verdict) -> Result<(), DeliveryError> {
    let settled = tag.settle(verdict, reason()).await;
    settled.map_err(|unsettled| {
        assert!(unsettled.tag.is_none(), "no settlement is tried again");
        unsettled.error
    })
}

/// Subscribes until it works: a quorum queue refuses while it has no leader yet.
async fn resubscribe(server: &Server, queue: Queue) -> Deliveries {
    for _ in 0..300 {
        if let Ok(connection) = rabbitmq::connect(&server.address()).await {
            let subscribed = queue.clone().subscribe(&connection);
            match timeout(Duration::from_secs(5), subscribed).await {
                Ok(Ok(jobs)) => return jobs,
                refused => eprintln!("{refused:?}"),
            }
        }
        sleep(Duration::from_millis(100)).await;
    }
    panic!("no subscription after 30 s");
}

async fn quiet(jobs: &mut Deliveries) {
    let job = timeout(Duration::from_millis(300), jobs.next()).await;
    assert!(job.is_err(), "unexpected: {job:?}");
}

/// Closes a connection that recovers, and waits until it has, so that a settlement would be sent.
///
/// lapin notices the end of the connection on its runtime, which may be blocked or far ahead. A channel that is
/// opened before can stop its I/O thread for good: when it has opened the channel anew, lapin 4.12 drops the
/// requests that waited for it, with the last handle of the channel. The `drop` of this handle reads the
/// status that this thread has locked for writing (`ChannelStatus::finalize_connection`).
async fn close_and_recover(connection: &Connection, name: &str) {
    // From now on: it may have recovered before the server says that it has closed it.
    let events = connection.events_listener();
    shared().close_connection(name);
    let recovered = async {
        let connected = |event: &Event| ready(matches!(event, Event::Connected));
        pin!(events.filter(connected)).next().await;
        while connection.create_channel().await.is_err() {
            sleep(Duration::from_millis(20)).await;
        }
    };
    let recovered = timeout(Duration::from_secs(20), recovered).await;
    recovered.expect("lapin recovers within 20 s");
}
