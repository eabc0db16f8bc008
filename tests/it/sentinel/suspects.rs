//! Jobs that may have taken their worker down: they are moved to the queue of the suspects.

use std::{convert::Infallible, future::ready, time::Duration};

use futures_util::StreamExt;
use tower::service_fn;
use tower_layer::Layer;
use tower_sentinel::{
    DecisionExt, Job, Outcome, SentinelLayer, SettlePolicy, Verdict, ack_on_success,
    broker::{
        Envelope,
        dead_letters::{Filter, Redrive},
        memory::{Broker, DeadLetterQueue, Delivery, Queue},
    },
    outcome::{CancelReason, Cancelled, OutcomeKind},
    settle::{Reason, Settle, Settled, decision::Decision},
};

use super::delivery_limit::take;
use crate::support::{Count, Refused, call, log::Log, tag::Tag};

const LIMIT: u32 = 2;

/// A queue with dead letters and suspects, the lane of its suspects, and a job that was delivered to a worker
/// that is gone.
fn after_a_death() -> (
    Broker<&'static str>,
    Queue<&'static str>,
    Queue<&'static str>,
) {
    let broker = Broker::new();
    let lane = broker.queue("lane").dead_letter("dead").declare();
    let queue = broker.queue("jobs").dead_letter("dead").suspects("lane");
    let queue = queue.declare();
    queue.publish_with_headers("poison", [("tenant", "acme")]);
    drop(take(&queue));
    (broker, queue, lane)
}

/// Lets a worker process a job, and returns its settlement and whether it was run.
async fn process(job: Delivery<&'static str>) -> (Settled, bool) {
    let runs = Count::default();
    let counted = runs.clone();
    let mut worker = SentinelLayer::new(SettlePolicy::new(ack_on_success()))
        .delivery_limit(LIMIT)
        .layer(service_fn(move |_| {
            counted.add();
            ready(Ok::<_, Infallible>(()))
        }));
    let settled = call(&mut worker, job).await.unwrap();
    (settled, runs.get() == 1)
}

#[tokio::test(start_paused = true)]
async fn a_suspect_is_moved_without_a_run() {
    let (_broker, queue, lane) = after_a_death();
    let (log, _guard) = Log::start();
    let (_jobs, job) = take(&queue);
    assert!(job.tag().is_suspect());
    let (settled, is_run) = process(job).await;
    assert!(!is_run);
    assert_eq!(
        (settled.kind, settled.verdict, settled.cancelled),
        (
            OutcomeKind::Cancelled,
            Verdict::Reject,
            Some(CancelReason::Suspect)
        )
    );
    assert!(settled.stopped && !settled.charged);
    let lines = log.lines();
    assert_eq!(lines.len(), 1, "{lines:#?}");
    assert!(lines[0].contains("WARN") && lines[0].contains("the job was not run"));

    let counts = queue.counts();
    assert_eq!((counts.suspects, counts.dead, counts.dropped), (1, 0, 0));
    let (_jobs, job) = take(&lane);
    assert_eq!(
        (*job.payload(), job.header("tenant")),
        ("poison", Some("acme"))
    );
    // A handler that looks at its origin does not notice.
    assert_eq!(job.routing_key(), "jobs");
    assert_eq!(
        (job.deliveries(), job.redelivered()),
        (Some(1), Some(false))
    );
    let Reason {
        message, cancelled, ..
    } = &job.death().unwrap().reason;
    let wanted = "suspect: delivered before, and no outcome of that is known";
    assert_eq!(message.as_deref(), Some(wanted));
    assert_eq!(*cancelled, Some(CancelReason::Suspect));
}

#[tokio::test(start_paused = true)]
async fn poison_dies_alone_and_its_dead_letter_belongs_to_the_first_queue() {
    let (broker, queue, lane) = after_a_death();
    process(take(&queue).1).await;
    for deliveries in 1..=LIMIT {
        let (_jobs, job) = take(&lane);
        assert!(!job.tag().is_suspect(), "there is no second lane");
        assert_eq!(job.deliveries(), Some(deliveries));
    }
    let (settled, is_run) = process(take(&lane).1).await;
    assert_eq!((settled.verdict, is_run), (Verdict::Reject, false));
    assert_eq!(settled.cancelled, Some(CancelReason::DeliveryLimit));
    assert_eq!(lane.counts().dead, 1);
    let letters = queue.dead_letters();
    let message = letters[0].death.reason.message.as_deref();
    assert_eq!(message, Some("delivered 3 times without an outcome"));

    let dead = DeadLetterQueue::new(&broker.queue("dead").declare());
    Redrive::new(Filter::all()).run(&dead).await.unwrap();
    let (_jobs, job) = take(&queue);
    assert_eq!(job.deliveries(), Some(1));
    assert_eq!(job.header("x-suspect-of"), None);
}

#[tokio::test(start_paused = true)]
async fn an_innocent_suspect_is_done_in_the_lane() {
    let (_broker, queue, lane) = after_a_death();
    process(take(&queue).1).await;
    let (settled, is_run) = process(take(&lane).1).await;
    assert_eq!((settled.verdict, is_run), (Verdict::Ack, true));
    assert_eq!((lane.counts().acked, lane.counts().dead), (1, 0));
}

/// Verdicts are outcomes: only the end of a channel or of a lease makes a suspect.
#[tokio::test(start_paused = true)]
async fn a_job_that_was_given_back_is_no_suspect() {
    let second = Duration::from_secs(1);
    for verdict in [
        Verdict::retry(),
        Verdict::release(),
        Verdict::retry_after(second),
        Verdict::release_after(second),
    ] {
        let (_broker, queue, _lane) = after_a_death();
        let (mut jobs, job) = take(&queue);
        let reason = Reason::completed(Duration::ZERO);
        job.tag().settle(verdict, reason).await.unwrap();
        let job = jobs.next().await.unwrap().unwrap();
        assert_eq!(job.redelivered(), Some(true));
        assert!(!job.tag().is_suspect(), "{verdict}");
        let (settled, _) = process(job).await;
        assert_ne!(settled.cancelled, Some(CancelReason::Suspect), "{verdict}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_job_whose_lease_ended_is_a_suspect() {
    let broker = Broker::new();
    let second = Duration::from_secs(1);
    let queue = broker.queue("jobs").suspects("lane").lease(second);
    let queue = queue.declare();
    queue.publish("slow");
    let (mut jobs, first) = take(&queue);
    assert!(!first.tag().is_suspect());
    let second = jobs.next().await.unwrap().unwrap();
    assert!(second.tag().is_suspect());
}

/// The reason of the reject decides, and not the job's past.
#[tokio::test(start_paused = true)]
async fn a_suspect_that_was_run_and_rejected_is_a_dead_letter() {
    let (_broker, queue, lane) = after_a_death();
    let mut worker = SentinelLayer::new(SettlePolicy::new(
        ack_on_success().on_error(|_: &Refused| Verdict::Reject),
    ))
    .layer(service_fn(|_| ready(Err::<(), _>(Refused))));
    let (_jobs, job) = take(&queue);
    call(&mut worker, job).await.unwrap();
    assert_eq!((queue.counts().dead, queue.counts().suspects), (1, 0));
    assert_eq!(lane.counts().ready, 0);
}

#[test]
fn a_decision_that_gives_a_suspect_back_is_bounded_by_its_own_limit() {
    let release = |_: &Tag, _: &Outcome<(), Refused>| Verdict::release();
    let refused = || Outcome::Cancelled(Cancelled::new(CancelReason::Suspect, true));
    let bounded = release.delivery_limit(5);
    for (deliveries, verdict) in [(4, Verdict::release()), (5, Verdict::Reject)] {
        let tag = Tag::new().delivered(deliveries);
        assert_eq!(bounded.decide(&tag, &refused()), Ok(verdict));
    }
}
