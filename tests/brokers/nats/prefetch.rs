//! The prefetch.

use std::{
    collections::HashMap,
    future::poll_fn,
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::time::{sleep, timeout};
use tower_sentinel::{
    Job, Verdict,
    broker::nats::{Deliveries, SubscriptionError},
    consumer::Subscription,
    settle::Settle,
};

use super::{SOON, jobs, next, nothing_within, run, settle};

#[tokio::test]
async fn no_more_is_fetched_than_there_are_places() {
    let jobs = jobs(SOON).await;
    for i in 0..20 {
        jobs.publish(i.to_string()).await;
    }
    let mut deliveries = jobs.subscribe(5).await;
    let mut taken = Vec::new();
    for _ in 0..5 {
        taken.push(next(&mut deliveries).await);
    }
    nothing_within(&mut deliveries, Duration::from_millis(500)).await;
    assert_eq!(jobs.info().await.num_ack_pending, 5);

    // A settlement frees one place, and a delivery that is dropped with its tags another.
    settle(&taken.pop().unwrap(), Verdict::Ack).await.unwrap();
    taken.push(next(&mut deliveries).await);
    nothing_within(&mut deliveries, Duration::from_millis(300)).await;
    assert_eq!(jobs.info().await.num_ack_pending, 5);
    let tag = taken.pop().unwrap().tag();
    nothing_within(&mut deliveries, Duration::from_millis(300)).await;
    drop(tag);
    taken.push(next(&mut deliveries).await);
    nothing_within(&mut deliveries, Duration::from_millis(300)).await;
    assert_eq!(jobs.info().await.num_ack_pending, 6);
}

/// If a client fetched all of them at once, the ack wait of the last ones would pass: their turn is after 2.7 s.
#[tokio::test]
async fn a_slow_worker_gets_each_job_once() {
    let jobs = jobs(Duration::from_secs(2)).await;
    for i in 0..40 {
        jobs.publish(i.to_string()).await;
    }
    let deliveries = jobs.subscribe(4).await;
    let counts = Arc::new(Mutex::new(HashMap::new()));
    let run = run(deliveries, Arc::clone(&counts), Duration::from_millis(300));
    let worker = tokio::spawn(run);
    let mut most = 0;
    while jobs.messages("jobs").await > 0 {
        most = most.max(jobs.info().await.num_ack_pending);
        sleep(Duration::from_millis(10)).await;
    }
    worker.abort();
    assert_eq!(most, 4);
    let counts = counts.lock().unwrap();
    assert_eq!(counts.len(), 40);
    assert!(counts.values().all(|&count| count == 1), "{counts:?}");
}

#[tokio::test]
async fn what_nobody_polled_for_the_ack_wait_is_not_run() {
    let jobs = jobs(Duration::from_secs(2)).await;
    let mut deliveries = jobs.subscribe(3).await;
    for payload in ["a", "b", "c"] {
        jobs.publish(payload).await;
    }
    let first = next(&mut deliveries).await;
    settle(&first, Verdict::Ack).await.unwrap();
    // They are seen, and wait here, while the worker is not ready.
    assert!(
        timeout(Duration::from_millis(2_200), closed_now(&mut deliveries))
            .await
            .is_err()
    );
    for _ in 0..2 {
        let job = next(&mut deliveries).await;
        assert_eq!(job.tag().deliveries(), Some(2), "{job:?}");
        settle(&job, Verdict::Ack).await.unwrap();
    }
    assert_eq!(jobs.messages("jobs").await, 0);
}

async fn closed_now(deliveries: &mut Deliveries) -> Result<(), SubscriptionError> {
    poll_fn(|cx| Pin::new(&mut *deliveries).poll_closed(cx)).await
}
