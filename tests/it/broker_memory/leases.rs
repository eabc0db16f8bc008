//! Leases: kept, lost and over.

use std::time::Duration;

use futures_util::StreamExt;
use tokio::time::{Instant, advance, sleep};
use tower_sentinel::{
    Job, Verdict,
    broker::memory::{Broker, DeliveryError, Queue},
    settle::{Capabilities, Lease, Settle},
};

use super::{LEASE, SECOND, counts, keep_alive, queue, reason, settle, take};
use crate::support::block_on;

fn leased() -> Queue<u32> {
    Broker::new().queue("jobs").lease(LEASE).declare()
}

#[tokio::test(start_paused = true)]
async fn a_job_whose_lease_ends_is_given_to_another() {
    let queue = leased();
    queue.publish(1);
    let mut jobs = queue.subscribe(1).unwrap();
    let mut other = queue.subscribe(1).unwrap();
    let started = Instant::now();
    let late = take(&mut jobs);
    assert!(late.tag().capabilities().has_keep_alive());
    let twin = other.next().await.unwrap().unwrap();
    assert_eq!(started.elapsed(), LEASE);
    assert_eq!(twin.tag().deliveries(), Some(2));
    assert_eq!(twin.tag().redelivered(), Some(true));

    assert_eq!(keep_alive(&late.tag()), Ok(Lease::Lost));
    assert_eq!(settle(&late, Verdict::Ack), Err(DeliveryError::LeaseLost));
    assert_eq!(settle(&late, Verdict::Abandon), Ok(()));
    settle(&twin, Verdict::Ack).unwrap();
    assert_eq!(counts(&queue), (0, 0, 0, 1, 0, 0));

    // Its place is free: it is not held any more.
    queue.publish(2);
    assert_eq!(*take(&mut jobs).payload(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_consumer_that_waits_sees_the_end_of_a_later_lease() {
    let queue = leased();
    let mut jobs = queue.subscribe(1).unwrap();
    let mut other = queue.subscribe(1).unwrap();
    // It waits without a timer, as there is no lease yet, and is woken by the job below.
    let waiting = tokio::spawn(async move {
        let job = other.next().await.unwrap().unwrap();
        (*job.payload(), Instant::now())
    });
    sleep(Duration::ZERO).await;
    queue.publish(1);
    let _job = take(&mut jobs);
    let started = Instant::now();
    let (job, at) = waiting.await.unwrap();
    assert_eq!((job, at - started), (1, LEASE));
}

#[tokio::test(start_paused = true)]
async fn keep_alive_lets_the_lease_start_anew() {
    let queue = leased();
    (1..=2).for_each(|job| queue.publish(job));
    let mut jobs = queue.subscribe(2).unwrap();
    let (kept, left) = (take(&mut jobs), take(&mut jobs));
    for _ in 0..5 {
        advance(LEASE - SECOND).await;
        assert_eq!(keep_alive(&kept.tag()), Ok(Lease::Held));
    }
    assert_eq!(counts(&queue), (1, 0, 1, 0, 0, 0));
    assert_eq!(settle(&left, Verdict::Ack), Err(DeliveryError::LeaseLost));
    advance(LEASE - SECOND).await;
    settle(&kept, Verdict::Ack).unwrap();
    assert_eq!(counts(&queue), (1, 0, 0, 1, 0, 0));
}

#[tokio::test(start_paused = true)]
async fn the_end_of_a_lease_that_is_settled_is_none() {
    let queue = leased();
    let mut jobs = queue.subscribe(1_000).unwrap();
    queue.publish(u32::MAX);
    let first = take(&mut jobs);
    for job in 0..1_000 {
        queue.publish(job);
        settle(&take(&mut jobs), Verdict::Ack).unwrap();
    }
    advance(LEASE).await;
    assert_eq!(counts(&queue), (1, 0, 0, 1_000, 0, 0));
    assert_eq!(settle(&first, Verdict::Ack), Err(DeliveryError::LeaseLost));
}

#[test]
fn without_a_lease_a_keep_alive_is_refused() {
    let queue = queue();
    queue.publish(1);
    let mut jobs = queue.subscribe(1).unwrap();
    let tag = take(&mut jobs).tag();
    let expected = Capabilities::none().free_release().delay();
    assert_eq!(tag.capabilities(), expected);
    assert_eq!(keep_alive(&tag), Err(DeliveryError::NoLease));
}

#[test]
fn nothing_needs_a_runtime_unless_there_is_a_time_to_wait_for() {
    block_on(async {
        let queue = queue();
        queue.publish(1);
        let mut jobs = queue.subscribe(1).unwrap();
        let job = jobs.next().await.unwrap().unwrap();
        let settled = job.tag().settle(Verdict::retry_after(SECOND), reason());
        settled.await.unwrap();
        assert_eq!(counts(&queue), (0, 1, 0, 0, 0, 0));
    });
}
