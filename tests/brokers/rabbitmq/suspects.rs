//! Jobs that are suspects, and others that a worker has given back.

use std::time::Duration;

use tower_sentinel::{
    Job, Verdict,
    broker::{
        Envelope,
        dead_letters::{DeadLetters, Filter},
        rabbitmq::{
            DeadLetterQueue, Queue, QueueKind, SubscriptionError, lapin::types::FieldTable,
        },
    },
    settle::Settle,
};

use super::{KINDS, Scene, close, declare, next, reason, settle};
use crate::conformance::suspected;

/// Declares the queues of the dead letters and of the suspects, and returns the builder with both.
async fn with_suspects(scene: &Scene) -> Queue {
    scene.declare_dead().await;
    let lane = format!("{}.lane", scene.name);
    declare(
        &scene.admin,
        &lane,
        QueueKind::Quorum,
        FieldTable::default(),
    )
    .await;
    let queue = scene.queue().delivery_limit(None);
    queue.dead_letter(scene.dead()).suspects(lane)
}

#[tokio::test]
async fn a_job_that_was_given_back_is_no_suspect() {
    let soon = Duration::from_millis(50);
    for kind in KINDS {
        let scene = Scene::new("a_job_that_was_given_back_is_no_suspect", kind).await;
        let queue = with_suspects(&scene).await;
        let mut jobs = queue.subscribe(&scene.connection).await.unwrap();
        for (verdict, deliveries) in [
            (Verdict::retry(), 2),
            (Verdict::release(), 1),
            (Verdict::retry_after(soon), 2),
            (Verdict::release_after(soon), 1),
        ] {
            scene.publish("job").await;
            let job = next(&mut jobs).await;
            assert!(!job.tag().is_suspect());
            let charges = job.tag().capabilities().charges(verdict);
            assert_eq!(charges, deliveries == 2, "{kind:?} {verdict}");
            settle(job.tag(), verdict).await.unwrap();
            let job = next(&mut jobs).await;
            assert!(!job.tag().is_suspect(), "{kind:?} {verdict}");
            let known = (job.tag().deliveries(), job.tag().redelivered());
            assert_eq!(known, (Some(deliveries), Some(true)), "{kind:?} {verdict}");
            settle(job.tag(), Verdict::Ack).await.unwrap();
        }
        close(jobs).await;
    }
}

#[tokio::test]
async fn a_job_of_a_lost_channel_is_a_suspect_if_there_is_a_queue_for_them() {
    for kind in KINDS {
        let scene = Scene::new("a_job_of_a_lost_channel_is_a_suspect", kind).await;
        let queue = with_suspects(&scene).await;
        scene.publish("job").await;
        for is_suspect in [false, true] {
            let subscribed = queue.clone().subscribe(&scene.connection).await;
            let mut jobs = subscribed.unwrap();
            let job = next(&mut jobs).await;
            assert_eq!(job.tag().is_suspect(), is_suspect, "{kind:?}");
        }
        let mut jobs = scene.subscribe().await;
        assert!(!next(&mut jobs).await.tag().is_suspect(), "{kind:?}");
        close(jobs).await;
    }
}

#[tokio::test]
async fn a_suspect_keeps_its_origin_in_the_lane() {
    for kind in KINDS {
        let scene = Scene::new("a_suspect_keeps_its_origin", kind).await;
        let queue = with_suspects(&scene).await;
        let mut jobs = queue.clone().subscribe(&scene.connection).await.unwrap();
        let mut lane = queue.lane().subscribe(&scene.connection).await.unwrap();
        assert_eq!(lane.prefetch(), 1);
        scene.publish("job").await;
        let job = next(&mut jobs).await;
        job.tag()
            .settle(Verdict::Reject, suspected())
            .await
            .unwrap();

        for (verdict, deliveries) in [
            (Verdict::retry(), 1),
            (Verdict::retry_after(Duration::from_millis(50)), 2),
            (Verdict::Reject, 3),
        ] {
            let job = next(&mut lane).await;
            assert_eq!(job.payload(), b"job");
            assert_eq!(job.tag().deliveries(), Some(deliveries), "{kind:?}");
            assert_eq!(job.routing_key(), scene.name);
            assert_eq!(job.header("x-suspect-of"), Some(&*scene.name));
            settle(job.tag(), verdict).await.unwrap();
        }
        let dead = DeadLetterQueue::new(&scene.connection, scene.dead());
        let letters = dead.list(&Filter::all(), 2).await.unwrap();
        let [letter] = letters.try_into().unwrap();
        assert_eq!(letter.destination.as_ref(), Some(&scene.name), "{kind:?}");
        let got = scene.get(&scene.dead()).await.unwrap();
        let headers = got.properties.headers().as_ref().unwrap().inner();
        assert!(!headers.contains_key("x-suspect-of"), "{headers:?}");
        close(jobs).await;
        close(lane).await;
    }
}

/// Whatever its past: the reason decides.
#[tokio::test]
async fn a_job_that_was_run_and_rejected_is_a_dead_letter() {
    let scene = Scene::new("a_job_that_was_run_and_rejected", QueueKind::Classic).await;
    let queue = with_suspects(&scene).await;
    let mut jobs = queue.subscribe(&scene.connection).await.unwrap();
    scene.publish("job").await;
    let job = next(&mut jobs).await;
    job.tag().settle(Verdict::Reject, reason()).await.unwrap();
    assert!(scene.get(&scene.dead()).await.is_some());
    let lane = format!("{}.lane", scene.name);
    assert!(scene.get(&lane).await.is_none());
    close(jobs).await;
}

#[tokio::test]
async fn a_queue_of_suspects_that_does_not_exist_is_told_before_the_first_job() {
    let scene = Scene::new(
        "a_queue_of_suspects_that_does_not_exist",
        QueueKind::Classic,
    )
    .await;
    let queue = scene.queue().suspects("nowhere");
    let error = queue.subscribe(&scene.connection).await.unwrap_err();
    assert!(
        matches!(&error, SubscriptionError::NoTarget { target, .. } if target.contains("nowhere")),
        "{error}"
    );
}

#[test]
#[should_panic(expected = "the queue has a queue of suspects")]
fn a_lane_takes_suspects() {
    drop(Queue::classic("jobs").lane());
}
