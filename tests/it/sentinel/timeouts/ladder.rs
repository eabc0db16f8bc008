//! The ladder: cancel, grace, abort, wait.

use std::{
    future::pending,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::future::join;
use tokio::{
    runtime::{Builder, Handle, Runtime},
    time::{Instant, sleep},
};
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_sentinel::{Report, SentinelLayer, cancelled, outcome::OutcomeKind};

use super::{GRACE, LIMIT, SECOND, STOP_WAIT, layer, run, timed_out};
use crate::support::{
    Blocked, Bomb, Count, Fate, Recorder, Refused, Seen, Unit, Work, Worker, call, current_thread,
    idle, log::Log, turn, wait_until,
};

#[tokio::test(start_paused = true)]
async fn a_job_is_told_then_has_its_grace_then_is_aborted() {
    let recorder = Recorder::default();
    let (called, told, dropped) = (Instant::now(), Moment::default(), Moment::default());
    let job = {
        let (told, dropped) = (told.clone(), dropped.clone());
        move || {
            let (told, dropped) = (told.clone(), dropped.clone());
            async move {
                let _dropped = OnDrop(dropped);
                cancelled().await;
                told.now();
                pending().await
            }
        }
    };
    let report = run(layer(&recorder), job).await;
    assert_eq!(told.since(called), LIMIT);
    assert_eq!(dropped.since(called), LIMIT + GRACE);
    assert_eq!(report.elapsed, LIMIT + GRACE);
    let timed_out = timed_out(report);
    assert_eq!((timed_out.limit(), timed_out.stopped()), (LIMIT, true));
    assert_eq!(recorder.reports().len(), 1);
}

/// Time at which something happened.
#[derive(Clone, Default)]
struct Moment(Arc<Mutex<Option<Instant>>>);

impl Moment {
    fn now(&self) {
        let before = self.0.lock().unwrap().replace(Instant::now());
        assert!(before.is_none(), "it happened before");
    }

    fn since(&self, start: Instant) -> Duration {
        let moment = self.0.lock().unwrap();
        moment.expect("it did not happen") - start
    }
}

struct OnDrop(Moment);

impl Drop for OnDrop {
    fn drop(&mut self) {
        self.0.now();
    }
}

#[tokio::test(start_paused = true)]
async fn a_job_that_returns_within_its_grace_has_completed_or_failed() {
    for (result, seen) in [(Ok(()), Seen::completed()), (Err(Refused), Seen::failed())] {
        let recorder = Recorder::default();
        let report = run(layer(&recorder), move || async move {
            cancelled().await;
            sleep(SECOND).await;
            result
        });
        assert_eq!(report.await.elapsed, LIMIT + SECOND);
        assert_eq!(recorder.reports(), [seen]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_job_that_does_not_listen_may_still_complete_within_its_grace() {
    let recorder = Recorder::default();
    let report = run(layer(&recorder), || async {
        sleep(LIMIT + SECOND).await;
        Ok(())
    });
    assert_eq!(report.await.elapsed, LIMIT + SECOND);
    assert_eq!(recorder.reports(), [Seen::completed()]);
}

#[tokio::test(start_paused = true)]
async fn a_panic_within_the_grace_is_attached() {
    let recorder = Recorder::default();
    let report = run(layer(&recorder), || async {
        cancelled().await;
        sleep(SECOND).await;
        panic!("while tidying up")
    })
    .await;
    assert_eq!(report.elapsed, LIMIT + SECOND);
    let timed_out = timed_out(report);
    assert_eq!(timed_out.panic().unwrap().message(), "while tidying up");
    assert!(timed_out.stopped());
    assert_eq!(recorder.reports(), [Seen::timed_out(true).with_panic(true)]);
}

#[tokio::test(start_paused = true)]
async fn a_panic_in_a_destructor_during_the_stop_is_attached() {
    let recorder = Recorder::default();
    let report = run(layer(&recorder), || async {
        let _bomb = Bomb;
        pending().await
    })
    .await;
    assert_eq!(report.elapsed, LIMIT + GRACE);
    let timed_out = timed_out(report);
    assert_eq!(timed_out.panic().unwrap().message(), "in a destructor");
    assert!(timed_out.stopped());
    assert_eq!(recorder.reports(), [Seen::timed_out(true).with_panic(true)]);
}

/// Returns a runtime with one thread for jobs that block.
fn one_thread() -> Runtime {
    Builder::new_multi_thread()
        .worker_threads(1)
        .build()
        .unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_job_that_does_not_stop_is_waited_for_and_then_reported_as_still_running() {
    let recorder = Recorder::default();
    let thread = Blocked::until_released();
    let jobs = one_thread();
    let mut sentinel = layer(&recorder)
        .runtime(jobs.handle().clone())
        .layer(Worker {
            thread: Arc::clone(&thread),
        });
    let response = sentinel.ready().await.unwrap();
    let response = response.call(Work::new(Fate::BlockFirst));
    assert!(wait_until(|| thread.entered()));
    let report = response.await.unwrap();
    assert_eq!(report.elapsed, LIMIT + GRACE + STOP_WAIT);
    let timed_out = timed_out(report);
    assert_eq!((timed_out.limit(), timed_out.stopped()), (LIMIT, false));
    assert!(timed_out.started());

    // Its end does not matter any more: it has had its outcome.
    thread.release();
    assert!(wait_until(|| jobs.metrics().num_alive_tasks() == 0));
    idle(&Handle::current()).await;
    assert_eq!(recorder.reports(), [Seen::timed_out(false)]);
    jobs.shutdown_background();
}

#[tokio::test(start_paused = true)]
async fn a_job_that_returns_long_after_its_limit_has_completed_and_is_warned_of() {
    for (late, lines) in [(1, 0), (12, 1)] {
        let recorder = Recorder::default();
        let thread = Blocked::until_released();
        let jobs = one_thread();
        let blocked = Arc::clone(&thread);
        let mut sentinel = layer(&recorder)
            .stop_wait(60 * SECOND)
            .runtime(jobs.handle().clone())
            .layer(service_fn(move |_: Unit| {
                let blocked = Arc::clone(&blocked);
                async move {
                    blocked.block();
                    Ok::<_, Refused>(())
                }
            }));
        let (log, guard) = Log::start();
        let response = sentinel.ready().await.unwrap().call(Unit::default());
        let released = Arc::clone(&thread);
        let (response, ()) = join(response, async {
            assert!(wait_until(|| thread.entered()));
            sleep(LIMIT + GRACE + late * SECOND).await;
            released.release();
            // Its end wakes the supervisor, and the clock stands still meanwhile.
            assert!(wait_until(|| jobs.metrics().num_alive_tasks() == 0));
        })
        .await;
        drop(guard);
        assert_eq!(response.unwrap().outcome.kind(), OutcomeKind::Completed);
        let logged = log.lines();
        assert_eq!(logged.len(), lines, "{logged:?}");
        if let Some(line) = logged.first() {
            let late = GRACE + late * SECOND;
            let warning = format!("the job completed {late:?} after its limit: does it block");
            assert!(
                line.starts_with("WARN") && line.contains(&warning),
                "{line}"
            );
        }
        jobs.shutdown_background();
    }
}

#[tokio::test(start_paused = true)]
async fn a_job_that_returns_within_its_grace_is_not_late() {
    let recorder = Recorder::default();
    let (log, _guard) = Log::start();
    let mut sentinel = layer(&recorder)
        .grace(60 * SECOND)
        .layer(service_fn(async |_: Unit| {
            sleep(LIMIT + 59 * SECOND).await;
            Ok::<_, Refused>(())
        }));
    call(&mut sentinel, Unit::default()).await.unwrap();
    assert_eq!(log.lines(), [] as [String; 0]);
}

#[tokio::test(start_paused = true)]
async fn a_job_that_ends_while_it_is_waited_for_is_reported_at_once() {
    let recorder = Recorder::default();
    let jobs = current_thread();
    let mut sentinel = layer(&recorder)
        .runtime(jobs.handle().clone())
        .layer(service_fn(|_: Unit| pending::<Result<(), Refused>>()));
    let response = sentinel.ready().await.unwrap().call(Unit::default());
    let response = tokio::spawn(response);
    sleep(LIMIT + GRACE + SECOND).await;
    turn(&jobs);
    let report = response.await.unwrap().unwrap();
    assert_eq!(report.elapsed, LIMIT + GRACE + SECOND);
    assert!(timed_out(report).stopped());
    jobs.shutdown_background();
}

#[tokio::test(start_paused = true)]
async fn the_jobs_future_is_gone_before_the_policy_is_called() {
    let drops = Count::default();
    let guarded = drops.clone();
    let policy = service_fn(move |report: Report<Unit, (), Refused>| {
        let drops = drops.get();
        async move { Ok::<_, Refused>((report.outcome.kind(), drops)) }
    });
    let mut sentinel = SentinelLayer::new(policy).layer(service_fn(move |_: Unit| {
        let guard = guarded.guard();
        async move {
            let _guard = guard;
            pending::<Result<(), Refused>>().await
        }
    }));
    let answer = call(&mut sentinel, Unit::default()).await.unwrap();
    assert_eq!(answer, (OutcomeKind::TimedOut, 1));
}
