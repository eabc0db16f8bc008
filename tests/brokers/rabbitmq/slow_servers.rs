//! Republished jobs whose queues take their time, as those of a cluster do while a node is silent.

use std::time::Duration;

use futures_util::{StreamExt, stream::FuturesUnordered};
use tokio::time::{Instant, sleep};
use tower_sentinel::{
    Job, Verdict,
    broker::rabbitmq::{DeliveryError, DeliveryTag, QueueKind},
    settle::Settle,
};

use super::{
    KINDS, Scene, close, next, quiet, reason,
    server::{Server, shared},
    settle,
    subscribing::is_held,
};
use crate::conformance::eventually;

async fn assert_not_yet(tag: DeliveryTag, verdict: Verdict) {
    let unsettled = tag.settle(verdict, reason()).await.unwrap_err();
    assert!(unsettled.is_moot());
    let error = unsettled.error;
    assert!(matches!(error, DeliveryError::NotYetConfirmed), "{error:?}");
}

#[tokio::test]
async fn a_dead_letter_that_waits_holds_up_no_other_job_and_is_not_doubled() {
    for kind in KINDS {
        let test = "a_dead_letter_that_waits_holds_up_no_other_job";
        let scene = Scene::new(test, kind).await;
        scene.declare_dead().await;
        let queue = scene.queue().dead_letter(scene.dead());
        let mut jobs = queue.subscribe(&scene.connection).await.unwrap();
        is_held(shared(), &scene.dead(), true).await;
        // More than are published at a time.
        const DEAD: usize = 20;
        for _ in 0..DEAD {
            scene.publish("poison").await;
        }
        let mut rejecting = FuturesUnordered::new();
        for _ in 0..DEAD {
            let tag = next(&mut jobs).await.tag();
            rejecting.push(assert_not_yet(tag, Verdict::Reject));
        }
        let others = async {
            let again = match kind {
                QueueKind::Classic => Verdict::retry(),
                _ => Verdict::release_after(Duration::from_millis(128)),
            };
            scene.publish("healthy").await;
            for verdict in [again, again, Verdict::Ack] {
                settle(next(&mut jobs).await.tag(), verdict).await.unwrap();
            }
        };
        let rejected = async { while rejecting.next().await.is_some() {} };
        tokio::join!(rejected, others);
        // None of them was given back, since it would run and be published again.
        quiet(&mut jobs).await;
        is_held(shared(), &scene.dead(), false).await;
        let dead = async || {
            let mut dead = 0;
            while scene.get(&scene.dead()).await.is_some() {
                dead += 1;
            }
            dead
        };
        let mut found = 0;
        let started = Instant::now();
        while found < DEAD && started.elapsed() < Duration::from_secs(20) {
            found += dead().await;
        }
        assert_eq!(found, DEAD, "{kind:?}");
        sleep(Duration::from_millis(300)).await;
        assert_eq!(dead().await, 0, "{kind:?}: doubled");
        // They are settled by now: none comes back with the end of the channel.
        scene.assert_empty(jobs).await;
    }
}

#[tokio::test]
async fn a_job_that_waits_comes_back_with_the_end_of_its_subscription() {
    let test = "a_job_that_waits_comes_back_with_the_end";
    let scene = Scene::new(test, QueueKind::Classic).await;
    scene.declare_dead().await;
    let queue = scene.queue().dead_letter(scene.dead());
    let mut jobs = queue.subscribe(&scene.connection).await.unwrap();
    is_held(shared(), &scene.dead(), true).await;
    scene.publish("poison").await;
    assert_not_yet(next(&mut jobs).await.tag(), Verdict::Reject).await;
    close(jobs).await;
    let mut jobs = scene.subscribe().await;
    let job = next(&mut jobs).await;
    assert_eq!(job.tag().redelivered(), Some(true));
    settle(job.tag(), Verdict::Ack).await.unwrap();
    is_held(shared(), &scene.dead(), false).await;
    scene.assert_empty(jobs).await;
}

#[tokio::test]
async fn a_job_that_waits_outlives_the_connection_that_publishes() {
    let server = Server::start("");
    let test = "a_job_that_waits_outlives_the_connection";
    let scene = Scene::on(&server, test, QueueKind::Classic).await;
    scene.declare_dead().await;
    let queue = scene.queue().dead_letter(scene.dead());
    let mut jobs = queue.subscribe(&scene.connection).await.unwrap();
    is_held(&server, &scene.dead(), true).await;
    scene.publish("poison").await;
    assert_not_yet(next(&mut jobs).await.tag(), Verdict::Reject).await;
    server.close_connection("tower-sentinel: retries and dead letters");
    quiet(&mut jobs).await;
    is_held(&server, &scene.dead(), false).await;
    let is_there = async || scene.get(&scene.dead()).await.is_some();
    eventually(true, is_there).await;
    // It was not run again. That the first one was stored too, nobody could know.
    quiet(&mut jobs).await;
    scene.assert_empty(jobs).await;
}

/// Lets the server start no quorum queue, or go on.
async fn starts_none(server: &Server, starts_none: bool) {
    let act = if starts_none { "suspend" } else { "resume" };
    let code =
        format!("sys:{act}(maps:get(server_sup, maps:get(names, ra_system:fetch(quorum_queues))))");
    eventually(Some("ok".to_owned()), async || server.eval(&code).await).await;
}

#[tokio::test]
async fn a_job_whose_retry_queue_is_not_there_in_time_waits_in_a_longer_one() {
    let server = Server::start("");
    let millis = Duration::from_millis;
    for kind in KINDS {
        let test = "a_job_whose_retry_queue_is_not_there";
        let scene = Scene::on(&server, test, kind).await;
        let mut jobs = scene.subscribe().await;
        let verdict = Verdict::retry_after(millis(1_000));
        scene.publish("one").await;
        settle(next(&mut jobs).await.tag(), verdict).await.unwrap();
        settle(next(&mut jobs).await.tag(), Verdict::Ack)
            .await
            .unwrap();
        starts_none(&server, true).await;
        scene.publish("one").await;
        scene.publish("two").await;
        let (one, two) = (next(&mut jobs).await.tag(), next(&mut jobs).await.tag());
        let started = Instant::now();
        // A busy server may confirm it later than a settlement waits.
        let short = settle(one, Verdict::retry_after(millis(500)));
        // The known one is too long for that, and too short for this.
        let long = assert_not_yet(two, Verdict::retry_after(millis(60_000)));
        let (settled, ()) = tokio::join!(short, long);
        let is_stored = matches!(settled, Ok(()) | Err(DeliveryError::NotYetConfirmed));
        assert!(is_stored, "{settled:?}");
        let one = next(&mut jobs).await;
        assert_eq!(one.as_ref(), b"one");
        assert!(started.elapsed() >= millis(1_024));
        settle(one.tag(), Verdict::Ack).await.unwrap();
        starts_none(&server, false).await;
        // The job that had no queue waits in its own now, and the next one finds the other.
        let row = |millis, n| format!("{}.retry.quorum.{millis}\t{n}", scene.name);
        let is_there = async || {
            let list = server.list(&["list_queues", "name", "messages"]).await;
            let has = |wanted: String| list.lines().any(|line| line == wanted);
            (has(row(512, 0)), has(row(65_536, 1)))
        };
        eventually((true, true), is_there).await;
        scene.assert_empty(jobs).await;
    }
}
