//! Stalls of JetStream.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::StreamExt;
use tower_sentinel::{
    Consumer, SentinelLayer, SettlePolicy, ack_on_success,
    broker::nats::{
        Delivery, Pull,
        async_nats::jetstream::{
            self, AckKind,
            consumer::{PullConsumer, pull},
            stream,
        },
        connect,
    },
    consumer::{State, connect_fn},
};

use super::{EVERY, PATIENT};
use crate::{conformance::eventually, nats::server::Server};

/// Another client holds as many jobs as the consumer allows, and settles none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_max_ack_pending_is_named_and_ends_no_session() {
    let server = Server::start();
    let context = jetstream::new(connect(&server.address()).await.unwrap());
    let config = stream::Config {
        name: "jobs".into(),
        subjects: vec!["jobs".into()],
        ..stream::Config::default()
    };
    context.create_stream(config).await.unwrap();
    let config = pull::Config {
        durable_name: Some("workers".into()),
        max_ack_pending: 3,
        ack_wait: Duration::from_secs(60),
        ..pull::Config::default()
    };
    let other: PullConsumer = context
        .create_consumer_on_stream(config, "jobs")
        .await
        .unwrap();
    for _ in 0..5 {
        context
            .publish("jobs", "job".into())
            .await
            .unwrap()
            .await
            .unwrap();
    }
    let held = other.fetch().max_messages(3).messages().await.unwrap();
    let held: Vec<_> = held.collect().await;

    let of_connect = context.clone();
    let sessions = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&sessions);
    let connect = connect_fn(move |_| {
        count.fetch_add(1, Ordering::Relaxed);
        let (pull, context) = (Pull::new("jobs", "workers").prefetch(5), of_connect.clone());
        async move { pull.subscribe(&context).await }
    });
    let handler =
        |_| tower::service_fn(|_: Delivery| async { Ok::<_, std::convert::Infallible>(()) });
    let consumer = Consumer::reconnecting(connect, handler)
        .sentinel(SentinelLayer::new(SettlePolicy::new(ack_on_success())))
        .watchdog(EVERY, PATIENT);
    let watch = consumer.watch();
    let consumer = tokio::spawn(consumer.run());
    let progress = || match watch.state() {
        State::Consuming(progress) => Some((progress.stalls, progress.ended)),
        _ => None,
    };
    eventually(Some((1, 0)), async || progress()).await;
    // The same session goes on.
    for message in held {
        message.unwrap().ack_with(AckKind::Ack).await.unwrap();
    }
    eventually(Some((1, 2)), async || progress()).await;
    assert_eq!(sessions.load(Ordering::Relaxed), 1);
    watch.drain();
    consumer.await.unwrap().unwrap();
}
