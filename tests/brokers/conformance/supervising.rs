//! What becomes of a job by each outcome, with the whole stack around it.

use std::{
    collections::BTreeMap,
    future::pending,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio_util::sync::CancellationToken;
use tower_sentinel::{
    CancelReason, Cancellation, DecisionExt, Job, OutcomeKind, Settle, Verdict, ack_on_success,
};

use super::{
    DeadLetter, PATIENCE, TestBroker, assert_quiet, body, eventually, left, take_n,
    worker::{JobError, work},
};

/// A time limit for jobs that hang; less than a [`TestBroker::REDELIVERY`].
const LIMIT: Duration = Duration::from_millis(300);

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
                ("error", 1) => Err(JobError::Refused),
                ("panic", _) => panic!("poison"),
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
    let decision = ack_on_success().poison_on_panic();
    let (ended, ()) = tokio::join!(
        work::<B, _, _, _>(jobs, 3, decision, LIMIT, &stop, handler),
        async {
            left(broker, 0).await;
            stop.cancel();
        }
    );
    assert_eq!(ended.errors, [""; 0]);
    let told = ended
        .settled
        .iter()
        .map(|it| format!("{:?} {}", it.kind, it.verdict));
    let mut told: Vec<_> = told.collect();
    told.sort_unstable();
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
    for settled in &ended.settled {
        let is_free = B::capabilities().release_is_free();
        assert_eq!(
            settled.charged,
            match settled.verdict {
                Verdict::Retry { .. } => true,
                Verdict::Release => !is_free,
                _ => false,
            }
        );
    }
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
    let handler = {
        let runs = runs.clone();
        move |job: B::Job| {
            let body = body(&job);
            runs.begin(&body);
            let decoded = body.parse::<u32>().map_err(|_| JobError::NotDecoded);
            async move { decoded.map(|_| ()) }
        }
    };
    let decision = ack_on_success().on_error(|error: &JobError| match error {
        JobError::NotDecoded => Verdict::Reject,
        JobError::Refused => Verdict::retry(),
    });
    let stop = CancellationToken::new();
    let jobs = broker.subscribe(3).await.unwrap();
    let (ended, ()) = tokio::join!(
        work::<B, _, _, _>(jobs, 3, decision, LIMIT, &stop, handler),
        async {
            left(broker, 0).await;
            stop.cancel();
        }
    );
    assert_eq!(ended.errors, [""; 0]);
    assert!(runs.of_each().values().all(|runs| *runs == 1));
    let message = JobError::NotDecoded.to_string();
    eventually_dead::<B>(broker, "not a number", OutcomeKind::Failed, &message).await;
}

pub(crate) async fn a_delivery_limit_ends_a_loop<B: TestBroker>(broker: &B) {
    broker.publish("poison").await;
    let runs = Runs::default();
    let handler = {
        let runs = runs.clone();
        move |job: B::Job| {
            runs.begin(&body(&job));
            async { Err(JobError::Refused) }
        }
    };
    let decision = ack_on_success().delivery_limit(3);
    let stop = CancellationToken::new();
    let jobs = broker.subscribe(3).await.unwrap();
    if !B::COUNTS_DELIVERIES {
        // What is not known is no zero: it shows at the first job, which stays in the queue.
        let ended = work::<B, _, _, _>(jobs, 3, decision, LIMIT, &stop, handler).await;
        assert_eq!((ended.errors.len(), ended.settled.len()), (1, 0));
        assert_eq!(runs.total(), 1);
        return left(broker, 1).await;
    }
    let (ended, ()) = tokio::join!(
        work::<B, _, _, _>(jobs, 3, decision, LIMIT, &stop, handler),
        async {
            left(broker, 0).await;
            stop.cancel();
        }
    );
    assert_eq!(ended.errors, [""; 0]);
    // In no order: where a retry takes two steps, the next delivery may be settled between them.
    let verdicts = ended.settled.iter().map(|it| it.verdict.to_string());
    let mut verdicts: Vec<_> = verdicts.collect();
    verdicts.sort_unstable();
    assert_eq!(verdicts, ["reject", "retry", "retry"]);
    let message = JobError::Refused.to_string();
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
        move |job: B::Job| {
            let body = body(&job);
            let ends = body.parse::<u32>().unwrap() % 10 < 5;
            runs.begin(&body);
            async move {
                match ends {
                    true => Ok(()),
                    false => pending().await,
                }
            }
        }
    };
    let stop = CancellationToken::new();
    let jobs = broker.subscribe(10).await.unwrap();
    let (ended, ()) = tokio::join!(
        work::<B, _, _, _>(jobs, 10, ack_on_success(), PATIENCE, &stop, handler),
        async {
            eventually(true, async || runs.total() >= 15).await;
            stop.cancel();
        }
    );
    assert_eq!(ended.errors, [""; 0]);
    let count = |verdict| {
        ended
            .settled
            .iter()
            .filter(|it| it.verdict == verdict)
            .count()
    };
    let (acked, released) = (count(Verdict::Ack), count(Verdict::Release));
    assert_eq!(acked + released, ended.settled.len());
    assert!(released > 0);
    if B::TELLS_GIVEN_BACK {
        eventually(0, async || broker.backlog().await.unacked).await;
    }
    eventually(50 - acked, async || broker.backlog().await.total).await;

    let mut jobs = broker.subscribe(50).await.unwrap();
    let is_free = B::capabilities().release_is_free();
    for job in take_n::<B>(&mut jobs, 50 - acked).await {
        let begun = runs.of_each().contains_key(&body(&job));
        if begun && is_free && B::COUNTS_DELIVERIES {
            assert_eq!(job.tag().deliveries(), Some(1), "{}", body(&job));
        }
        job.tag()
            .settle(Verdict::Ack, super::reason())
            .await
            .unwrap();
    }
    left(broker, 0).await;
    assert_quiet::<B>(&mut jobs).await;
}
