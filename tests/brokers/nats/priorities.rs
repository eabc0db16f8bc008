//! Priority groups, and paused consumers.

use std::time::Duration;

use futures_util::StreamExt;
use tokio::time::timeout;
use tower_sentinel::{
    Verdict,
    broker::nats::{
        Deliveries, NoPriority, Pull, SubscriptionError,
        async_nats::jetstream::consumer::{PriorityPolicy, pull},
    },
    consumer::Subscription,
};

use super::{Jobs, SOON, jobs, next, settings::consumer, settle};
use crate::log::Log;

/// Makes the consumer anew with a priority group; false if the server has none.
async fn with_group(jobs: &mut Jobs, policy: PriorityPolicy) -> bool {
    let config = pull::Config {
        priority_groups: vec!["all".into()],
        priority_policy: policy,
        ..pull::Config::default()
    };
    consumer(jobs, config).await;
    let has_groups = !jobs.info().await.config.priority_groups.is_empty();
    if !has_groups {
        println!("skipped: this nats-server has no priority groups");
    }
    has_groups
}

/// Returns how many jobs wait, by a probe.
async fn waiting(deliveries: &Deliveries) -> Option<u64> {
    deliveries.probe().unwrap().await.unwrap().waiting
}

#[tokio::test]
async fn jobs_that_wait_for_others_don_t_wait_for_a_worker_that_helps() {
    let mut jobs = jobs(SOON).await;
    if !with_group(&mut jobs, PriorityPolicy::Overflow).await {
        return;
    }
    jobs.publish("a").await;
    let pull = jobs.pull().group("all");
    for (pull, expected) in [(pull.clone(), Some(1)), (pull.min_pending(9), None)] {
        let deliveries = pull.subscribe(&jobs.context).await.unwrap();
        assert_eq!(waiting(&deliveries).await, expected);
    }
}

async fn refused(jobs: &Jobs, pull: Pull) -> NoPriority {
    match pull.subscribe(&jobs.context).await.unwrap_err() {
        SubscriptionError::Priority { reason } => reason,
        error => panic!("{error}"),
    }
}

#[tokio::test]
async fn a_pull_that_does_not_fit_the_groups_of_its_consumer_is_refused() {
    let mut jobs = jobs(SOON).await;
    let reason = refused(&jobs, jobs.pull().group("all")).await;
    let none = NoPriority::Group {
        asked: Some("all".into()),
        groups: Vec::new(),
    };
    assert_eq!(reason, none);
    if !with_group(&mut jobs, PriorityPolicy::Overflow).await {
        return;
    }
    let groups = vec!["all".to_owned()];
    for asked in [None, Some("other".to_owned())] {
        let pull = jobs.pull();
        let pull = match &asked {
            Some(group) => pull.group(group),
            None => pull,
        };
        let reason = refused(&jobs, pull).await;
        let groups = groups.clone();
        assert_eq!(reason, NoPriority::Group { asked, groups });
    }
    let pull = || jobs.pull().group("all");
    assert_eq!(
        refused(&jobs, pull().priority(3)).await,
        NoPriority::NotPrioritized
    );
    with_group(&mut jobs, PriorityPolicy::PinnedClient).await;
    let reason = refused(&jobs, jobs.pull().group("all")).await;
    assert_eq!(reason, NoPriority::Pinned);
}

#[tokio::test]
async fn a_worker_of_an_overflow_group_helps_when_enough_jobs_wait() {
    let mut jobs = jobs(SOON).await;
    if !with_group(&mut jobs, PriorityPolicy::Overflow).await {
        return;
    }
    let pull = jobs.pull().group("all").prefetch(1);
    let helping = pull.clone().min_pending(3).subscribe(&jobs.context);
    let mut helping = helping.await.unwrap();
    jobs.publish("a").await;
    let early = timeout(Duration::from_millis(700), helping.next()).await;
    assert!(early.is_err(), "{early:?}");
    let mut always = pull.subscribe(&jobs.context).await.unwrap();
    let job = next(&mut always).await;
    settle(&job, Verdict::Ack).await.unwrap();
    for _ in 0..4 {
        jobs.publish("b").await;
    }
    let job = next(&mut helping).await;
    settle(&job, Verdict::Ack).await.unwrap();
}

#[tokio::test]
async fn the_worker_of_the_first_rank_is_served_first() {
    let mut jobs = jobs(SOON).await;
    if !with_group(&mut jobs, PriorityPolicy::Prioritized).await {
        return;
    }
    // Their requests stay open for six of these.
    let pull = jobs.pull().idle_heartbeat(SOON);
    let pull = pull.group("all").prefetch(2);
    let mut second = pull
        .clone()
        .priority(5)
        .subscribe(&jobs.context)
        .await
        .unwrap();
    let mut first = pull.priority(1).subscribe(&jobs.context).await.unwrap();
    for waiting in [&mut second, &mut first] {
        let early = timeout(Duration::from_millis(100), waiting.next()).await;
        assert!(early.is_err(), "{early:?}");
    }
    let requested = async { while jobs.info().await.num_waiting < 2 {} };
    timeout(SOON, requested).await.expect("both have requested");
    jobs.publish("a").await;
    jobs.publish("b").await;
    for _ in 0..2 {
        let job = next(&mut first).await;
        settle(&job, Verdict::Ack).await.unwrap();
    }
}

#[tokio::test]
async fn a_paused_consumer_is_waited_for() {
    let (log, _guard) = Log::start();
    let jobs = jobs(SOON).await;
    let pull = jobs.pull().reconnect_limit(Duration::from_secs(4));
    let mut deliveries = pull.subscribe(&jobs.context).await.unwrap();
    let stream = jobs.context.get_stream("jobs").await.unwrap();
    let until = std::time::SystemTime::now() + Duration::from_secs(7);
    let until = until
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_nanos();
    let until = tower_sentinel::broker::nats::async_nats::datetime::from_nanos(
        i128::try_from(until).unwrap(),
    );
    match timeout(SOON, stream.pause_consumer("workers", until.unwrap())).await {
        Ok(Ok(paused)) if paused.paused => {}
        _ => return println!("skipped: this nats-server pauses no consumer"),
    }
    jobs.publish("a").await;
    let logged = |of: &str| log.lines().iter().any(|line| line.contains(of));
    let job = next(&mut deliveries).await;
    assert!(logged("consumer paused"), "{:?}", log.lines());
    assert!(logged("consumer delivers again"), "{:?}", log.lines());
    settle(&job, Verdict::Ack).await.unwrap();
    // Before anything is requested.
    let until =
        tower_sentinel::broker::nats::async_nats::datetime::from_nanos(4_000_000_000_000_000_000);
    stream
        .pause_consumer("workers", until.unwrap())
        .await
        .unwrap();
    let paused = |log: &Log| {
        log.lines()
            .iter()
            .filter(|line| line.contains("consumer paused"))
            .count()
    };
    let before = paused(&log);
    let deliveries = jobs.subscribe(1).await;
    assert_eq!(paused(&log), before + 1);
    // Jobs that wait for the end of a pause wait for no worker.
    jobs.publish("b").await;
    assert_eq!(waiting(&deliveries).await, Some(0));
}
