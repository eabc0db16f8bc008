//! Shutdowns, and the end of a runtime.

use std::{
    future::pending,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::future::join_all;
use tokio::{
    sync::oneshot,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tower::{Layer, Service, ServiceExt};
use tower_sentinel::outcome::{CancelReason, OutcomeKind};

use super::{SECOND, layer, run};
use crate::support::{Fate, Recorder, Seen, WORK, Work, Worker, call, current_thread, turn, until};

// === shutdown ===

#[tokio::test(start_paused = true)]
async fn a_shutdown_cancels_all_jobs_at_once() {
    let (recorder, shutdown) = (Recorder::default(), CancellationToken::new());
    let sentinel = layer(&recorder)
        .shutdown(shutdown.clone())
        .layer(Worker::default());
    let jobs = (0..10).map(|_| sentinel.clone().oneshot(Work::new(Fate::Hang)));
    let stop = async {
        sleep(SECOND).await;
        shutdown.cancel();
    };
    let (reports, ()) = tokio::join!(join_all(jobs), stop);
    for report in reports {
        assert_eq!(report.unwrap().elapsed, SECOND);
    }
    let seen = Seen::cancelled(CancelReason::Shutdown, true);
    assert_eq!(recorder.reports(), [seen; 10]);
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_before_the_call_cancels_the_job() {
    let (recorder, shutdown) = (Recorder::default(), CancellationToken::new());
    shutdown.cancel();
    let started = Instant::now();
    let report = run(layer(&recorder).shutdown(shutdown), pending).await;
    assert!(report.outcome.is_cancelled());
    assert_eq!(started.elapsed(), Duration::ZERO);
    let seen = Seen::cancelled(CancelReason::Shutdown, true);
    assert_eq!(recorder.reports(), [seen]);
}

#[tokio::test(start_paused = true)]
async fn a_job_may_drain_within_its_grace_at_shutdown() {
    let (recorder, shutdown) = (Recorder::default(), CancellationToken::new());
    shutdown.cancel();
    let layer = layer(&recorder).shutdown(shutdown).grace(2 * WORK);
    let mut sentinel = layer.layer(Worker::default());
    call(&mut sentinel, Work::new(Fate::Value)).await.unwrap();
    assert_eq!(recorder.reports(), [Seen::completed()]);
}

// === the end of a runtime ===

#[tokio::test(start_paused = true)]
async fn a_runtime_that_is_gone_before_the_call_cancels_the_job() {
    let recorder = Recorder::default();
    let jobs = current_thread();
    let handle = jobs.handle().clone();
    jobs.shutdown_background();
    let layer = layer(&recorder).no_timeout().runtime(handle);
    // Virtual time: a hang would end here, after a year.
    let report = timeout(365 * 24 * 3600 * SECOND, run(layer, || async { Ok(()) }));
    let report = report.await.unwrap();
    assert_eq!(report.outcome.kind(), OutcomeKind::Cancelled);
    assert_eq!(report.elapsed, Duration::ZERO);
    let seen = Seen::cancelled(CancelReason::RuntimeGone, true);
    assert_eq!(recorder.reports(), [seen]);
}

#[tokio::test(start_paused = true)]
async fn a_runtime_that_ends_during_the_job_cancels_it() {
    let recorder = Recorder::default();
    let jobs = current_thread();
    let (started, mut running) = oneshot::channel();
    let started = Arc::new(Mutex::new(Some(started)));
    let layer = layer(&recorder).no_timeout().runtime(jobs.handle().clone());
    let report = tokio::spawn(run(layer, move || {
        let started = started.lock().unwrap().take().unwrap();
        async move {
            started.send(()).unwrap();
            pending().await
        }
    }));
    sleep(SECOND).await;
    turn(&jobs);
    running.try_recv().unwrap();
    assert!(!report.is_finished());
    jobs.shutdown_background();
    assert!(report.await.unwrap().outcome.is_cancelled());
    let seen = Seen::cancelled(CancelReason::RuntimeGone, true);
    assert_eq!(recorder.reports(), [seen]);
}

#[tokio::test]
async fn a_runtime_of_threads_that_ends_during_the_job_cancels_it() {
    let recorder = Recorder::default();
    let jobs = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let mut sentinel = layer(&recorder)
        .no_timeout()
        .runtime(jobs.handle().clone())
        .layer(Worker::default());
    let report = sentinel.ready().await.unwrap().call(Work::new(Fate::Hang));
    let report = tokio::spawn(report);
    until(|| jobs.metrics().num_alive_tasks() == 1).await;
    jobs.shutdown_background();
    report.await.unwrap().unwrap();
    let seen = Seen::cancelled(CancelReason::RuntimeGone, true);
    assert_eq!(recorder.reports(), [seen]);
}

#[tokio::test(start_paused = true)]
async fn a_destructor_that_panics_at_the_end_of_its_runtime_is_attached() {
    let recorder = Recorder::default();
    let jobs = current_thread();
    let mut sentinel = layer(&recorder)
        .runtime(jobs.handle().clone())
        .layer(Worker::default());
    let report = sentinel.ready().await.unwrap();
    let report = tokio::spawn(report.call(Work::new(Fate::PanicInDrop)));
    sleep(SECOND).await;
    turn(&jobs);
    jobs.shutdown_background();
    report.await.unwrap().unwrap();
    // Nobody had cancelled it; but it did not panic by itself either.
    let seen = Seen::cancelled(CancelReason::RuntimeGone, true).with_panic(true);
    assert_eq!(recorder.reports(), [seen]);
}
