//! Jobs that run on after all steps that stop a job.

use std::{
    convert::Infallible,
    future::{Future, pending},
    sync::{Arc, Mutex, mpsc},
    time::Duration,
};

use tokio::{runtime::Builder, time::Instant};
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_sentinel::{
    Outcome, Report, SentinelLayer, cancelled, sentinel::RunningJob, spawn_blocking,
};

use crate::support::log::Log;

type Stuck = Arc<Mutex<Vec<RunningJob>>>;

const MILLIS: fn(u64) -> Duration = Duration::from_millis;

/// Runs `job` under a limit on two threads, and returns whether its report says that it stopped, and the stuck ones.
///
/// The callback notes the job, and panics.
fn run<F>(job: impl FnOnce() -> F + Send + 'static) -> (bool, Vec<RunningJob>)
where
    F: Future<Output = ()> + Send + 'static,
{
    let runtime = Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let stuck = Stuck::default();
    let (noted, job) = (Arc::clone(&stuck), Arc::new(Mutex::new(Some(job))));
    let policy = service_fn(|report: Report<u64, (), Infallible>| async move {
        Ok::<_, Infallible>(match report.outcome {
            Outcome::TimedOut(timed_out) => timed_out.stopped(),
            outcome => panic!("{outcome:?}"),
        })
    });
    let sentinel = SentinelLayer::with_tag(policy, |job: &u64| *job)
        // A job that never starts is no stuck one.
        .timeout(MILLIS(300))
        .stop_wait(MILLIS(20))
        .on_stuck(move |job| {
            noted.lock().unwrap().push(job.clone());
            panic!("a callback that fails");
        });
    let mut sentinel = sentinel.layer(service_fn(move |_: u64| {
        let job = Arc::clone(&job);
        async move {
            let job = job.lock().unwrap().take().unwrap();
            job().await;
            Ok::<_, Infallible>(())
        }
    }));
    // On this thread, which no job blocks.
    let stopped = runtime.block_on(async {
        let response = sentinel.ready().await.unwrap().call(7);
        response.await.unwrap()
    });
    runtime.shutdown_background();
    let stuck = stuck.lock().unwrap().clone();
    (stopped, stuck)
}

#[test]
fn a_job_that_blocks_its_thread_is_stuck() {
    let (log, _guard) = Log::start();
    let (release, released) = mpsc::channel::<()>();
    let begun = Instant::now();
    let (stopped, stuck) = run(move || async move {
        released.recv().unwrap_or_default();
    });
    assert!(!stopped);
    assert_eq!(stuck.len(), 1);
    let job = &stuck[0];
    assert_eq!(
        (&*job.tag, job.is_told_to_stop, job.is_blocking),
        ("7", true, false)
    );
    assert_eq!(job.time_left, Some(Duration::ZERO));
    assert!(job.since >= begun && job.since <= Instant::now());
    let lines = log.lines();
    let lines: Vec<_> = lines
        .iter()
        .filter(|line| line.contains("job stuck"))
        .collect();
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].starts_with("ERROR"), "{lines:?}");
    assert!(
        lines[0].contains(&format!("task.id={}", job.id)),
        "{lines:?}"
    );
    drop(release);
}

#[test]
fn a_closure_that_blocks_a_thread_is_told_apart() {
    let (release, released) = mpsc::channel::<()>();
    let (stopped, stuck) = run(move || async move {
        spawn_blocking(move |_| released.recv().unwrap_or_default()).await;
    });
    assert!(!stopped);
    assert_eq!(stuck.len(), 1);
    assert!(stuck[0].is_blocking && stuck[0].is_told_to_stop);
    drop(release);
}

#[test]
fn a_job_that_stops_is_not_stuck() {
    let (stopped, stuck) = run(|| async {
        cancelled().await;
        pending::<()>().await;
    });
    assert!(stopped);
    assert!(stuck.is_empty(), "{stuck:?}");
}
