//! Leases: kept, lost and over.

use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until};
use tower::{Service, ServiceBuilder, ServiceExt};
use tower_sentinel::{
    Job, SentinelLayer, SettlePolicy, Verdict, ack_on_success,
    broker::nats::{Delivery, DeliveryError, Pull, async_nats::jetstream::consumer::pull},
    settle::{Lease, Settle},
};

use super::{SOON, jobs, next, nothing_within, reason, settle};

#[tokio::test]
async fn a_keep_alive_holds_a_job_past_the_ack_wait() {
    let jobs = jobs(Duration::from_secs(1)).await;
    jobs.publish("a").await;
    let mut deliveries = jobs.subscribe(2).await;
    let job = next(&mut deliveries).await;
    for _ in 0..8 {
        nothing_within(&mut deliveries, Duration::from_millis(400)).await;
        assert_eq!(job.tag().keep_alive().await.unwrap(), Lease::Held);
    }
    settle(&job, Verdict::Ack).await.unwrap();
    assert_eq!(jobs.messages("jobs").await, 0);
}

#[tokio::test]
async fn a_lost_lease_is_known_and_gives_nothing_back() {
    let ack_wait = Duration::from_secs(2);
    let jobs = jobs(ack_wait).await;
    jobs.publish("a").await;
    let mut deliveries = jobs.subscribe(2).await;
    let job = next(&mut deliveries).await;
    let lost = Instant::now() + ack_wait;
    let twin = next(&mut deliveries).await;
    // The server counts from an earlier time than this process, by the way of the message.
    sleep_until(lost).await;
    assert_eq!(twin.tag().deliveries(), Some(2));
    assert_eq!(job.tag().keep_alive().await.unwrap(), Lease::Lost);
    assert_eq!(twin.tag().keep_alive().await.unwrap(), Lease::Held);
    // JetStream would take the job from the second.
    let unsettled = job.tag().settle(Verdict::retry(), reason("late")).await;
    let unsettled = unsettled.unwrap_err();
    assert!(
        matches!(unsettled.error, DeliveryError::LeaseLost),
        "{unsettled}"
    );
    assert!(unsettled.tag.is_none());
    nothing_within(&mut deliveries, Duration::from_millis(200)).await;
    settle(&twin, Verdict::Ack).await.unwrap();
}

#[tokio::test]
async fn a_late_ack_counts() {
    let jobs = jobs(Duration::from_millis(400)).await;
    jobs.publish("a").await;
    let mut deliveries = jobs.subscribe(2).await;
    let job = next(&mut deliveries).await;
    sleep(Duration::from_millis(600)).await;
    settle(&job, Verdict::Ack).await.unwrap();
    assert_eq!(jobs.messages("jobs").await, 0);
}

#[tokio::test]
async fn a_job_that_passes_the_default_limit_is_settled_within_its_ack_wait() {
    let ack_wait = Duration::from_secs(3);
    let jobs = jobs(ack_wait).await;
    jobs.publish("a").await;
    let mut deliveries = jobs.subscribe(1).await;
    let mut worker = ServiceBuilder::new()
        .layer(SentinelLayer::new(SettlePolicy::new(ack_on_success())))
        .service_fn(|_: Delivery| std::future::pending::<Result<(), DeliveryError>>());
    let job = next(&mut deliveries).await;
    assert_eq!(job.lease(), Some(ack_wait));
    let settled = worker.ready().await.unwrap().call(job).await.unwrap();
    assert_eq!(settled.verdict, Verdict::retry());
    let job = next(&mut deliveries).await;
    assert_eq!(job.tag().deliveries(), Some(2));
    settle(&job, Verdict::Ack).await.unwrap();
}

#[tokio::test]
async fn a_job_has_the_lease_that_the_backoff_has_for_its_delivery() {
    let jobs = jobs(SOON).await;
    let backoff = [5, 7].map(Duration::from_secs);
    let config = pull::Config {
        durable_name: Some("patient".into()),
        filter_subject: "jobs".into(),
        backoff: backoff.to_vec(),
        max_deliver: 9,
        ..pull::Config::default()
    };
    // A work queue has one consumer.
    let stream = jobs.context.get_stream("jobs").await.unwrap();
    stream.delete_consumer("workers").await.unwrap();
    stream.create_consumer(config).await.unwrap();
    jobs.publish("a").await;
    let pull = Pull::new("jobs", "patient");
    let mut deliveries = pull.subscribe(&jobs.context).await.unwrap();
    for lease in [backoff[0], backoff[1], backoff[1]] {
        let job = next(&mut deliveries).await;
        assert_eq!(job.lease(), Some(lease));
        settle(&job, Verdict::retry()).await.unwrap();
    }
}
