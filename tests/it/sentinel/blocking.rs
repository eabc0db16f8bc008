//! Work of a job that blocks a thread.

use std::{
    future::pending,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use futures_util::FutureExt;
use tokio::{
    runtime::{Builder, Runtime},
    task,
};
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_sentinel::{SentinelLayer, cancel::Cancellation, outcome::CancelReason, spawn_blocking};

use crate::support::{
    Blocked, Bomb, Count, Recorder, Refused, Seen, Unit, call, raise, wait_until,
};

const LIMIT: Duration = Duration::from_secs(10);
const STOP_WAIT: Duration = Duration::from_secs(5);

/// A runtime for jobs, so that the callers' time can be paused beside it; `blocking` threads for work.
fn jobs(blocking: usize) -> Runtime {
    let mut jobs = Builder::new_multi_thread();
    let jobs = jobs.worker_threads(1).max_blocking_threads(blocking);
    jobs.enable_all().build().unwrap()
}

/// Waits, on its own thread, until `job` is cancelled.
fn until_told(job: &Cancellation) {
    while !job.is_cancelled() {
        thread::sleep(Duration::from_millis(1));
    }
}

#[tokio::test]
async fn what_the_work_returns_or_panics_with_is_the_jobs() {
    for (panics, seen) in [(false, Seen::completed()), (true, Seen::panicked())] {
        let recorder = Recorder::default();
        let mut sentinel =
            SentinelLayer::new(recorder.policy()).layer(service_fn(move |_: Unit| async move {
                let work = spawn_blocking(move |_| match panics {
                    true => raise("in the work"),
                    false => 7,
                });
                assert_eq!(work.await, 7);
                Ok::<_, Refused>(())
            }));
        call(&mut sentinel, Unit::default()).await.unwrap();
        assert_eq!(recorder.reports(), [seen]);
    }
}

#[tokio::test]
async fn work_that_is_told_to_stop_is_waited_for() {
    let recorder = Recorder::default();
    let ended = Arc::new(AtomicBool::new(false));
    let ending = Arc::clone(&ended);
    let mut sentinel = SentinelLayer::new(recorder.policy())
        .no_timeout()
        .stop_wait(Duration::MAX)
        .layer(service_fn(move |_: Unit| {
            let ended = Arc::clone(&ending);
            async move {
                let work = spawn_blocking(move |job| {
                    // Now it runs, however late the machine came to it.
                    job.cancel(CancelReason::Requested);
                    until_told(&job);
                    // The same, for functions that are called in here.
                    assert!(Cancellation::current().is_cancelled());
                    thread::sleep(Duration::from_millis(5));
                    ended.store(true, Ordering::SeqCst);
                });
                work.await;
                pending::<Result<(), Refused>>().await
            }
        }));
    call(&mut sentinel, Unit::default()).await.unwrap();
    assert!(
        ended.load(Ordering::SeqCst),
        "it is gone before the policy is called"
    );
    let seen = Seen::cancelled(CancelReason::Requested, true);
    assert_eq!(recorder.reports(), [seen]);
}

/// Panics when it is dropped, with a payload that does.
struct Raises;

impl Drop for Raises {
    fn drop(&mut self) {
        struct BombInBomb;
        impl Drop for BombInBomb {
            fn drop(&mut self) {
                drop(Bomb);
            }
        }
        std::panic::resume_unwind(Box::new(BombInBomb));
    }
}

#[tokio::test(start_paused = true)]
async fn work_that_goes_on_is_not_stopped_and_counts_as_abandoned() {
    for returns in [false, true] {
        let recorder = Recorder::default();
        let jobs = jobs(1);
        let thread = Blocked::until_released();
        let blocked = Arc::clone(&thread);
        let layer = SentinelLayer::new(recorder.policy());
        let layer = match returns {
            true => layer.no_timeout(),
            false => layer.timeout(LIMIT),
        };
        let mut sentinel = layer
            .stop_wait(STOP_WAIT)
            .max_abandoned(1)
            .runtime(jobs.handle().clone())
            .layer(service_fn(move |_: Unit| {
                let blocked = Arc::clone(&blocked);
                async move {
                    let working = Arc::clone(&blocked);
                    let work = spawn_blocking(move |_| {
                        working.block();
                        Raises
                    });
                    if returns {
                        while !blocked.entered() {
                            task::yield_now().await;
                        }
                        return Ok::<_, Refused>(());
                    }
                    work.await;
                    Ok(())
                }
            }));
        let response = sentinel.ready().await.unwrap().call(Unit::default());
        assert!(wait_until(|| thread.entered()));
        let report = response.await.unwrap();
        match returns {
            true => assert_eq!(recorder.reports(), [Seen::completed()]),
            false => {
                assert_eq!(report.elapsed, LIMIT + STOP_WAIT);
                assert_eq!(recorder.reports(), [Seen::timed_out(false)]);
            }
        }
        assert!(sentinel.ready().now_or_never().is_none());
        thread.release();
        sentinel.ready().await.unwrap();
        // The only thread has survived the result that nobody waits for.
        let next = jobs.spawn_blocking(|| ());
        assert!(wait_until(|| next.is_finished()));
        jobs.shutdown_background();
    }
}

#[tokio::test(start_paused = true)]
async fn work_that_has_not_begun_never_does() {
    let recorder = Recorder::default();
    let jobs = jobs(1);
    let thread = Blocked::until_released();
    let blocked = Arc::clone(&thread);
    jobs.spawn_blocking(move || blocked.block());
    assert!(wait_until(|| thread.entered()));
    let (begun, waits) = (Count::default(), Arc::new(AtomicBool::new(false)));
    let (begins, waiting) = (begun.clone(), Arc::clone(&waits));
    let mut sentinel = SentinelLayer::new(recorder.policy())
        .timeout(LIMIT)
        .stop_wait(Duration::MAX)
        .runtime(jobs.handle().clone())
        .layer(service_fn(move |_: Unit| {
            let begins = begins.clone();
            // Dropped on the way to the outcome, in which its panic has no place.
            let bomb = Bomb;
            let work = spawn_blocking(move |_| {
                let _bomb = bomb;
                begins.add();
            });
            waiting.store(true, Ordering::SeqCst);
            async move {
                work.await;
                Ok::<_, Refused>(())
            }
        }));
    let response = sentinel.ready().await.unwrap().call(Unit::default());
    assert!(wait_until(|| waits.load(Ordering::SeqCst)));
    // It would be waited for without an end.
    response.await.unwrap();
    assert_eq!(recorder.reports(), [Seen::timed_out(true)]);
    thread.release();
    let last = jobs.spawn_blocking(|| ());
    assert!(wait_until(|| last.is_finished()));
    assert_eq!(begun.get(), 0);
    jobs.shutdown_background();
}

#[tokio::test]
async fn outside_of_a_job_nothing_stops_the_work() {
    let is_cancelled = spawn_blocking(|job| job.is_cancelled()).await;
    assert!(!is_cancelled);
}
