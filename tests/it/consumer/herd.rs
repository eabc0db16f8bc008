//! Many jobs that pass their limit at once.

use std::{
    convert::Infallible,
    future::{Future, pending, poll_fn},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tower::{ServiceBuilder, service_fn};
use tower_sentinel::{
    Consumer, Outcome, SentinelLayer, SettlePolicy, Verdict,
    broker::memory::{Broker, Delivery, DeliveryTag},
    outcome::OutcomeKind,
};

use super::ends;
use crate::support::Refused;

const JOBS: usize = 10_000;
const LIMIT: Duration = Duration::from_secs(10);

#[tokio::test(start_paused = true)]
async fn ten_thousand_jobs_that_pass_their_limit_at_once_have_one_outcome_each() {
    let broker = Broker::new();
    let queue = broker.queue("jobs").declare();
    (0..JOBS).for_each(|number| queue.publish(number));
    let outcomes = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&outcomes);
    let decision = move |_: &DeliveryTag<usize>, outcome: &Outcome<(), Refused>| {
        assert!(matches!(outcome, Outcome::TimedOut(it) if it.stopped()));
        counted.fetch_add(1, Relaxed);
        Verdict::Reject
    };
    let policy = SettlePolicy::new(decision);
    let service = ServiceBuilder::new()
        .concurrency_limit(JOBS)
        .layer(SentinelLayer::new(policy).timeout(LIMIT))
        .service_fn(|_: Delivery<usize>| pending::<Result<(), Refused>>());
    let shutdown = CancellationToken::new();
    let (empty, stop) = (queue.clone(), shutdown.clone());
    tokio::spawn(async move {
        empty.emptied().await;
        stop.cancel();
    });
    let began = Instant::now();
    let deliveries = queue.subscribe(JOBS).unwrap();
    let consumer =
        Consumer::new(deliveries, service).with_graceful_shutdown(shutdown.cancelled_owned());
    let summary = ends(consumer).await.unwrap();

    assert_eq!(began.elapsed(), LIMIT);
    assert_eq!(summary.outcomes(OutcomeKind::TimedOut), JOBS as u64);
    assert_eq!((summary.called, summary.unanswered), (JOBS as u64, 0));
    // The queue is empty, so that none of them was rejected twice in place of another.
    assert_eq!(queue.counts().dropped, JOBS as u64);
    assert_eq!(outcomes.load(Relaxed), JOBS);
}

/// A task that has used up its budget gets nothing from tokio, so polls beyond it are in vain.
#[tokio::test(start_paused = true)]
async fn calls_that_are_due_at_once_are_not_polled_in_vain() {
    let queue = Broker::new().queue("jobs").declare();
    (0..JOBS).for_each(|number| queue.publish(number));
    let polls = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&polls);
    let service = service_fn(move |_: Delivery<usize>| {
        let counted = Arc::clone(&counted);
        let mut slept = Box::pin(sleep(LIMIT));
        poll_fn(move |cx| {
            counted.fetch_add(1, Relaxed);
            slept.as_mut().poll(cx).map(Ok::<_, Infallible>)
        })
    });
    let consumer = Consumer::new(queue.subscribe(JOBS).unwrap(), service)
        .with_graceful_shutdown(sleep(LIMIT / 2));
    let summary = ends(consumer.drain_timeout(2 * LIMIT)).await.unwrap();

    assert_eq!(summary.answered, JOBS as u64);
    // Each when it is called, and when it is due; and some at the end of a budget.
    let polls = polls.load(Relaxed);
    assert!(polls <= 3 * JOBS, "{polls} polls of {JOBS} calls");
}
