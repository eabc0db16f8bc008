//! The embedded broker: the order of its deliveries, and the effects on its jobs.

mod deliveries;
mod envelope;
mod faults;
mod foreign_code;
mod leases;
mod losing;
mod verdicts;
mod worker;

use std::time::Duration;

use futures_util::{FutureExt, StreamExt};
use tower_sentinel::{
    Job, Verdict,
    broker::memory::{Broker, Counts, Deliveries, Delivery, DeliveryError, DeliveryTag, Queue},
    settle::{Lease, Reason, Settle},
};

const SECOND: Duration = Duration::from_secs(1);
const LEASE: Duration = Duration::from_secs(30);

fn queue() -> Queue<u32> {
    Broker::new().queue("jobs").declare()
}

/// Returns the next job, which must be there.
#[track_caller]
fn take(jobs: &mut Deliveries<u32>) -> Delivery<u32> {
    let next = jobs.next().now_or_never();
    next.expect("a job is ready").unwrap().unwrap()
}

#[track_caller]
fn take_all(jobs: &mut Deliveries<u32>) -> Vec<Delivery<u32>> {
    let next = || {
        jobs.next()
            .now_or_never()
            .map(|next| next.unwrap().unwrap())
    };
    std::iter::from_fn(next).collect()
}

fn payloads(deliveries: &[Delivery<u32>]) -> Vec<u32> {
    deliveries.iter().map(|job| *job.payload()).collect()
}

#[track_caller]
fn assert_idle(jobs: &mut Deliveries<u32>) {
    assert!(jobs.next().now_or_never().is_none());
}

fn reason() -> Reason {
    Reason::completed(SECOND)
}

/// Settles at once.
#[track_caller]
fn settle(job: &Delivery<u32>, verdict: Verdict) -> Result<(), DeliveryError> {
    let settled = job.tag().settle(verdict, reason()).now_or_never();
    settled
        .expect("a settlement is not delayed")
        .map_err(|it| it.error)
}

#[track_caller]
fn keep_alive(tag: &DeliveryTag<u32>) -> Result<Lease, DeliveryError> {
    tag.keep_alive().now_or_never().unwrap()
}

/// Returns the counts without the jobs that have no number.
fn counts(queue: &Queue<u32>) -> (usize, usize, usize, u64, u64, u64) {
    let Counts {
        ready,
        delayed,
        unacked,
        acked,
        dead,
        dropped,
        ..
    } = queue.counts();
    (ready, delayed, unacked, acked, dead, dropped)
}
