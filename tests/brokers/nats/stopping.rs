//! Subscriptions that are stopped and closed.

use std::{future::poll_fn, pin::Pin, time::Duration};

use futures_util::StreamExt;
use tokio::time::{Instant, sleep, timeout};
use tower_sentinel::{
    Job, Verdict,
    broker::nats::{Deliveries, DeliveryError},
    consumer::Subscription,
    settle::{Lease, Settle},
};

use super::{SOON, closed, jobs, next, nothing_within, settle};

async fn stop(deliveries: &mut Deliveries) {
    let stop = poll_fn(|cx| Pin::new(&mut *deliveries).poll_stop(cx));
    timeout(SOON, stop).await.expect("it stops");
}

async fn close(deliveries: &mut Deliveries) {
    let close = poll_fn(|cx| Pin::new(&mut *deliveries).poll_close(cx));
    timeout(SOON, close).await.expect("it closes");
}

#[tokio::test]
async fn closing_gives_back_what_nobody_took_and_makes_tags_stale() {
    let jobs = jobs(Duration::from_secs(2)).await;
    for i in 0..4 {
        jobs.publish(i.to_string()).await;
    }
    let mut deliveries = jobs.subscribe(4).await;
    let taken = next(&mut deliveries).await;
    while jobs.info().await.num_ack_pending < 4 {
        sleep(Duration::from_millis(10)).await;
    }
    close(&mut deliveries).await;
    assert!(deliveries.next().await.is_none());
    closed(&mut deliveries).await.unwrap();
    let error = settle(&taken, Verdict::Ack).await.unwrap_err();
    assert!(matches!(error, DeliveryError::Stale), "{error}");
    assert_eq!(taken.tag().keep_alive().await.unwrap(), Lease::Lost);

    let mut deliveries = jobs.subscribe(4).await;
    let start = Instant::now();
    for payload in ["1", "2", "3", "0"] {
        let job = next(&mut deliveries).await;
        assert_eq!(job.as_ref(), payload.as_bytes());
        assert_eq!(job.tag().deliveries(), Some(2));
        let elapsed = start.elapsed();
        assert_eq!(
            payload == "0",
            elapsed > Duration::from_secs(1),
            "{payload} {elapsed:?}"
        );
    }
}

#[tokio::test]
async fn stopping_gives_back_what_nobody_took_and_leaves_the_tags_valid() {
    let jobs = jobs(Duration::from_secs(60)).await;
    for i in 0..4 {
        jobs.publish(i.to_string()).await;
    }
    let mut stopped = jobs.subscribe(4).await;
    let (zero, one) = (next(&mut stopped).await, next(&mut stopped).await);
    while jobs.info().await.num_ack_pending < 4 {
        sleep(Duration::from_millis(10)).await;
    }
    stop(&mut stopped).await;
    stop(&mut stopped).await;
    assert!(stopped.next().await.is_none());
    settle(&zero, Verdict::release()).await.unwrap();

    let mut deliveries = jobs.subscribe(4).await;
    for payload in ["2", "3", "0"] {
        let job = next(&mut deliveries).await;
        assert_eq!(job.as_ref(), payload.as_bytes());
        assert_eq!(job.tag().deliveries(), Some(2));
        settle(&job, Verdict::Ack).await.unwrap();
    }
    assert_eq!(one.tag().keep_alive().await.unwrap(), Lease::Held);
    settle(&one, Verdict::Ack).await.unwrap();
    assert_eq!(jobs.messages("jobs").await, 0);
    close(&mut stopped).await;
}

#[tokio::test]
async fn what_was_requested_before_a_stop_goes_to_others() {
    let jobs = jobs(Duration::from_secs(60)).await;
    jobs.publish("0").await;
    let mut stopped = jobs.subscribe(4).await;
    let zero = next(&mut stopped).await;
    // The request is open.
    nothing_within(&mut stopped, Duration::from_millis(100)).await;
    while jobs.info().await.num_waiting == 0 {
        sleep(Duration::from_millis(10)).await;
    }
    stop(&mut stopped).await;
    for i in 1..=4 {
        jobs.publish(i.to_string()).await;
    }
    let mut deliveries = jobs.subscribe(4).await;
    for payload in ["1", "2", "3", "4"] {
        let job = next(&mut deliveries).await;
        assert_eq!(job.as_ref(), payload.as_bytes());
        assert_eq!(job.tag().deliveries(), Some(1));
        settle(&job, Verdict::Ack).await.unwrap();
    }
    settle(&zero, Verdict::Ack).await.unwrap();
    close(&mut stopped).await;
    let error = settle(&zero, Verdict::Ack).await.unwrap_err();
    assert!(
        matches!(error, DeliveryError::Stale | DeliveryError::AlreadySettled),
        "{error}"
    );
}
