//! Scenarios of a whole worker: the settlement of each outcome, and the state after a drain.

use std::{future::pending, panic::resume_unwind, time::Duration};

use tokio::time::sleep;
use tower::ServiceBuilder;

use crate::{
    cancel::Cancellation,
    conformance::{
        error::ConformanceError,
        fixture::{DeadLetter, Fixture, JobOf},
        run::{PATIENCE, Run, body},
        worker::{Handler, Refused, Runs, Worker},
    },
    consumer::EndCause,
    decode::DecodeLayer,
    job::Job,
    outcome::{CancelReason, OutcomeKind},
    settle::{
        Verdict,
        decision::{DecisionExt, ack_on_success},
    },
};

/// Scenario of one job for each outcome: each is settled as the policy decides.
///
/// # Errors
///
/// Returns the first expectation that was not met.
pub async fn each_outcome_settles_as_decided<F: Fixture>(
    fixture: &F,
) -> Result<(), ConformanceError<F::Error>> {
    let run = Run::new("each_outcome_settles_as_decided", fixture);
    for body in ["value", "error", "panic", "hang", "cancel"] {
        run.publish(body).await?;
    }
    let runs = Runs::default();
    let handler = Handler(move |job: JobOf<F>| {
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
    });
    let jobs = run.subscribe(3).await?;
    let worker = Worker::new(3, ack_on_success().poison_on_panic());
    let summary = run.work(&worker, jobs, handler, run.left(0)).await?;
    let settled = worker.settled().into_iter();
    let mut settled: Vec<_> = settled
        .map(|(kind, verdict)| format!("{kind:?} {verdict}"))
        .collect();
    settled.sort_unstable();
    let expected = [
        "Cancelled release",
        "Completed ack",
        "Completed ack",
        "Completed ack",
        "Completed ack",
        "Failed retry",
        "Panicked reject",
        "TimedOut retry",
    ];
    let expected = expected.map(str::to_owned).to_vec();
    run.equal("the outcomes and their verdicts", settled, expected)?;
    let counts = (summary.called, summary.answered);
    run.equal("the calls and the settled calls", counts, (8, 8))?;
    let is_free = fixture.capabilities().release_is_free();
    let expected = 2 + u64::from(!is_free);
    run.equal("the charged attempts", summary.charged, expected)?;
    run.dead(dead("panic", OutcomeKind::Panicked, "poison"))
        .await
}

/// Scenario of a job that cannot be decoded: it is rejected, and its dead letter has the reason.
///
/// # Errors
///
/// Returns the first expectation that was not met.
pub async fn a_job_that_cannot_be_decoded_is_rejected_with_a_reason<F: Fixture>(
    fixture: &F,
) -> Result<(), ConformanceError<F::Error>> {
    let run = Run::new(
        "a_job_that_cannot_be_decoded_is_rejected_with_a_reason",
        fixture,
    );
    run.publish("not a number").await?;
    run.publish("7").await?;
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
        .service(Handler(|number: u32| async move {
            match number {
                7 => Ok(()),
                _ => Err(Refused),
            }
        }));
    let jobs = run.subscribe(3).await?;
    let worker = Worker::new(3, ack_on_success().reject_undecodable());
    let summary = run.work(&worker, jobs, handler, run.left(0)).await?;
    let verdicts = [Verdict::Ack, Verdict::Reject].map(|verdict| summary.verdicts(verdict));
    let found = (summary.called, verdicts);
    run.equal("the calls, acks and rejects", found, (2, [1, 1]))?;
    let runs = runs.of_each();
    let once = runs.values().all(|runs| *runs == 1);
    run.holds(once, "each job to be decoded once", &runs)?;
    let message = "the job cannot be decoded: invalid digit found in string";
    run.dead(dead("not a number", OutcomeKind::Failed, message))
        .await
}

/// Scenario of a job that always fails, under a delivery limit: it ends as a dead letter; without a
/// count of deliveries the consumer ends as misconfigured.
///
/// # Errors
///
/// Returns the first expectation that was not met.
pub async fn a_delivery_limit_ends_a_loop<F: Fixture>(
    fixture: &F,
) -> Result<(), ConformanceError<F::Error>> {
    let run = Run::new("a_delivery_limit_ends_a_loop", fixture);
    run.publish("poison").await?;
    let runs = Runs::default();
    let handler = {
        let runs = runs.clone();
        Handler(move |job: JobOf<F>| {
            runs.begin(&body(&job));
            async { Err(Refused) }
        })
    };
    let worker = Worker::new(3, ack_on_success().delivery_limit(3));
    let jobs = run.subscribe(3).await?;
    if !fixture.counts_deliveries() {
        // An unknown count is not zero: it shows at the first job, which stays in the queue.
        let never = pending();
        let expected = "a consumer that ends as misconfigured";
        let working = worker.work::<F, _, _>(jobs, handler, never);
        match run.in_time(expected, working).await?? {
            Err(error) if matches!(error.cause(), EndCause::Misconfigured(_)) => {}
            Err(error) => return run.violated(expected, format_args!("the error \"{error}\"")),
            Ok(summary) => return run.violated(expected, format_args!("{summary:?}")),
        }
        let found = (worker.settled().len(), runs.total());
        run.equal("the settled jobs and the runs", found, (0, 1))?;
        return run.left(1).await;
    }
    run.work(&worker, jobs, handler, run.left(0)).await?;
    let settled = worker.settled().into_iter();
    // In no order: if a retry takes two steps, the next delivery may be settled between them.
    let mut verdicts: Vec<_> = settled.map(|(_, verdict)| verdict.as_str()).collect();
    verdicts.sort_unstable();
    let expected = vec!["reject", "retry", "retry"];
    run.equal("the verdicts, sorted,", verdicts, expected)?;
    let message = Refused.to_string();
    run.dead(dead("poison", OutcomeKind::Failed, &message))
        .await
}

/// Scenario of a shutdown among many jobs: each job that is not acked is in the queue, and none is unacked.
///
/// # Errors
///
/// Returns the first expectation that was not met.
pub async fn a_shutdown_under_load_leaves_nothing_unacked<F: Fixture>(
    fixture: &F,
) -> Result<(), ConformanceError<F::Error>> {
    let run = Run::new("a_shutdown_under_load_leaves_nothing_unacked", fixture);
    run.publish_n(50).await?;
    // Ten jobs at a time, of which five end and five never do.
    let runs = Runs::default();
    let handler = {
        let runs = runs.clone();
        Handler(move |job: JobOf<F>| {
            let body = body(&job);
            let ends = body.bytes().last().is_some_and(|digit| digit < b'5');
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
    let worker = Worker::new(10, ack_on_success()).limit(PATIENCE);
    let jobs = run.subscribe(10).await?;
    let many = run.eventually("whether 15 jobs were begun", true, async || {
        Ok(runs.total() >= 15)
    });
    let summary = run.work(&worker, jobs, handler, many).await?;
    let acked = summary.verdicts(Verdict::Ack);
    let released = summary.verdicts(Verdict::release());
    run.equal(
        "the calls and the abandoned ones",
        (summary.called, summary.abandoned),
        (acked + released, 0),
    )?;
    let some = acked > 0 && released > 0;
    run.holds(some, "some acked and some released jobs", &summary)?;
    let left = 50 - acked as usize;
    if fixture.tells_given_back() {
        let found = async || Ok(run.backlog().await?.unacked);
        run.eventually("the unacked jobs", 0, found).await?;
    }
    let found = async || Ok(run.backlog().await?.total);
    run.eventually("the jobs that are left", left, found)
        .await?;

    // The jobs that are not acked are there, and go to the next worker.
    let jobs = run.subscribe(10).await?;
    let handler = Handler(|_: JobOf<F>| async { Ok::<_, Refused>(()) });
    let summary = run.work(&worker, jobs, handler, run.left(0)).await?;
    let acked = summary.verdicts(Verdict::Ack) as usize;
    run.equal("the jobs that the next worker acks", acked, left)
}

/// Scenario of a drain that releases its jobs: it counts as an attempt only if the capabilities say so.
///
/// # Errors
///
/// Returns the first expectation that was not met.
pub async fn a_release_at_drain_is_charged_only_where_the_broker_counts_it<F: Fixture>(
    fixture: &F,
) -> Result<(), ConformanceError<F::Error>> {
    let run = Run::new(
        "a_release_at_drain_is_charged_only_where_the_broker_counts_it",
        fixture,
    );
    run.publish_n(3).await?;
    let runs = Runs::default();
    let handler = {
        let runs = runs.clone();
        Handler(move |job: JobOf<F>| {
            runs.begin(&body(&job));
            pending::<Result<(), Refused>>()
        })
    };
    let worker = Worker::new(3, ack_on_success()).limit(PATIENCE);
    let jobs = run.subscribe(3).await?;
    let all = run.eventually("the runs", 3, async || Ok(runs.total()));
    let summary = run.work(&worker, jobs, handler, all).await?;
    let expected = vec![(OutcomeKind::Cancelled, Verdict::release()); 3];
    run.equal("the outcomes and verdicts", worker.settled(), expected)?;
    let is_free = fixture.capabilities().release_is_free();
    let expected = if is_free { 0 } else { 3 };
    run.equal("the charged attempts", summary.charged, expected)?;
    if fixture.tells_given_back() {
        run.left(3).await?;
    }
    let mut jobs = run.subscribe(3).await?;
    for job in run.take_n(&mut jobs, 3).await? {
        run.delivered(&job.tag(), if is_free { 1 } else { 2 })?;
        run.settle(&job, Verdict::Ack).await?;
    }
    run.left(0).await?;
    run.quiet(&mut jobs).await
}

fn dead(body: &str, kind: OutcomeKind, message: &str) -> DeadLetter {
    DeadLetter {
        body: body.into(),
        kind,
        message: Some(message.into()),
    }
}
