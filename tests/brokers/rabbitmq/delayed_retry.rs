//! Retries that the queue itself delays.

use std::time::Duration;

use tokio::time::Instant;
use tower_sentinel::{
    Job, Verdict,
    broker::rabbitmq::{
        QueueKind,
        lapin::{
            options::QueueDeclareOptions,
            types::{AMQPValue, FieldTable},
        },
    },
    consumer::Subscription,
    settle::Settle,
};

use super::{
    Scene, next, quiet,
    server::{Version, version},
    settle, shared,
};

const MIN: Duration = Duration::from_millis(300);

async fn delaying(test: &str) -> Scene {
    let mut arguments = FieldTable::default();
    let failed = AMQPValue::LongString("failed".into());
    arguments.insert("x-delayed-retry-type".into(), failed);
    for (name, millis) in [("min", MIN.as_millis()), ("max", 3 * MIN.as_millis())] {
        let name = format!("x-delayed-retry-{name}");
        arguments.insert(name.into(), AMQPValue::LongLongInt(millis as i64));
    }
    Scene::declare(shared(), test, QueueKind::Quorum, arguments).await
}

#[tokio::test]
async fn a_queue_that_delays_needs_no_retry_queue() {
    if version() < Version::V4_3 {
        return; // Its queues don't.
    }
    let scene = delaying("a_queue_that_delays_needs_no_retry_queue").await;
    let queue = scene.queue().delivery_limit(None).delayed_retry();
    let mut jobs = queue.subscribe(&scene.connection).await.unwrap();
    scene.publish("one").await;
    // Linear in the failed deliveries, up to the largest.
    for (deliveries, times) in [(1, 1), (2, 2), (3, 3), (4, 3)] {
        let job = next(&mut jobs).await;
        assert_eq!(job.tag().deliveries(), Some(deliveries));
        let settled = Instant::now();
        let verdict = Verdict::retry_after(Duration::from_secs(60));
        settle(job.tag(), verdict).await.unwrap();
        let job = next(&mut jobs).await;
        let waited = settled.elapsed();
        assert!(waited >= times * MIN, "{deliveries}: {waited:?}");
        // A released job comes back at once, and is not charged.
        settle(job.tag(), Verdict::release()).await.unwrap();
    }
    let job = next(&mut jobs).await;
    assert_eq!(job.tag().deliveries(), Some(5));
    settle(job.tag(), Verdict::Ack).await.unwrap();
    let passive = QueueDeclareOptions {
        passive: true,
        ..QueueDeclareOptions::default()
    };
    let name = format!("{}.retry.quorum.65536", scene.name);
    let found = scene.connection.create_channel().await.unwrap();
    let found = found.queue_declare(name.into(), passive, FieldTable::default());
    assert!(found.await.is_err(), "there is no retry queue");
    scene.assert_empty(jobs).await;
}

#[tokio::test]
async fn a_retry_at_once_is_not_delayed_by_the_queue() {
    if version() < Version::V4_3 {
        return;
    }
    let mut arguments = FieldTable::default();
    let failed = AMQPValue::LongString("failed".into());
    arguments.insert("x-delayed-retry-type".into(), failed);
    for name in ["x-delayed-retry-min", "x-delayed-retry-max"] {
        arguments.insert(name.into(), AMQPValue::LongLongInt(3_600_000));
    }
    let test = "a_retry_at_once_is_not_delayed_by_the_queue";
    let scene = Scene::declare(shared(), test, QueueKind::Quorum, arguments).await;
    let queue = scene.queue().delivery_limit(None).delayed_retry();
    let mut jobs = queue.subscribe(&scene.connection).await.unwrap();
    scene.publish("one").await;
    for deliveries in 1..=3 {
        let job = next(&mut jobs).await;
        assert_eq!(job.tag().deliveries(), Some(deliveries));
        settle(job.tag(), Verdict::retry()).await.unwrap();
    }
    settle(next(&mut jobs).await.tag(), Verdict::Ack)
        .await
        .unwrap();
    scene.assert_empty(jobs).await;
}

#[tokio::test]
async fn a_job_that_the_queue_delays_does_not_wait_for_a_worker() {
    if version() < Version::V4_3 {
        return;
    }
    let mut arguments = FieldTable::default();
    let failed = AMQPValue::LongString("failed".into());
    arguments.insert("x-delayed-retry-type".into(), failed);
    for name in ["x-delayed-retry-min", "x-delayed-retry-max"] {
        arguments.insert(name.into(), AMQPValue::LongLongInt(3_600_000));
    }
    let test = "a_job_that_the_queue_delays_does_not_wait";
    let scene = Scene::declare(shared(), test, QueueKind::Quorum, arguments).await;
    let queue = scene.queue().delivery_limit(None).delayed_retry();
    let mut jobs = queue.subscribe(&scene.connection).await.unwrap();
    scene.publish("one").await;
    let verdict = Verdict::retry_after(Duration::from_secs(60));
    settle(next(&mut jobs).await.tag(), verdict).await.unwrap();
    quiet(&mut jobs).await;
    let probe = jobs.probe().unwrap().await.unwrap();
    assert_eq!(probe.waiting.unwrap_or_default(), 0, "{probe}");
}
