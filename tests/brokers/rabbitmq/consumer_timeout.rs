//! Jobs that take longer than the server's consumer timeout.

use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until};
use tower_sentinel::{
    Job, Verdict,
    broker::rabbitmq::{
        Deliveries, Delivery, DeliveryError, QueueKind, SubscriptionError,
        lapin::types::{AMQPValue, FieldTable},
    },
    settle::Settle,
};

use super::{
    Scene, close_now, end, next, quiet, reason,
    server::{Version, version},
    settle, shared,
};

const TIMEOUT: Duration = Duration::from_millis(500);

/// A queue with its own consumer timeout, which the adapter does not know.
async fn impatient(test: &str) -> Scene {
    let mut arguments = FieldTable::default();
    let millis = TIMEOUT.as_millis() as i64;
    arguments.insert("x-consumer-timeout".into(), AMQPValue::LongLongInt(millis));
    let scene = Scene::declare(shared(), test, QueueKind::Quorum, arguments).await;
    scene.declare_dead().await;
    scene
}

/// Takes a job, and waits until the server has taken it back and cancelled the consumer.
async fn overdue(scene: &Scene, body: &str) -> (Deliveries, Delivery) {
    scene.publish(body).await;
    let queue = scene.queue().dead_letter(scene.dead());
    let mut jobs = queue.subscribe(&scene.connection).await.unwrap();
    let job = next(&mut jobs).await;
    let ended = end(&mut jobs).await;
    assert!(
        matches!(ended, SubscriptionError::Cancelled { .. }),
        "{ended:?}"
    );
    (jobs, job)
}

#[tokio::test]
async fn a_job_that_was_taken_back_is_not_republished() {
    if version() < Version::V4_3 {
        return; // The channel is closed: `the_consumer_timeout_ends_the_subscription`.
    }
    for verdict in [Verdict::retry_after(TIMEOUT), Verdict::Reject] {
        let test = format!("a_job_that_was_taken_back.{}", verdict.as_str());
        let scene = impatient(&test).await;
        let (jobs, job) = overdue(&scene, "one").await;
        let lost = job.tag().settle(verdict, reason()).await.unwrap_err();
        assert!(matches!(lost.error, DeliveryError::Lost), "{lost:?}");
        assert!(lost.is_moot(), "{lost:?}");
        drop(close_now(jobs).await);
        let mut jobs = scene.subscribe().await;
        let job = next(&mut jobs).await;
        assert_eq!(job.tag().deliveries(), Some(1), "a timeout is not counted");
        settle(job.tag(), Verdict::Ack).await.unwrap();
        quiet(&mut jobs).await;
        assert!(scene.get(&scene.dead()).await.is_none());
        scene.assert_empty(jobs).await;
    }
}

#[tokio::test]
async fn a_late_ack_strands_no_job() {
    if version() < Version::V4_3 {
        return;
    }
    let scene = impatient("a_late_ack_strands_no_job").await;
    let (cancelled, job) = overdue(&scene, "one").await;
    // All that was overdue is acked: the server would take the consumer for alive again.
    settle(job.tag(), Verdict::Ack).await.unwrap();
    sleep(Duration::from_millis(100)).await;
    for body in ["two", "three", "four"] {
        scene.publish(body).await;
    }
    let mut jobs = scene.subscribe().await;
    let mut bodies = Vec::new();
    for _ in 0..4 {
        let job = next(&mut jobs).await;
        bodies.push(String::from_utf8(job.as_ref().to_vec()).unwrap());
        settle(job.tag(), Verdict::Ack).await.unwrap();
    }
    bodies.sort();
    assert_eq!(bodies, ["four", "one", "three", "two"]);
    scene.assert_empty(jobs).await;
    drop(cancelled);
}

#[tokio::test]
async fn what_comes_after_the_time_that_a_consumer_has_is_refused() {
    let applies = version() >= Version::V4_3;
    for verdict in [
        Verdict::Ack,
        Verdict::retry(),
        Verdict::retry_after(TIMEOUT),
        Verdict::release(),
        Verdict::Reject,
    ] {
        let test = format!("what_comes_after_the_time.{verdict}").replace(' ', "_");
        let scene = Scene::new(&test, QueueKind::Quorum).await;
        scene.declare_dead().await;
        let queue = scene.queue().dead_letter(scene.dead());
        let queue = queue.consumer_timeout(TIMEOUT);
        let mut jobs = queue.subscribe(&scene.connection).await.unwrap();
        scene.publish("one").await;
        let job = next(&mut jobs).await;
        assert_eq!(job.lease(), Some(TIMEOUT));
        let tag = job.tag();
        let over = Instant::now() + TIMEOUT;
        if applies {
            let ended = end(&mut jobs).await;
            let is_cancelled = matches!(ended, SubscriptionError::Cancelled { .. });
            assert!(is_cancelled, "{ended:?}");
        }
        sleep_until(over).await;
        let lost = tag.settle(verdict, reason()).await.unwrap_err();
        assert!(matches!(lost.error, DeliveryError::Lost), "{lost:?}");
        // An older server waits on.
        assert_eq!(lost.is_moot(), applies, "{lost:?}");
        drop(close_now(jobs).await);
        let mut jobs = scene.subscribe().await;
        settle(next(&mut jobs).await.tag(), Verdict::Ack)
            .await
            .unwrap();
        quiet(&mut jobs).await;
        assert!(scene.get(&scene.dead()).await.is_none());
        scene.assert_empty(jobs).await;
    }
}
