//! The delivery limit of a quorum queue, after which the server drops or dead-letters the job.

use std::collections::BTreeMap;

use tower_sentinel::{
    Job, Verdict,
    broker::rabbitmq::{
        Queue, QueueKind,
        lapin::types::{AMQPValue, FieldTable},
    },
    settle::Settle,
};

use super::{Scene, next, settle, shared};
use crate::{conformance::eventually, log::Log};

const JOBS: usize = 20;
/// More than a limit of 20 lets through.
const TRIES: u32 = 30;

async fn limited(test: &str, limit: i32) -> Scene {
    let mut arguments = FieldTable::default();
    arguments.insert("x-delivery-limit".into(), AMQPValue::LongInt(limit));
    arguments.insert("x-dead-letter-exchange".into(), text(""));
    let dead = format!("{test}.quorum.dead");
    arguments.insert("x-dead-letter-routing-key".into(), text(&dead));
    let scene = Scene::declare(shared(), test, QueueKind::Quorum, arguments).await;
    scene.declare_dead().await;
    scene
}

fn text(text: &str) -> AMQPValue {
    AMQPValue::LongString(text.into())
}

/// Settles each job so often by `verdict`, and returns how often it was delivered by its own count.
async fn tried(scene: &Scene, queue: Queue, jobs: usize, tries: u32, verdict: Verdict) -> Vec<u32> {
    for number in 0..jobs {
        scene.publish(&number.to_string()).await;
    }
    let mut deliveries = queue.subscribe(&scene.connection).await.unwrap();
    let mut tried = BTreeMap::new();
    let mut counts = Vec::new();
    while counts.len() < jobs {
        let job = next(&mut deliveries).await;
        let times = tried.entry(job.as_ref().to_vec()).or_insert(0);
        *times += 1;
        let now = match *times > tries {
            true => {
                counts.extend(job.tag().deliveries());
                Verdict::Ack
            }
            false => verdict,
        };
        settle(job.tag(), now).await.unwrap();
    }
    scene.assert_empty(deliveries).await;
    counts
}

#[tokio::test]
async fn a_long_outage_loses_no_job() {
    let scene = Scene::new("a_long_outage_loses_no_job", QueueKind::Quorum).await;
    let counts = tried(&scene, scene.queue(), JOBS, TRIES, Verdict::retry()).await;
    assert_eq!(counts, [TRIES + 1; JOBS]);
}

#[tokio::test]
async fn many_releases_lose_no_job() {
    let scene = Scene::new("many_releases_lose_no_job", QueueKind::Quorum).await;
    let counts = tried(&scene, scene.queue(), JOBS, TRIES, Verdict::release()).await;
    assert_eq!(counts.len(), JOBS);
}

#[tokio::test]
async fn a_limit_that_is_told_is_not_reached() {
    for limit in [0, 1, 2, 5] {
        let scene = limited(&format!("a_limit_that_is_told.{limit}"), limit).await;
        let queue = scene.queue().delivery_limit(limit as u32);
        let counts = tried(&scene, queue, 1, 12, Verdict::retry()).await;
        assert_eq!(counts, [13], "{limit}");
        assert!(scene.get(&scene.dead()).await.is_none(), "{limit}");
    }
}

#[tokio::test]
async fn a_limit_that_does_no_harm_is_the_queues() {
    let scene = limited("a_limit_that_does_no_harm_is_the_queues", 12).await;
    scene.publish("one").await;
    let queue = scene.queue().delivery_limit(None);
    let mut jobs = queue.subscribe(&scene.connection).await.unwrap();
    for deliveries in 1..=13 {
        let job = next(&mut jobs).await;
        assert_eq!(job.tag().deliveries(), Some(deliveries));
        settle(job.tag(), Verdict::retry()).await.unwrap();
    }
    eventually(true, async || scene.get(&scene.dead()).await.is_some()).await;
    scene.assert_empty(jobs).await;
}

#[tokio::test]
async fn a_limit_that_is_not_told_is_warned_of() {
    let (log, _guard) = Log::start();
    let scene = Scene::new("a_limit_that_is_not_told", QueueKind::Quorum).await;
    for (queue, warns) in [
        (scene.queue(), true),
        (scene.queue().delivery_limit(20), false),
        (scene.queue().delivery_limit(None), false),
        (Queue::classic(&scene.name), false),
    ] {
        let before = log.lines().len();
        let jobs = queue.subscribe(&scene.connection).await.unwrap();
        let said = log.lines().split_off(before);
        let warning = said.iter().find(|line| line.contains("x-delivery-limit"));
        let named = warning.map(|line| line.contains("WARN") && line.contains(&scene.name));
        assert_eq!(named, warns.then_some(true), "{said:#?}");
        drop(jobs);
    }
}
