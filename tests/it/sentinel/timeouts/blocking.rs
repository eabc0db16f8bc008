//! Jobs that block their thread.

use std::{
    future::pending,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::runtime::{Builder, Handle};
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_sentinel::SentinelLayer;

use super::timed_out;
use crate::support::{
    Blocked, Fate, Recorder, Refused, Seen, Unit, Work, Worker, call, idle, until,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_limit_is_punctual_for_a_blocking_job_on_a_runtime_of_its_own() {
    let recorder = Recorder::default();
    let thread = Blocked::until_released();
    let jobs = Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    // On a busy machine a job may take this long to begin; a limit that comes before finds it gone.
    let (limit, stop_wait) = (Duration::from_millis(500), Duration::from_millis(20));
    let mut sentinel = SentinelLayer::new(recorder.policy())
        .timeout(limit)
        .stop_wait(stop_wait)
        .runtime(jobs.handle().clone())
        .layer(Worker {
            thread: Arc::clone(&thread),
        });
    let response = sentinel.ready().await.unwrap();
    let response = response.call(Work::new(Fate::BlockLater));
    until(|| thread.entered()).await;

    // The thread is blocked until we let it go, so to get here at all is to be punctual.
    let report = response.await.unwrap();
    assert!(report.elapsed >= limit + stop_wait);
    let timed_out = timed_out(report);
    assert_eq!((timed_out.limit(), timed_out.stopped()), (limit, false));

    // It returns a value then, which nobody needs any more.
    let watch = usize::from(cfg!(feature = "metrics"));
    assert_eq!(jobs.metrics().num_alive_tasks(), 1 + watch);
    thread.release();
    idle(jobs.handle()).await;
    idle(&Handle::current()).await;
    assert_eq!(recorder.reports(), [Seen::timed_out(false)]);
    jobs.shutdown_background();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_blocking_job_on_the_runtime_of_its_caller_has_one_outcome_when_it_comes_back() {
    let recorder = Recorder::default();
    let is_back = Arc::new(AtomicBool::new(false));
    let back = Arc::clone(&is_back);
    let mut sentinel = SentinelLayer::new(recorder.policy())
        .timeout(Duration::from_millis(50))
        .stop_wait(Duration::MAX)
        .layer(service_fn(move |_: Unit| {
            let back = Arc::clone(&back);
            async move {
                // Perhaps the very thread that drives the timers.
                std::thread::sleep(Duration::from_millis(300));
                back.store(true, Ordering::SeqCst);
                pending::<Result<(), Refused>>().await
            }
        }));
    loop {
        let report = call(&mut sentinel, Unit::default()).await.unwrap();
        let timed_out = timed_out(report);
        assert!(timed_out.stopped());
        // A busy machine may come to the job too late.
        if timed_out.started() {
            break;
        }
    }
    // An abort acts at an await, so not before the thread is back.
    assert!(is_back.load(Ordering::SeqCst));
    idle(&Handle::current()).await;
    let reports = recorder.reports();
    assert!(reports.iter().all(|seen| *seen == Seen::timed_out(true)));
}
