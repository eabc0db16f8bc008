//! Outcomes that count as failures.

use std::time::Duration;

use futures_util::poll;
use tokio::{
    task::{JoinSet, yield_now},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tower::{Service, ServiceExt};
use tower_layer::Layer;
use tower_sentinel::{
    SentinelLayer,
    intensity::IntensityState,
    outcome::{CancelReason, OutcomeKind},
};

use super::{Fate, Worker, ms, paused, strict};
use crate::support::{Recorder, Seen, Unit, current_thread, raise, turn, until};

/// End of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// By itself, or by its limit of 1 s.
    Limit,
    CallerDrops,
    Shutdown,
}

/// Runs two jobs in a sentinel; returns whether they made it pause, and their outcomes.
async fn run_two(fate: Fate, end: End, grace: Duration) -> (bool, Vec<OutcomeKind>) {
    let recorder = Recorder::default();
    let layer = strict();
    let state = layer.watch();
    let shutdown = CancellationToken::new();
    let mut service = SentinelLayer::new(recorder.policy())
        .timeout(ms(1_000))
        .grace(grace)
        .shutdown(shutdown.clone())
        .layer(layer.layer(Worker::new(fate)));
    let mut responses = JoinSet::new();
    for _ in 0..2 {
        let mut response = Box::pin(service.ready().await.unwrap().call(Unit::default()));
        responses.spawn(async move {
            match end {
                End::CallerDrops => drop(timeout(ms(500), &mut response).await),
                End::Limit | End::Shutdown => drop(response.await),
            }
        });
    }
    sleep(ms(500)).await;
    if end == End::Shutdown {
        shutdown.cancel();
    }
    responses.join_all().await;
    until(|| recorder.reports().len() == 2).await;
    let kinds = recorder.reports().iter().map(|seen| seen.kind).collect();
    (paused(*state.borrow()).is_some(), kinds)
}

#[tokio::test(start_paused = true)]
async fn what_will_have_failed_counts_and_what_will_have_been_cancelled_does_not() {
    use OutcomeKind::{Cancelled, Completed, Failed, Panicked, TimedOut};
    let none = Duration::ZERO;
    let some = ms(100);
    for (fate, end, grace, kind) in [
        (Fate::Ok, End::Limit, none, Completed),
        (Fate::Error, End::Limit, none, Failed),
        (Fate::PanicInCall, End::Limit, none, Panicked),
        (Fate::PanicInFuture, End::Limit, none, Panicked),
        (Fate::Hang, End::Limit, none, TimedOut),
        (Fate::Hang, End::Limit, some, TimedOut),
        (Fate::HangWithBomb, End::Limit, none, TimedOut),
        (Fate::OkWhenTold, End::Limit, some, Completed),
        (Fate::ErrorWhenTold, End::Limit, some, Failed),
        (Fate::PanicWhenTold, End::Limit, some, TimedOut),
        (Fate::Hang, End::CallerDrops, none, Cancelled),
        (Fate::Hang, End::CallerDrops, some, Cancelled),
        (Fate::HangWithBomb, End::CallerDrops, none, Cancelled),
        (Fate::OkWhenTold, End::CallerDrops, some, Completed),
        (Fate::PanicWhenTold, End::CallerDrops, some, Cancelled),
        (Fate::Hang, End::Shutdown, none, Cancelled),
        (Fate::HangWithBomb, End::Shutdown, none, Cancelled),
        (Fate::OkWhenTold, End::Shutdown, some, Completed),
        (Fate::ErrorWhenTold, End::Shutdown, some, Failed),
        (Fate::PanicWhenTold, End::Shutdown, some, Cancelled),
        (Fate::LosesItsLease, End::Limit, none, Cancelled),
        (Fate::LosesItsLease, End::Limit, some, Cancelled),
        (Fate::CancelsThenPanics, End::Limit, none, Cancelled),
        (Fate::CancelsInUnwinding, End::Limit, none, Panicked),
        (Fate::CancelsInUnwinding, End::Limit, some, Panicked),
        (Fate::CancelsInUnwindingOfCall, End::Limit, none, Panicked),
        (Fate::CatchesThenPanics, End::Limit, some, Cancelled),
        (Fate::CatchesThenHangsWithBomb, End::Limit, none, Cancelled),
        (Fate::CatchesThenHangsWithBomb, End::Limit, some, Cancelled),
    ] {
        let case = format!("{fate:?}, {end:?}, {grace:?}");
        let (pauses, kinds) = run_two(fate, end, grace).await;
        assert_eq!(kinds, [kind; 2], "{case}");
        let counts = matches!(kind, Failed | Panicked | TimedOut);
        assert_eq!(pauses, counts, "{case}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_future_that_is_dropped_as_a_panic_unwinds_counts() {
    let layer = strict();
    let state = layer.watch();
    let mut service = layer.layer(Worker::new(Fate::Hang));
    for _ in 0..2 {
        let hanging = service.ready().await.unwrap().call(Unit::default());
        let job = tokio::spawn(async move {
            let _held = hanging;
            yield_now().await;
            raise("around the service")
        });
        assert!(job.await.unwrap_err().is_panic());
    }
    assert!(paused(*state.borrow()).is_some());
}

#[tokio::test(start_paused = true)]
async fn a_future_that_is_dropped_outside_of_a_job_does_not_count() {
    let layer = strict();
    let state = layer.watch();
    let mut service = layer.layer(Worker::new(Fate::Hang));
    for _ in 0..10 {
        let mut hanging = service.ready().await.unwrap().call(Unit::default());
        assert!(poll!(&mut hanging).is_pending());
    }
    assert_eq!(*state.borrow(), IntensityState::Running);
}

#[tokio::test(start_paused = true)]
async fn a_destructor_that_panics_as_the_runtime_of_its_job_ends_does_not_count() {
    let recorder = Recorder::default();
    let layer = strict();
    let state = layer.watch();
    let jobs = current_thread();
    let mut service = SentinelLayer::new(recorder.policy())
        .runtime(jobs.handle().clone())
        .layer(layer.layer(Worker::new(Fate::HangWithBomb)));
    let mut responses = JoinSet::new();
    for _ in 0..2 {
        responses.spawn(service.ready().await.unwrap().call(Unit::default()));
    }
    turn(&jobs);
    jobs.shutdown_background();
    responses.join_all().await;
    let seen = Seen::cancelled(CancelReason::RuntimeGone, true).with_panic(true);
    assert_eq!(recorder.reports(), [seen; 2]);
    assert_eq!(*state.borrow(), IntensityState::Running);
}
