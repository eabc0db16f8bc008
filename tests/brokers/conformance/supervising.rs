//! What becomes of a job by each outcome, with the whole stack around it.

use std::{
    collections::BTreeMap,
    future::pending,
    panic::resume_unwind,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tower::{ServiceBuilder, service_fn};
use tower_sentinel::{
    DecisionExt, DecodeLayer, Job, Verdict, ack_on_success,
    cancel::Cancellation,
    consumer::EndCause,
    outcome::{CancelReason, OutcomeKind},
    settle::Settle,
};

use super::{
    DeadLetter, PATIENCE, TestBroker, assert_quiet, body, eventually, left, reason,
    settling::assert_deliveries,
    sorted, take_n,
    worker::{Refused, Setup},
};

/// How often each job was begun.
#[derive(Clone, Default)]
pub(super) struct Runs(Arc<Mutex<BTreeMap<String, u32>>>);

impl Runs {
    /// Counts a run, and returns which one of this job it is.
    pub(super) fn begin(&self, body: &str) -> u32 {
        let mut runs = self.0.lock().unwrap();
        let run = runs.entry(body.to_owned()).or_default();
        *run += 1;
        *run
    }

    pub(super) fn of_each(&self) -> BTreeMap<String, u32> {
        self.0.lock().unwrap().clone()
    }

    pub(super) fn total(&self) -> u32 {
        self.0.lock().unwrap().values().sum()
    }
}

pub(crate) async fn each_outcome_settles_as_decided<B: TestBroker>(broker: &B) {
    for body in ["value", "error", "panic", "hang", "cancel"] {
        broker.publish(body).await;
    }
    let runs = Runs::default();
    let handler = move |job: B::Job| {
        let runs = runs.clone();
        async move {
            let body = body(&job);
            match (body.as_str(), runs.begin(&body)) {
                ("error", 1) => Err(Refused),
                // No `panic!`: to print its backtrace may take longer than the time limit.
                ("panic", _) => resume_unwind(Box::new("poison")),
                ("hang", 1) => pending().await,
                ("cancel", 1) => {
                    Cancellation::current().cancel(CancelReason::Requested);
                    pending().await
                }
                _ => Ok(()),
            }
        }
    };
    let stop = CancellationToken::new();
    let jobs = broker.subscribe(3).await.unwrap();
    let setup = Setup::new(3, ack_on_success().poison_on_panic());
    let (ended, ()) = tokio::join!(
        setup.work::<B, _, _>(jobs, &stop, service_fn(handler)),
        async {
            left(broker, 0).await;
            stop.cancel();
        }
    );
    let summary = ended.unwrap();
    let told = setup.told.all().into_iter();
    let told = sorted(
        told.map(|(kind, verdict)| format!("{kind:?} {verdict}"))
            .collect(),
    );
    let wanted = [
        "Cancelled release",
        "Completed ack",
        "Completed ack",
        "Completed ack",
        "Completed ack",
        "Failed retry",
        "Panicked reject",
        "TimedOut retry",
    ];
    assert_eq!(told, wanted);
    assert_eq!((summary.called, summary.answered), (8, 8));
    let is_free = B::capabilities().release_is_free();
    assert_eq!(summary.charged, 2 + u64::from(!is_free));
    eventually_dead::<B>(broker, "panic", OutcomeKind::Panicked, "poison").await;
}

async fn eventually_dead<B: TestBroker>(broker: &B, body: &str, kind: OutcomeKind, message: &str) {
    let dead = DeadLetter {
        body: body.into(),
        kind,
        message: Some(message.into()),
    };
    let dead = match B::capabilities().has_dead_letter() {
        true => vec![dead],
        false => Vec::new(),
    };
    eventually(dead, async || broker.dead_letters().await).await;
}

pub(crate) async fn a_job_that_cannot_be_decoded_is_rejected_with_a_reason<B: TestBroker>(
    broker: &B,
) {
    broker.publish("not a number").await;
    broker.publish("7").await;
    let runs = Runs::default();
    let codec = {
        let runs = runs.clone();
        move |bytes: &[u8]| {
            let body = String::from_utf8_lossy(bytes);
            runs.begin(&body);
            body.parse::<u32>()
        }
    };
    let handler = ServiceBuilder::new()
        .layer(DecodeLayer::new(codec))
        .service_fn(|number: u32| async move {
            assert_eq!(number, 7);
            Ok::<_, Refused>(())
        });
    let stop = CancellationToken::new();
    let jobs = broker.subscribe(3).await.unwrap();
    let setup = Setup::new(3, ack_on_success().reject_undecodable());
    let (ended, ()) = tokio::join!(setup.work::<B, _, _>(jobs, &stop, handler), async {
        left(broker, 0).await;
        stop.cancel();
    });
    let summary = ended.unwrap();
    let verdicts = [Verdict::Ack, Verdict::Reject].map(|verdict| summary.verdicts(verdict));
    assert_eq!((summary.called, verdicts), (2, [1, 1]));
    assert!(runs.of_each().values().all(|runs| *runs == 1));
    let message = "the job cannot be decoded: invalid digit found in string";
    eventually_dead::<B>(broker, "not a number", OutcomeKind::Failed, message).await;
}

pub(crate) async fn a_delivery_limit_ends_a_loop<B: TestBroker>(broker: &B) {
    broker.publish("poison").await;
    let runs = Runs::default();
    let handler = {
        let runs = runs.clone();
        service_fn(move |job: B::Job| {
            runs.begin(&body(&job));
            async { Err(Refused) }
        })
    };
    let setup = Setup::new(3, ack_on_success().delivery_limit(3));
    let stop = CancellationToken::new();
    let jobs = broker.subscribe(3).await.unwrap();
    if !B::COUNTS_DELIVERIES {
        // What is not known is no zero: it shows at the first job, which stays in the queue.
        let error = setup
            .work::<B, _, _>(jobs, &stop, handler)
            .await
            .unwrap_err();
        assert!(
            matches!(error.cause(), EndCause::Misconfigured(_)),
            "{error}"
        );
        assert_eq!((setup.told.all().len(), runs.total()), (0, 1));
        return left(broker, 1).await;
    }
    let (ended, ()) = tokio::join!(setup.work::<B, _, _>(jobs, &stop, handler), async {
        left(broker, 0).await;
        stop.cancel();
    });
    ended.unwrap();
    let told = setup.told.all().into_iter();
    // In no order: where a retry takes two steps, the next delivery may be settled between them.
    let mut verdicts: Vec<_> = told.map(|(_, verdict)| verdict.as_str()).collect();
    verdicts.sort_unstable();
    assert_eq!(verdicts, ["reject", "retry", "retry"]);
    let message = Refused.to_string();
    eventually_dead::<B>(broker, "poison", OutcomeKind::Failed, &message).await;
}

pub(crate) async fn a_shutdown_under_load_leaves_nothing_unacked<B: TestBroker>(broker: &B) {
    for n in 0..50 {
        broker.publish(&n.to_string()).await;
    }
    // Ten jobs at a time, of which five end and five would never.
    let runs = Runs::default();
    let handler = {
        let runs = runs.clone();
        service_fn(move |job: B::Job| {
            let body = body(&job);
            let ends = body.parse::<u32>().unwrap() % 10 < 5;
            runs.begin(&body);
            async move {
                match ends {
                    true => sleep(Duration::from_millis(20)).await,
                    false => pending().await,
                }
                Ok::<_, Refused>(())
            }
        })
    };
    let setup = Setup {
        limit: PATIENCE,
        ..Setup::new(10, ack_on_success())
    };
    let stop = CancellationToken::new();
    let jobs = broker.subscribe(10).await.unwrap();
    let (ended, ()) = tokio::join!(setup.work::<B, _, _>(jobs, &stop, handler), async {
        eventually(true, async || runs.total() >= 15).await;
        stop.cancel();
    });
    let summary = ended.unwrap();
    let acked = summary.verdicts(Verdict::Ack) as usize;
    let released = summary.verdicts(Verdict::release()) as usize;
    assert_eq!(
        (summary.called as usize, summary.abandoned),
        (acked + released, 0)
    );
    assert!(acked > 0 && released > 0, "{summary:?}");
    if B::TELLS_GIVEN_BACK {
        eventually(0, async || broker.backlog().await.unacked).await;
    }
    eventually(50 - acked, async || broker.backlog().await.total).await;

    // What is not acked is there, and goes to the next one.
    let stop = CancellationToken::new();
    let jobs = broker.subscribe(10).await.unwrap();
    let handler = service_fn(|_: B::Job| async { Ok::<_, Refused>(()) });
    let (ended, ()) = tokio::join!(setup.work::<B, _, _>(jobs, &stop, handler), async {
        left(broker, 0).await;
        stop.cancel();
    });
    assert_eq!(ended.unwrap().verdicts(Verdict::Ack) as usize, 50 - acked);
}

pub(crate) async fn a_release_at_drain_is_charged_only_where_the_broker_counts_it<B: TestBroker>(
    broker: &B,
) {
    for n in 0..3 {
        broker.publish(&n.to_string()).await;
    }
    let runs = Runs::default();
    let handler = {
        let runs = runs.clone();
        service_fn(move |job: B::Job| {
            runs.begin(&body(&job));
            pending::<Result<(), Refused>>()
        })
    };
    let setup = Setup {
        limit: PATIENCE,
        ..Setup::new(3, ack_on_success())
    };
    let stop = CancellationToken::new();
    let jobs = broker.subscribe(3).await.unwrap();
    let (ended, ()) = tokio::join!(setup.work::<B, _, _>(jobs, &stop, handler), async {
        eventually(3, async || runs.total()).await;
        stop.cancel();
    });
    let summary = ended.unwrap();
    assert_eq!(
        setup.told.all(),
        [(OutcomeKind::Cancelled, Verdict::release()); 3]
    );
    let is_free = B::capabilities().release_is_free();
    assert_eq!(summary.charged, if is_free { 0 } else { 3 });
    if B::TELLS_GIVEN_BACK {
        left(broker, 3).await;
    }
    let mut jobs = broker.subscribe(3).await.unwrap();
    for job in take_n::<B>(&mut jobs, 3).await {
        assert_deliveries::<B>(&job.tag(), if is_free { 1 } else { 2 });
        let acked = job.tag().settle(Verdict::Ack, reason()).await;
        acked.unwrap();
    }
    left(broker, 0).await;
    assert_quiet::<B>(&mut jobs).await;
}
