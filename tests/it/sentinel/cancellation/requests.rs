//! Requests to stop, from each place.

use std::{
    convert::Infallible,
    future::pending,
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use futures_util::future::join_all;
use tokio::{runtime::Handle, task::yield_now, time::sleep};
use tokio_util::sync::CancellationToken;
use tower::{Layer, ServiceExt, service_fn};
use tower_sentinel::{
    Outcome, Report, SentinelLayer, cancel::Cancellation, cancelled, outcome::CancelReason,
};

use super::{LIMIT, SECOND, layer, run};
use crate::support::{Blocked, Fate, Recorder, Refused, Seen, Unit, Work, Worker, call, idle};

// === requests ===

#[tokio::test(start_paused = true)]
async fn a_child_task_can_cancel_its_job() {
    let recorder = Recorder::default();
    let report = run(layer(&recorder), || async {
        let handle = Cancellation::current();
        tokio::spawn(async move {
            sleep(SECOND).await;
            handle.cancel(CancelReason::LeaseLost);
        });
        pending().await
    });
    assert_eq!(report.await.elapsed, SECOND);
    let seen = Seen::cancelled(CancelReason::LeaseLost, true);
    assert_eq!(recorder.reports(), [seen]);
}

#[tokio::test]
async fn a_plain_thread_can_cancel_a_job() {
    let recorder = Recorder::default();
    let report = run(layer(&recorder).no_timeout(), || async {
        let handle = Cancellation::current();
        thread::spawn(move || handle.cancel(CancelReason::Requested));
        pending().await
    });
    assert!(report.await.outcome.is_cancelled());
    let seen = Seen::cancelled(CancelReason::Requested, true);
    assert_eq!(recorder.reports(), [seen]);
}

#[tokio::test]
async fn a_plain_thread_can_cancel_a_job_that_blocks_its_own() {
    let recorder = Recorder::default();
    let thread = Blocked::until_released();
    let jobs = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let blocked = Arc::clone(&thread);
    // No limit and no other event: the request alone must wake the supervision.
    let stop_wait = Duration::from_millis(30);
    let layer = layer(&recorder)
        .no_timeout()
        .stop_wait(stop_wait)
        .runtime(jobs.handle().clone());
    let report = run(layer, move || {
        let thread = Arc::clone(&blocked);
        async move {
            let handle = Cancellation::current();
            let watched = Arc::clone(&thread);
            thread::spawn(move || {
                while !watched.entered() {
                    thread::yield_now();
                }
                handle.cancel(CancelReason::LeaseLost);
            });
            thread.block();
            Ok(())
        }
    })
    .await;
    let Outcome::Cancelled(cancelled) = report.outcome else {
        panic!("{report:?}");
    };
    assert_eq!(cancelled.reason(), CancelReason::LeaseLost);
    assert!(!cancelled.stopped());
    assert!(report.elapsed >= stop_wait);

    thread.release();
    idle(jobs.handle()).await;
    idle(&Handle::current()).await;
    assert_eq!(recorder.reports().len(), 1);
    jobs.shutdown_background();
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_job_has_its_grace() {
    let recorder = Recorder::default();
    let report = run(layer(&recorder).grace(3 * SECOND), || async {
        sleep(SECOND).await;
        Cancellation::current().cancel(CancelReason::Requested);
        cancelled().await;
        sleep(SECOND).await;
        Ok(())
    });
    assert_eq!(report.await.elapsed, 2 * SECOND);
    assert_eq!(recorder.reports(), [Seen::completed()]);

    let recorder = Recorder::default();
    let report = run(layer(&recorder).grace(3 * SECOND), || async {
        sleep(SECOND).await;
        Cancellation::current().cancel(CancelReason::Requested);
        pending().await
    });
    assert_eq!(report.await.elapsed, 4 * SECOND);
    let seen = Seen::cancelled(CancelReason::Requested, true);
    assert_eq!(recorder.reports(), [seen]);
}

#[tokio::test(start_paused = true)]
async fn a_job_that_cancels_itself_and_returns_in_the_same_breath_has_completed() {
    let recorder = Recorder::default();
    let report = run(layer(&recorder), || async {
        Cancellation::current().cancel(CancelReason::Requested);
        Ok(())
    });
    assert!(report.await.outcome.is_completed());
    assert_eq!(recorder.reports(), [Seen::completed()]);
}

#[tokio::test(start_paused = true)]
async fn the_first_of_two_requests_wins() {
    let recorder = Recorder::default();
    let report = run(layer(&recorder), || async {
        let handle = Cancellation::current();
        handle.cancel(CancelReason::LeaseLost);
        handle.cancel(CancelReason::Requested);
        pending().await
    });
    report.await;
    let seen = Seen::cancelled(CancelReason::LeaseLost, true);
    assert_eq!(recorder.reports(), [seen]);
}

#[tokio::test(start_paused = true)]
async fn a_request_during_the_grace_does_not_change_the_cause() {
    let recorder = Recorder::default();
    let shutdown = CancellationToken::new();
    let layer = layer(&recorder)
        .grace(3 * SECOND)
        .shutdown(shutdown.clone());
    let report = run(layer, move || {
        let shutdown = shutdown.clone();
        async move {
            cancelled().await;
            Cancellation::current().cancel(CancelReason::LeaseLost);
            shutdown.cancel();
            pending().await
        }
    });
    // Nor does it cut the grace.
    assert_eq!(report.await.elapsed, LIMIT + 3 * SECOND);
    assert_eq!(recorder.reports(), [Seen::timed_out(true)]);
}

#[tokio::test(start_paused = true)]
async fn the_limit_during_the_grace_does_not_change_the_cause() {
    let recorder = Recorder::default();
    let report = run(layer(&recorder).grace(3 * SECOND), || async {
        sleep(LIMIT - SECOND).await;
        Cancellation::current().cancel(CancelReason::LeaseLost);
        pending().await
    });
    assert_eq!(report.await.elapsed, LIMIT + 2 * SECOND);
    let seen = Seen::cancelled(CancelReason::LeaseLost, true);
    assert_eq!(recorder.reports(), [seen]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_races_completion_many_thousand_times_gives_one_outcome_each() {
    const JOBS: usize = 10_000;
    let recorder = Recorder::default();
    let service = service_fn(|_: Unit| async {
        let handle = Cancellation::current();
        let child = tokio::spawn(async move { handle.cancel(CancelReason::Requested) });
        yield_now().await;
        drop(child);
        Ok::<_, Refused>(())
    });
    let sentinel = layer(&recorder).layer(service);
    let callers = (0..JOBS).map(|_| tokio::spawn(sentinel.clone().oneshot(Unit::default())));
    for report in join_all(callers).await {
        let seen = Seen::from(&report.unwrap().unwrap().outcome);
        // Which of the two is the scheduler's choice.
        let cancelled = Seen::cancelled(CancelReason::Requested, true);
        assert!(seen == Seen::completed() || seen == cancelled, "{seen:?}");
    }
    assert_eq!(recorder.reports().len(), JOBS);
}

// === a sentinel inside a sentinel ===

#[tokio::test(start_paused = true)]
async fn an_inner_job_that_cancels_itself_does_not_cancel_the_outer_one() {
    let (outer, inner) = (Recorder::default(), Recorder::default());
    let cancels_itself = service_fn(|_: Unit| async {
        sleep(SECOND).await;
        Cancellation::current().cancel(CancelReason::LeaseLost);
        pending::<Result<(), Refused>>().await
    });
    let nested = layer(&inner).layer(cancels_itself);
    let report = run(layer(&outer), move || {
        let nested = nested.clone();
        async move {
            let before = Cancellation::current();
            let report = nested.oneshot(Unit::default()).await.unwrap();
            assert!(report.outcome.is_cancelled());
            assert!(!before.is_cancelled());
            assert!(!Cancellation::current().is_cancelled());
            Ok(())
        }
    });
    assert_eq!(report.await.elapsed, SECOND);
    assert_eq!(outer.reports(), [Seen::completed()]);
    let seen = Seen::cancelled(CancelReason::LeaseLost, true);
    assert_eq!(inner.reports(), [seen]);
}

#[tokio::test(start_paused = true)]
async fn an_outer_job_that_is_stopped_drops_and_so_cancels_the_inner_one() {
    let (outer, inner) = (Recorder::default(), Recorder::default());
    let nested = layer(&inner).no_timeout().layer(Worker::default());
    let report = run(layer(&outer), move || {
        let nested = nested.clone();
        async move {
            nested.oneshot(Work::new(Fate::Hang)).await.unwrap();
            Ok(())
        }
    });
    report.await;
    idle(&Handle::current()).await;
    assert_eq!(outer.reports(), [Seen::timed_out(true)]);
    let seen = Seen::cancelled(CancelReason::CallerDropped, true);
    assert_eq!(inner.reports(), [seen]);
}

#[tokio::test(start_paused = true)]
async fn a_policy_is_outside_the_job() {
    let inside = Arc::new(Mutex::new(Vec::new()));
    let told = Arc::clone(&inside);
    let policy = service_fn(move |report: Report<Unit, (), Refused>| {
        let handle = Cancellation::current();
        told.lock().unwrap().push(handle.is_cancelled());
        async move { Ok::<_, Infallible>(report) }
    });
    let service = service_fn(|_: Unit| pending::<Result<(), Refused>>());
    let mut sentinel = SentinelLayer::new(policy).timeout(LIMIT).layer(service);
    let report = call(&mut sentinel, Unit::default()).await.unwrap();
    assert!(report.outcome.is_timed_out());
    assert_eq!(*inside.lock().unwrap(), [false]);
}
