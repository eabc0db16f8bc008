//! Delayed retries, and their queues.

use std::time::Duration;

use tokio::time::Instant;
use tower_sentinel::{
    Job, Verdict,
    broker::rabbitmq::{DeliveryError, QueueKind, lapin::BasicProperties},
    settle::Settle,
};

use super::{KINDS, Scene, close, next, server::shared, settle};

#[tokio::test]
async fn a_delayed_retry_is_not_seen_before_its_time() {
    for kind in KINDS {
        let scene = Scene::new("a_delayed_retry_is_not_seen_before_its_time", kind).await;
        let mut jobs = scene.subscribe().await;
        // An expiration would end the wait too early, and then drop the job.
        let properties = BasicProperties::default().with_expiration("200".into());
        scene.publish_with("one", properties).await;
        let delay = Duration::from_millis(600);
        let mut settled = None;
        for deliveries in 1..=4 {
            let job = next(&mut jobs).await;
            assert_eq!(job.as_ref(), b"one");
            assert_eq!(job.tag().deliveries(), Some(deliveries), "{kind:?}");
            if let Some(waited) = settled.map(|at: Instant| at.elapsed()) {
                assert!(waited >= delay, "{kind:?} came after {waited:?}");
            }
            settled = Some(Instant::now());
            let verdict = Verdict::retry_after(delay);
            assert!(job.tag().capabilities().can(verdict));
            settle(job.tag(), verdict).await.unwrap();
        }
        let job = next(&mut jobs).await;
        settle(job.tag(), Verdict::Ack).await.unwrap();
        scene.assert_empty(jobs).await;
    }
}

#[tokio::test]
async fn a_short_delay_does_not_wait_for_a_long_one() {
    for kind in KINDS {
        let scene = Scene::new("a_short_delay_does_not_wait_for_a_long_one", kind).await;
        let mut jobs = scene.subscribe().await;
        scene.publish("long").await;
        scene.publish("short").await;
        for delay in [60_000, 300] {
            let verdict = Verdict::retry_after(Duration::from_millis(delay));
            settle(next(&mut jobs).await.tag(), verdict).await.unwrap();
        }
        let job = next(&mut jobs).await;
        assert_eq!(job.as_ref(), b"short");
        settle(job.tag(), Verdict::Ack).await.unwrap();
        let waits = format!("{}.retry.quorum.65536", scene.name);
        let job = scene.get(&waits).await.unwrap();
        assert_eq!(job.data, b"long");
        close(jobs).await;
    }
}

#[tokio::test]
async fn a_delay_that_is_too_long_is_refused() {
    let scene = Scene::new("a_delay_that_is_too_long_is_refused", QueueKind::Classic).await;
    let mut jobs = scene.subscribe().await;
    scene.publish("one").await;
    let verdict = Verdict::retry_after(Duration::from_secs(86_400 * 30));
    let error = settle(next(&mut jobs).await.tag(), verdict).await;
    assert!(
        matches!(error, Err(DeliveryError::DelayTooLong(_))),
        "{error:?}"
    );
    close(jobs).await;
    scene.wait_for_ready(1).await;
}

#[tokio::test]
async fn a_retry_queue_outlives_its_last_job_by_a_week() {
    for kind in KINDS {
        let test = "a_retry_queue_outlives_its_last_job_by_a_week";
        let scene = Scene::new(test, kind).await;
        let mut jobs = scene.subscribe().await;
        scene.publish("one").await;
        let verdict = Verdict::retry_after(Duration::from_millis(512));
        settle(next(&mut jobs).await.tag(), verdict).await.unwrap();
        let code = format!(
            r#"Name = rabbit_misc:r(<<"/">>, queue, <<"{}.retry.quorum.512">>),
            {{ok, Queue}} = rabbit_amqqueue:lookup(Name),
            Arguments = amqqueue:get_arguments(Queue),
            {{_, _, Expires}} = lists:keyfind(<<"x-expires">>, 1, Arguments),
            Expires"#,
            scene.name
        );
        let expires = shared().eval(&code).await;
        assert_eq!(expires.as_deref(), Some("604800512"));
        settle(next(&mut jobs).await.tag(), Verdict::Ack)
            .await
            .unwrap();
        scene.assert_empty(jobs).await;
    }
}

#[tokio::test]
async fn a_retry_queue_that_may_be_new_is_not_used_yet() {
    // The server loses a classic one too seldom for a test that kills it.
    let newness = Duration::from_secs(2);
    for kind in KINDS {
        let scene = Scene::new("a_retry_queue_that_may_be_new_is_not_used_yet", kind).await;
        let mut jobs = scene.subscribe().await;
        for (delay, is_new) in [(1, true), (128, false), (129, true), (1, false)] {
            scene.publish("one").await;
            let started = Instant::now();
            let verdict = Verdict::retry_after(Duration::from_millis(delay));
            settle(next(&mut jobs).await.tag(), verdict).await.unwrap();
            assert_eq!(started.elapsed() > newness, is_new, "{kind:?}, {delay} ms");
            let again = next(&mut jobs).await.tag();
            settle(again, Verdict::Ack).await.unwrap();
        }
        scene.assert_empty(jobs).await;
    }
}
