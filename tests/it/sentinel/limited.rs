//! Jobs under a limit of deliveries: what it leaves as it is, and what it tells.

use std::{
    convert::Infallible,
    future::{pending, ready},
    time::Duration,
};

use tokio::time::Instant;
use tower::service_fn;
use tower_layer::Layer;
use tower_sentinel::{
    Job, SentinelLayer, SettlePolicy, TimeLimit, ack_on_success, outcome::OutcomeKind,
    settle::Settled,
};

use crate::support::{call, log::Log, tag::Tag};

const LIMIT: u32 = 2;
const TIME: Duration = Duration::from_secs(7);

/// A job with a time limit of its own.
struct Limited(Tag);

impl Job for Limited {
    type Tag = Tag;

    fn tag(&self) -> Tag {
        self.0.clone()
    }

    fn time_limit(&self) -> TimeLimit {
        TimeLimit::After(TIME)
    }
}

#[tokio::test(start_paused = true)]
async fn a_job_keeps_its_own_time_limit() {
    let mut worker = SentinelLayer::new(SettlePolicy::new(ack_on_success()))
        .delivery_limit(LIMIT)
        .layer(service_fn(|_: Limited| pending::<Result<(), Infallible>>()));
    let started = Instant::now();
    let job = Limited(Tag::new().delivered(1));
    let settled: Settled = call(&mut worker, job).await.unwrap();
    assert_eq!(settled.kind, OutcomeKind::TimedOut);
    assert!(started.elapsed() < 2 * TIME, "{:?}", started.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_broker_that_does_not_count_is_told_of_with_the_first_job() {
    let (log, _guard) = Log::start();
    let mut worker = SentinelLayer::new(SettlePolicy::new(ack_on_success()))
        .delivery_limit(LIMIT)
        .layer(service_fn(|_: Tag| ready(Ok::<_, Infallible>(()))));
    for jobs in 1..=3 {
        call(&mut worker, Tag::new()).await.unwrap();
        assert_eq!(log.lines().len(), 1, "after {jobs} jobs");
    }
}
