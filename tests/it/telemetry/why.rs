//! The log of a job that has not completed contains the reason, and the verdict.

use std::{
    convert::Infallible,
    future::{pending, ready},
    time::Duration,
};

use futures_util::{FutureExt, StreamExt};
use tokio_util::sync::CancellationToken;
use tower::service_fn;
use tower_layer::Layer;
use tower_sentinel::{
    DecisionExt, DecodeLayer, Outcome, Report, SentinelLayer, SettlePolicy, Verdict,
    ack_on_success,
    broker::memory::{Broker, Delivery, DeliveryTag},
    cancel::Cancellation,
    outcome::CancelReason,
    settle::decision::{Decision, Undecided},
};

use crate::support::{Bomb, Refused, call, log::Log, raise};

#[derive(Clone, Copy, Debug)]
enum Fate {
    Value,
    Error,
    Panic,
    Hang,
    LosesItsLease,
    ShutDown,
}

const FATES: [Fate; 6] = [
    Fate::Value,
    Fate::Error,
    Fate::Panic,
    Fate::Hang,
    Fate::LosesItsLease,
    Fate::ShutDown,
];

async fn process(job: Delivery<Fate>) -> Result<(), Refused> {
    match job.payload() {
        Fate::Value => return Ok(()),
        Fate::Error => return Err(Refused),
        Fate::Panic => raise("index 7"),
        Fate::LosesItsLease => Cancellation::current().cancel(CancelReason::LeaseLost),
        Fate::Hang | Fate::ShutDown => {}
    }
    pending().await
}

/// Delivers a job for the second time, from a queue `orders` with dead letters or without.
fn deliver<P: Clone>(payload: P, has_dead_letter: bool) -> (impl Sized, Delivery<P>) {
    let broker = Broker::new();
    let queue = broker.queue("orders");
    let queue = match has_dead_letter {
        true => {
            broker.queue("dead").declare();
            queue.dead_letter("dead").declare()
        }
        false => queue.declare(),
    };
    queue.publish(payload);
    drop(queue.subscribe(1).unwrap().next().now_or_never().unwrap());
    let mut jobs = queue.subscribe(1).unwrap();
    let job = jobs.next().now_or_never().unwrap().unwrap().unwrap();
    (jobs, job)
}

/// Returns the log of a job, and the name by which it is known there.
async fn logged<D>(fate: Fate, decision: D, has_dead_letter: bool) -> Vec<String>
where
    D: Decision<DeliveryTag<Fate>, (), Refused> + Clone + Send + 'static,
{
    let (log, _guard) = Log::start();
    let (_jobs, job) = deliver(fate, has_dead_letter);
    let shutdown = CancellationToken::new();
    if let Fate::ShutDown = fate {
        shutdown.cancel();
    }
    let mut sentinel = SentinelLayer::new(SettlePolicy::new(decision))
        .timeout(Duration::from_secs(10))
        .shutdown(shutdown)
        .layer(service_fn(process));
    call(&mut sentinel, job).await.ok();
    log.lines()
}

const KNOWN: &str = r#"deliveries=2 messaging.destination.name="orders" messaging.message.id="1""#;

#[tokio::test(start_paused = true)]
async fn a_job_that_has_not_completed_is_one_line_that_says_why() {
    let second = Duration::from_secs(1);
    let later = move |_: &DeliveryTag<Fate>, outcome: &Outcome<(), Refused>| match outcome {
        Outcome::Cancelled(_) => Verdict::release(),
        _ => Verdict::retry_after(second),
    };
    for fate in FATES {
        let (level, what, why, verdict, rest) = match fate {
            Fate::Value => {
                assert_eq!(logged(fate, later, true).await, [""; 0]);
                continue;
            }
            Fate::Error => {
                let why = r#"error.type="it::support::Refused" error.message="refused" "#;
                ("WARN", "failed", why, "retry after 1s", "")
            }
            Fate::Panic => {
                let rest = r#" exception.message="index 7""#;
                ("ERROR", "panicked", "", "retry after 1s", rest)
            }
            Fate::Hang => {
                let rest = " limit=10s stopped=true";
                ("WARN", "passed its time limit", "", "retry after 1s", rest)
            }
            Fate::LosesItsLease => {
                let rest = r#" reason="lease_lost" stopped=true"#;
                ("WARN", "was cancelled", "", "release", rest)
            }
            Fate::ShutDown => {
                let rest = r#" reason="shutdown" started=false stopped=true"#;
                ("INFO", "was cancelled", "", "release", rest)
            }
        };
        let wanted = format!("{level} the job {what} {why}verdict={verdict} {KNOWN}{rest}");
        assert_eq!(logged(fate, later, true).await, [wanted], "{fate:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_reject_is_an_error_and_says_what_is_dropped() {
    let reject = |_: &DeliveryTag<Fate>, _: &Outcome<(), Refused>| Verdict::Reject;
    let why = r#"error.type="it::support::Refused" error.message="refused" verdict=reject"#;
    for (has_dead_letter, what) in [
        (true, "the job failed"),
        (
            false,
            "the job failed, and is dropped: no dead-letter queue is set",
        ),
    ] {
        let wanted = format!("ERROR {what} {why} {KNOWN}");
        assert_eq!(logged(Fate::Error, reject, has_dead_letter).await, [wanted]);
    }
}

#[derive(Clone)]
struct Undecidable;

impl<Tag, T, E> Decision<Tag, T, E> for Undecidable {
    fn decide(&self, _: &Tag, _: &Outcome<T, E>) -> Result<Verdict, Undecided> {
        Err(Undecided::DeliveriesUnknown)
    }
}

#[tokio::test(start_paused = true)]
async fn a_job_without_a_verdict_says_why_too() {
    let lines = logged(Fate::Error, Undecidable, true).await;
    let why = r#"error.type="it::support::Refused" error.message="refused""#;
    let wanted = format!("WARN the job failed, and is not settled {why} {KNOWN}");
    assert_eq!(lines, [wanted]);
}

#[tokio::test(start_paused = true)]
async fn a_job_that_is_not_run_says_why() {
    let (log, _guard) = Log::start();
    let (_jobs, job) = deliver(Fate::Value, true);
    let mut sentinel = SentinelLayer::new(SettlePolicy::new(ack_on_success()))
        .delivery_limit(1)
        .layer(service_fn(process));
    call(&mut sentinel, job).await.unwrap();
    let why = r#"error.message="delivered 2 times without an outcome" verdict=reject"#;
    let rest = r#"reason="delivery_limit" started=false stopped=true"#;
    let wanted = format!("ERROR the job was not run {why} {KNOWN} {rest}");
    assert_eq!(log.lines(), [wanted]);
}

#[tokio::test(start_paused = true)]
async fn a_job_that_cannot_be_decoded_is_called_so() {
    let (log, _guard) = Log::start();
    let (_jobs, job) = deliver("seven", true);
    let decision = ack_on_success().reject_undecodable();
    let mut sentinel = SentinelLayer::new(SettlePolicy::new(decision)).layer(
        DecodeLayer::new(|body: &[u8]| str::from_utf8(body).unwrap().parse::<u32>())
            .layer(service_fn(|_: u32| ready(Ok::<_, Infallible>(())))),
    );
    call(&mut sentinel, job).await.unwrap();
    let lines = log.lines();
    let said = r#"error.message="the job cannot be decoded: invalid digit found in string""#;
    assert_eq!(lines.len(), 1, "{lines:#?}");
    assert!(lines[0].starts_with("ERROR the job failed "), "{lines:#?}");
    assert!(lines[0].contains(said), "{lines:#?}");
}

/// An error that panics when it is printed.
#[derive(Debug)]
struct Unprintable;

impl std::fmt::Display for Unprintable {
    fn fmt(&self, _: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::panic::panic_any(Bomb)
    }
}

#[tokio::test(start_paused = true)]
async fn an_error_that_cannot_be_printed_is_a_line_too() {
    let (log, _guard) = Log::start();
    let (_jobs, job) = deliver((), true);
    let mut sentinel = SentinelLayer::new(SettlePolicy::new(ack_on_success()))
        .layer(service_fn(|_| ready(Err::<(), _>(Unprintable))));
    call(&mut sentinel, job).await.unwrap();
    let lines = log.lines();
    assert_eq!(lines.len(), 1, "{lines:#?}");
    assert!(
        lines[0].contains("the error cannot be printed"),
        "{lines:#?}"
    );
}

#[tokio::test(start_paused = true)]
async fn without_a_settle_policy_the_sentinel_tells() {
    let (log, _guard) = Log::start();
    let (_jobs, job) = deliver(Fate::Error, true);
    let policy = service_fn(|_: Report<DeliveryTag<Fate>, (), Refused>| {
        ready(Ok::<_, Infallible>("nacked"))
    });
    let mut sentinel = SentinelLayer::new(policy).layer(service_fn(process));
    call(&mut sentinel, job).await.unwrap();
    let wanted = r#"WARN the job failed error.type="it::support::Refused""#;
    assert_eq!(log.lines(), [wanted]);
}

#[tokio::test(start_paused = true)]
async fn a_settle_policy_within_another_tells_alone() {
    let (log, _guard) = Log::start();
    let (_jobs, job) = deliver(Fate::Error, true);
    let policy = SettlePolicy::new(ack_on_success());
    let policy = tower::ServiceBuilder::new()
        .timeout(Duration::from_secs(60))
        .service(policy);
    let mut sentinel = SentinelLayer::new(policy).layer(service_fn(process));
    call(&mut sentinel, job).await.unwrap();
    let lines = log.lines();
    assert_eq!(lines.len(), 1, "{lines:#?}");
    assert!(lines[0].contains("verdict=retry"), "{lines:#?}");
}
