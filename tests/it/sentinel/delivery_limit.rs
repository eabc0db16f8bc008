//! Jobs that were delivered too often: they are not run.

use std::{convert::Infallible, future::ready};

use futures_util::{FutureExt, StreamExt};
use tokio_util::sync::CancellationToken;
use tower::{Service, ServiceExt, service_fn};
use tower_layer::Layer;
use tower_sentinel::{
    DecisionExt, Outcome, SentinelLayer, SettlePolicy, Verdict, ack_on_success,
    broker::memory::{Broker, Deliveries, Delivery, Queue},
    outcome::{CancelReason, Cancelled, OutcomeKind},
    sentinel::OnDrop,
    settle::{Reason, Settled, decision::Decision},
};

use crate::support::{Count, Refused, call, log::Log, tag::Tag};

const LIMIT: u32 = 2;

/// A queue with dead letters and a job that was delivered so often, without an outcome.
fn delivered(times: u32) -> Queue<&'static str> {
    let broker = Broker::new();
    broker.queue("dead").declare();
    let queue = broker.queue("jobs").dead_letter("dead").declare();
    queue.publish("poison");
    for _ in 0..times {
        // The end of its consumer's process.
        let mut jobs = queue.subscribe(1).unwrap();
        jobs.next().now_or_never().unwrap().unwrap().unwrap();
    }
    queue
}

pub(super) fn take(
    queue: &Queue<&'static str>,
) -> (Deliveries<&'static str>, Delivery<&'static str>) {
    let mut jobs = queue.subscribe(1).unwrap();
    let job = jobs.next().now_or_never().unwrap().unwrap().unwrap();
    (jobs, job)
}

#[tokio::test(start_paused = true)]
async fn a_job_above_the_limit_is_rejected_without_a_run() {
    for (times, is_run) in [(0, true), (1, true), (2, false), (7, false)] {
        let queue = delivered(times);
        let (_jobs, job) = take(&queue);
        let runs = Count::default();
        let counted = runs.clone();
        let mut worker = SentinelLayer::new(SettlePolicy::new(ack_on_success()))
            .delivery_limit(LIMIT)
            .layer(service_fn(move |_| {
                counted.add();
                ready(Ok::<_, Infallible>(()))
            }));
        let settled: Settled = call(&mut worker, job).await.unwrap();
        assert_eq!(runs.get(), usize::from(is_run), "after {times}");
        if is_run {
            assert_eq!(settled.verdict, Verdict::Ack);
            continue;
        }
        assert_eq!(settled.kind, OutcomeKind::Cancelled);
        assert_eq!((settled.verdict, settled.stopped), (Verdict::Reject, true));
        let letters = queue.dead_letters();
        let Reason { kind, message, .. } = &letters[0].death.reason;
        assert_eq!(*kind, OutcomeKind::Cancelled);
        let wanted = format!("delivered {} times without an outcome", times + 1);
        assert_eq!(message.as_deref(), Some(&*wanted));

        // The instance that was ready serves the next.
        queue.publish("good");
        let (_jobs, job) = take(&queue);
        let settled = call(&mut worker, job).await.unwrap();
        assert_eq!((settled.verdict, runs.get()), (Verdict::Ack, 1));
    }
}

#[tokio::test(start_paused = true)]
async fn a_job_above_the_limit_is_settled_though_its_caller_drops() {
    for on_drop in [OnDrop::Abort, OnDrop::Detach] {
        let queue = delivered(LIMIT);
        let (_jobs, job) = take(&queue);
        let mut worker = SentinelLayer::new(SettlePolicy::new(ack_on_success()))
            .on_drop(on_drop)
            .shutdown({
                let token = CancellationToken::new();
                token.cancel();
                token
            })
            .delivery_limit(LIMIT)
            .layer(service_fn(|_| ready(Ok::<_, Infallible>(()))));
        drop(worker.ready().await.unwrap().call(job));
        queue.emptied().await;
        assert_eq!(queue.counts().dead, 1, "{on_drop:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_broker_that_does_not_count_is_told_of_once() {
    let (log, _guard) = Log::start();
    let layer = SentinelLayer::with_tag(
        SettlePolicy::new(ack_on_success()),
        Tag::clone as fn(&Tag) -> Tag,
    )
    .delivery_limit(LIMIT);
    let tag = Tag::new();
    for _ in 0..2 {
        let mut worker = layer
            .clone()
            .layer(service_fn(|_| ready(Ok::<_, Infallible>(()))));
        call(&mut worker, tag.clone()).await.unwrap();
    }
    assert_eq!(tag.verdicts(), [Verdict::Ack; 2]);
    let lines = log.lines();
    assert_eq!(lines.len(), 1, "{lines:#?}");
    assert!(lines[0].contains("WARN") && lines[0].contains("without a delivery limit"));
}

#[test]
fn a_decision_that_gives_it_back_is_bounded_by_its_own_limit() {
    let release = |_: &Tag, _: &Outcome<(), Refused>| Verdict::release();
    let refused = || Outcome::Cancelled(Cancelled::new(CancelReason::DeliveryLimit, true));
    let drained = || Outcome::Cancelled(Cancelled::new(CancelReason::Shutdown, true));
    let tag = |deliveries: u32| Tag::new().delivered(deliveries);
    assert_eq!(release.decide(&tag(9), &refused()), Ok(Verdict::release()));
    let bounded = release.delivery_limit(5);
    for (deliveries, outcome, verdict) in [
        (4, refused(), Verdict::release()),
        (5, refused(), Verdict::Reject),
        (9, drained(), Verdict::release()),
    ] {
        assert_eq!(bounded.decide(&tag(deliveries), &outcome), Ok(verdict));
    }
}

#[test]
#[should_panic(expected = "no job is delivered less than once")]
fn a_limit_of_zero_is_refused() {
    let _layer = SentinelLayer::new(()).delivery_limit(0);
}
