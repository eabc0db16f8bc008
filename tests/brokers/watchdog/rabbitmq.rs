//! Stalls of RabbitMQ.

use std::{convert::Infallible, time::Duration};

use tower_sentinel::{
    Consumer, SentinelLayer, SettlePolicy, ack_on_success,
    broker::rabbitmq::{
        Delivery, Queue, connect,
        lapin::{
            BasicProperties, Channel,
            options::{
                BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions, QueueDeleteOptions,
            },
            types::FieldTable,
        },
    },
    consumer::{State, Watch},
};

use super::{EVERY, PATIENT};
use crate::{conformance::eventually, rabbitmq::server::shared};

async fn declare(admin: &Channel, queue: &str) {
    let options = QueueDeclareOptions::durable();
    let declared = admin.queue_declare(queue.into(), options, FieldTable::default());
    declared.await.unwrap();
}

async fn publish(admin: &Channel, queue: &str) {
    let confirm = admin.basic_publish(
        "".into(),
        queue.into(),
        BasicPublishOptions::default(),
        b"job",
        BasicProperties::default(),
    );
    assert!(confirm.await.unwrap().await.unwrap().is_ack());
}

async fn admin() -> Channel {
    let connection = connect(&shared().address()).await.unwrap();
    let admin = connection.create_channel().await.unwrap();
    let options = ConfirmSelectOptions::default();
    admin.confirm_select(options).await.unwrap();
    admin
}

fn work(queue: Queue) -> (Watch, tokio::task::JoinHandle<()>) {
    let connector = queue.connector(shared().address());
    let handler = |_| tower::service_fn(|_: Delivery| async { Ok::<_, Infallible>(()) });
    let consumer = Consumer::reconnecting(connector, handler)
        .sentinel(SentinelLayer::new(SettlePolicy::new(ack_on_success())))
        .backoff(Duration::from_millis(50)..=Duration::from_millis(200))
        .watchdog(EVERY, PATIENT);
    let watch = consumer.watch();
    let consumer = consumer.run();
    let consumer = tokio::spawn(async move { drop(consumer.await.unwrap()) });
    (watch, consumer)
}

fn progress(watch: &Watch) -> Option<(u64, u64)> {
    match watch.state() {
        State::Consuming(progress) => Some((progress.stalls, progress.ended)),
        _ => None,
    }
}

/// The server cancels the consumer, which looks idle from then on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_consumer_that_the_server_cancels_begins_anew() {
    let (admin, queue) = (admin().await, "watchdog.cancelled");
    declare(&admin, queue).await;
    let (watch, consumer) = work(Queue::classic(queue));
    publish(&admin, queue).await;
    eventually(Some((0, 1)), async || progress(&watch)).await;
    let options = QueueDeleteOptions::default();
    admin.queue_delete(queue.into(), options).await.unwrap();
    declare(&admin, queue).await;
    publish(&admin, queue).await;
    // By the stream, which is told: the watchdog is not needed.
    eventually(Some((0, 2)), async || progress(&watch)).await;
    watch.drain();
    consumer.await.unwrap();
}
