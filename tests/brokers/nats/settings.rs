//! Configurations of consumers and streams that would lose, strand or stall jobs.

use std::time::Duration;

use futures_util::StreamExt;
use tokio::time::{sleep, timeout};
use tower_sentinel::{
    Job, Verdict,
    broker::nats::{
        DeliveryError, Pull,
        async_nats::jetstream::consumer::{pull, push},
    },
    settle::Settle,
};

use super::{Jobs, SOON, jobs, next, reason, settle};
use crate::log::Log;

/// Makes the consumer anew.
pub(super) async fn consumer(jobs: &mut Jobs, config: pull::Config) {
    let context = &jobs.context;
    context
        .delete_consumer_from_stream("workers", "jobs")
        .await
        .unwrap();
    let config = pull::Config {
        durable_name: Some("workers".into()),
        ..config
    };
    let consumer = context.create_consumer_on_stream(config, "jobs").await;
    jobs.consumer = consumer.unwrap();
}

#[tokio::test]
async fn dead_letters_among_the_jobs_are_refused() {
    let jobs = jobs(SOON).await;
    let error = jobs
        .pull()
        .dead_letter("jobs")
        .subscribe(&jobs.context)
        .await;
    let error = error.unwrap_err().to_string();
    let expected = "the dead letters of \"jobs\" would be kept among the jobs of stream \"jobs\"";
    assert!(error.starts_with(expected), "{error}");
}

#[tokio::test]
async fn a_consumer_lives_on_while_all_places_are_taken() {
    let mut jobs = jobs(SOON).await;
    let config = pull::Config {
        ack_wait: 6 * SOON,
        inactive_threshold: Duration::from_secs(3),
        ..pull::Config::default()
    };
    consumer(&mut jobs, config).await;
    jobs.publish("a").await;
    jobs.publish("b").await;
    let mut deliveries = jobs.subscribe(1).await;
    let job = next(&mut deliveries).await;
    // Several times as long as it would live.
    let next_one = timeout(SOON, deliveries.next()).await;
    assert!(next_one.is_err(), "{next_one:?}");
    assert_eq!(
        jobs.info().await.num_ack_pending,
        1,
        "no more than there are places for"
    );
    settle(&job, Verdict::Ack).await.unwrap();
    let job = next(&mut deliveries).await;
    assert_eq!(
        (job.payload(), job.tag().deliveries()),
        (&b"b"[..], Some(1))
    );
    settle(&job, Verdict::Ack).await.unwrap();
}

#[tokio::test]
async fn a_consumer_that_is_removed_too_soon_is_refused() {
    let mut jobs = jobs(SOON).await;
    let config = pull::Config {
        inactive_threshold: Duration::from_millis(700),
        ..pull::Config::default()
    };
    consumer(&mut jobs, config).await;
    let error = jobs.pull().subscribe(&jobs.context).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "the consumer's inactive_threshold of 700ms is too short; it takes 1s or more"
    );
}

#[tokio::test]
async fn a_push_consumer_is_refused() {
    let jobs = jobs(SOON).await;
    let config = push::Config {
        durable_name: Some("pushed".into()),
        deliver_subject: "somewhere".into(),
        ..push::Config::default()
    };
    let stream = jobs.context.get_stream("dead").await.unwrap();
    stream.create_consumer(config).await.unwrap();
    let subscribing = Pull::new("dead", "pushed").subscribe(&jobs.context);
    let error = subscribing.await.unwrap_err().to_string();
    assert!(
        error.starts_with("the consumer is a push consumer"),
        "{error}"
    );
}

#[tokio::test]
async fn what_max_deliver_strands_is_warned_of() {
    let (log, _guard) = Log::start();
    let mut jobs = jobs(SOON).await;
    let config = pull::Config {
        max_deliver: 2,
        ..pull::Config::default()
    };
    consumer(&mut jobs, config).await;
    jobs.publish("a").await;
    let mut deliveries = jobs.subscribe(1).await;
    let warned = |of: &str| log.lines().iter().filter(|line| line.contains(of)).count();
    assert_eq!(
        warned("stranded by the server after `max_deliver` deliveries"),
        1
    );
    for stranded in [0, 1] {
        let job = next(&mut deliveries).await;
        settle(&job, Verdict::retry()).await.unwrap();
        assert_eq!(warned("job stranded"), stranded);
    }
    // As the warning says.
    assert!(
        timeout(Duration::from_millis(500), deliveries.next())
            .await
            .is_err()
    );
    assert_eq!(jobs.messages("jobs").await, 1);
}

#[tokio::test]
async fn a_settlement_after_the_ack_wait_is_moot() {
    for verdict in [
        Verdict::retry(),
        Verdict::retry_after(SOON),
        Verdict::release(),
    ] {
        let jobs = jobs(Duration::from_millis(400)).await;
        jobs.publish("a").await;
        let mut deliveries = jobs.subscribe(1).await;
        let job = next(&mut deliveries).await;
        sleep(Duration::from_millis(500)).await;
        let unsettled = job.tag().settle(verdict, reason("late")).await.unwrap_err();
        assert!(
            matches!(unsettled.error, DeliveryError::LeaseLost),
            "{unsettled}"
        );
        assert!(unsettled.is_moot());
    }
}
