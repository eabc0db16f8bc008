//! Dead letters.

use std::time::Duration;

use tokio::time::sleep;
use tower_sentinel::{
    Job, Outcome, Panic, Verdict,
    broker::nats::{DeliveryError, SubscriptionError, async_nats::jetstream, connect},
    settle::{Reason, Settle},
};

use super::{SOON, jobs, next, reason, settle};
use crate::proxy::Proxy;

#[tokio::test]
async fn a_reject_without_a_dead_letter_subject_drops() {
    let jobs = jobs(SOON).await;
    jobs.publish("a").await;
    let mut deliveries = jobs.subscribe(2).await;
    let job = next(&mut deliveries).await;
    assert!(!job.tag().capabilities().has_dead_letter());
    settle(&job, Verdict::Reject).await.unwrap();
    assert_eq!(jobs.messages("jobs").await, 0);
    assert_eq!(jobs.messages("dead").await, 0);
}

#[tokio::test]
async fn a_reject_keeps_the_message_and_its_reason() {
    let jobs = jobs(SOON).await;
    let mut headers = jobs_headers();
    headers.insert("Nats-Msg-Id", "original");
    headers.insert("Nats-Expected-Stream", "jobs");
    let ack = jobs
        .context
        .publish_with_headers("jobs", headers, "a".into());
    ack.await.unwrap().await.unwrap();
    let pull = jobs.pull().prefetch(2).dead_letter("dead");
    let mut deliveries = pull.subscribe(&jobs.context).await.unwrap();
    let job = next(&mut deliveries).await;
    settle(&job, Verdict::retry()).await.unwrap();
    let job = next(&mut deliveries).await;
    assert!(job.tag().capabilities().has_dead_letter());

    let outcome = Outcome::<(), &str>::Panicked(Panic::new("index 7\nis out of range"));
    let reason = Reason::of(&outcome, Duration::ZERO);
    job.tag().settle(Verdict::Reject, reason).await.unwrap();
    assert_eq!(jobs.messages("jobs").await, 0);

    let dead = jobs.context.get_stream("dead").await.unwrap();
    let dead = dead.get_raw_message(1).await.unwrap();
    let header = |name| dead.headers.get(name).map(|value| value.as_str());
    assert_eq!(&dead.payload[..], b"a");
    assert_eq!(header("x-outcome-kind"), Some("panicked"));
    assert_eq!(header("x-outcome-message"), Some("index 7 is out of range"));
    assert_eq!(header("x-deliveries"), Some("2"));
    assert_eq!(header("trace"), Some("1"));
    assert_eq!(header("Nats-Expected-Stream"), None);
    assert_ne!(header("Nats-Msg-Id"), Some("original"));
    assert_eq!(header("x-original-message-id"), Some("original"));
    let time = header("x-outcome-time").unwrap().parse::<u128>().unwrap();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let age = now.unwrap().as_millis() - time;
    assert!(age < SOON.as_millis(), "{age}");
}

fn jobs_headers() -> tower_sentinel::broker::nats::async_nats::HeaderMap {
    let mut headers = tower_sentinel::broker::nats::async_nats::HeaderMap::new();
    headers.insert("trace", "1");
    headers
}

#[tokio::test]
async fn a_reject_that_is_tried_again_leaves_one_dead_letter() {
    let jobs = jobs(SOON * 6).await;
    jobs.publish("a").await;
    let pull = jobs
        .pull()
        .dead_letter("dead")
        .confirm_timeout(Duration::from_millis(300));
    // A server that is killed may forget the delivery, and confirm no answer to it.
    let proxy = Proxy::start(jobs.server.address()).await;
    let client = connect(format!("nats://{}", proxy.address()))
        .await
        .unwrap();
    let mut deliveries = pull.subscribe(&jetstream::new(client)).await.unwrap();
    let job = next(&mut deliveries).await;

    // Two tries are sent, both once there is a connection.
    proxy.down();
    let unsettled = job.tag().settle(Verdict::Reject, reason("bad")).await;
    let unsettled = unsettled.unwrap_err();
    assert!(
        matches!(unsettled.error, DeliveryError::Unconfirmed { .. }),
        "{unsettled}"
    );
    proxy.up();
    let mut tag = unsettled.tag.expect("a reject may be tried again");
    while let Err(unsettled) = tag.settle(Verdict::Reject, reason("bad")).await {
        tag = unsettled.tag.expect("a reject may be tried again");
        sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(jobs.messages("jobs").await, 0);
    assert_eq!(jobs.messages("dead").await, 1);
}

#[tokio::test]
async fn a_dead_letter_that_no_stream_keeps_is_told_before_the_first_job() {
    let jobs = jobs(SOON).await;
    let error = jobs
        .pull()
        .dead_letter("nowhere")
        .subscribe(&jobs.context)
        .await;
    let error = error.unwrap_err();
    assert!(
        matches!(&error, SubscriptionError::NoDeadLetterStream { subject, .. } if subject == "nowhere"),
        "{error}"
    );
}

#[tokio::test]
async fn a_job_whose_dead_letter_is_not_kept_is_not_rejected() {
    let jobs = jobs(SOON).await;
    jobs.publish("a").await;
    let pull = jobs.pull().dead_letter("dead");
    let mut deliveries = pull.subscribe(&jobs.context).await.unwrap();
    let job = next(&mut deliveries).await;
    jobs.context.delete_stream("dead").await.unwrap();
    let unsettled = job.tag().settle(Verdict::Reject, reason("bad")).await;
    let unsettled = unsettled.unwrap_err();
    assert!(
        matches!(unsettled.error, DeliveryError::DeadLetter(_)),
        "{unsettled}"
    );
    assert!(unsettled.tag.is_some());
    assert_eq!(jobs.messages("jobs").await, 1);
}
