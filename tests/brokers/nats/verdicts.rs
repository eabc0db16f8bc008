//! Effects of each verdict on a message.

use std::time::Duration;

use tokio::time::Instant;
use tower_sentinel::{Job, Verdict, broker::nats::DeliveryError, settle::Settle};

use super::{SOON, jobs, next, reason, settle};

#[tokio::test]
async fn an_ack_removes() {
    let jobs = jobs(SOON).await;
    jobs.publish("a").await;
    let mut deliveries = jobs.subscribe(2).await;
    let job = next(&mut deliveries).await;
    assert_eq!(job.as_ref(), b"a");
    assert_eq!(job.subject().as_str(), "jobs");
    assert_eq!(job.tag().deliveries(), Some(1));
    assert_eq!(job.tag().redelivered(), Some(false));
    settle(&job, Verdict::Ack).await.unwrap();
    assert_eq!(jobs.messages("jobs").await, 0);
    assert_eq!(jobs.info().await.num_ack_pending, 0);
}

#[tokio::test]
async fn retry_and_release_redeliver_and_count() {
    let jobs = jobs(SOON).await;
    jobs.publish("a").await;
    let mut deliveries = jobs.subscribe(2).await;
    let job = next(&mut deliveries).await;
    assert!(!job.tag().capabilities().release_is_free());
    settle(&job, Verdict::retry()).await.unwrap();
    let job = next(&mut deliveries).await;
    assert_eq!(job.tag().deliveries(), Some(2));
    settle(&job, Verdict::release()).await.unwrap();
    let job = next(&mut deliveries).await;
    assert_eq!(job.tag().deliveries(), Some(3));
    assert_eq!(job.tag().redelivered(), Some(true));
    settle(&job, Verdict::Ack).await.unwrap();
}

#[tokio::test]
async fn a_delayed_retry_is_not_seen_before_its_time() {
    let jobs = jobs(SOON).await;
    jobs.publish("a").await;
    let mut deliveries = jobs.subscribe(2).await;
    let job = next(&mut deliveries).await;
    let delay = Duration::from_millis(700);
    let start = Instant::now();
    settle(&job, Verdict::retry_after(delay)).await.unwrap();
    let job = next(&mut deliveries).await;
    let elapsed = start.elapsed();
    assert!(elapsed >= delay, "{elapsed:?}");
    // Not by the ack wait, which began before.
    assert!(elapsed < SOON / 2, "{elapsed:?}");
    assert_eq!(job.tag().deliveries(), Some(2));
}

#[tokio::test]
async fn an_abandoned_job_comes_back_after_the_ack_wait() {
    let ack_wait = Duration::from_secs(1);
    let jobs = jobs(ack_wait).await;
    jobs.publish("a").await;
    let mut deliveries = jobs.subscribe(1).await;
    let start = Instant::now();
    let job = next(&mut deliveries).await;
    settle(&job, Verdict::Abandon).await.unwrap();
    let job = next(&mut deliveries).await;
    assert!(start.elapsed() >= ack_wait - Duration::from_millis(50));
    assert_eq!(job.tag().deliveries(), Some(2));
}

#[tokio::test]
async fn a_second_settlement_is_refused() {
    let jobs = jobs(SOON).await;
    jobs.publish("a").await;
    let mut deliveries = jobs.subscribe(2).await;
    let job = next(&mut deliveries).await;
    let twin = job.tag().clone();
    settle(&job, Verdict::Ack).await.unwrap();
    for tag in [job.tag(), twin] {
        let unsettled = tag.settle(Verdict::retry(), reason("again")).await;
        let unsettled = unsettled.unwrap_err();
        assert!(matches!(unsettled.error, DeliveryError::AlreadySettled));
        assert!(unsettled.tag.is_none());
    }
}

#[tokio::test]
async fn the_order_of_answers_is_free() {
    let jobs = jobs(SOON).await;
    let mut deliveries = jobs.subscribe(8).await;
    for i in 0..8 {
        jobs.publish(i.to_string()).await;
    }
    let mut taken = Vec::new();
    for _ in 0..8 {
        taken.push(next(&mut deliveries).await);
    }
    for i in [7, 0, 5, 2, 6, 1, 4, 3] {
        settle(&taken[i], Verdict::Ack).await.unwrap();
    }
    assert_eq!(jobs.messages("jobs").await, 0);
}
