//! Jobs that are told to stop: by themselves, their tasks, a token or the end of their runtime.

use std::{
    convert::Infallible,
    future::{Future, pending, poll_fn},
    panic::catch_unwind,
    pin::pin,
    sync::{Arc, Mutex},
    task::{Context, Poll, Wake, Waker},
    thread,
    time::Duration,
};

use futures_util::{future::join_all, poll};
use tokio::{
    runtime::{Builder, Handle},
    sync::oneshot,
    task::yield_now,
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_sentinel::{
    Outcome, Report, SentinelLayer,
    cancel::Cancellation,
    cancelled,
    outcome::{CancelReason, OutcomeKind},
};

use crate::support::{
    Blocked, Bomb, Fate, Recorder, Refused, Script, Seen, Unit, WORK, Work, Worker, call,
    current_thread, exhaust_budget, idle, raise, turn, until,
};

const SECOND: Duration = Duration::from_secs(1);
const LIMIT: Duration = Duration::from_secs(10);

fn layer(recorder: &Recorder) -> SentinelLayer<Script> {
    SentinelLayer::new(recorder.policy()).timeout(LIMIT)
}

/// Runs a job under `layer`.
async fn run<F>(
    layer: SentinelLayer<Script>,
    job: impl Fn() -> F + Clone + Send + 'static,
) -> Report<Unit, (), Refused>
where
    F: Future<Output = Result<(), Refused>> + Send + 'static,
{
    let mut sentinel = layer.layer(service_fn(move |_: Unit| job()));
    call(&mut sentinel, Unit::default()).await.unwrap()
}

// === inside and outside ===

#[tokio::test(start_paused = true)]
async fn outside_a_job_the_handle_is_inert() {
    let handle = Cancellation::current();
    handle.cancel(CancelReason::Requested);
    assert!(!handle.is_cancelled());
    let year = 365 * 24 * 3600 * SECOND;
    assert!(timeout(year, handle.cancelled()).await.is_err());
    assert!(timeout(year, cancelled()).await.is_err());
}

#[test]
fn outside_a_runtime_the_handle_is_inert() {
    let handle = Cancellation::current();
    handle.cancel(CancelReason::Requested);
    assert!(!handle.is_cancelled());
}

#[tokio::test(start_paused = true)]
async fn a_job_is_told_when_its_limit_passes_and_not_before() {
    let recorder = Recorder::default();
    let report = run(layer(&recorder).grace(SECOND), || async {
        let handle = Cancellation::current();
        sleep(LIMIT - Duration::from_millis(1)).await;
        assert!(!handle.is_cancelled());
        handle.cancelled().await;
        assert!(handle.is_cancelled());
        // Once told, each later call resolves at once.
        assert!(poll!(pin!(cancelled())).is_ready());
        assert!(poll!(pin!(handle.clone().cancelled())).is_ready());
        Ok(())
    });
    assert_eq!(report.await.elapsed, LIMIT);
    assert_eq!(recorder.reports(), [Seen::completed()]);
}

#[tokio::test(start_paused = true)]
async fn a_job_that_returns_leaves_its_handles_pending() {
    let recorder = Recorder::default();
    let handle = Arc::new(Mutex::new(None));
    let kept = Arc::clone(&handle);
    let report = run(layer(&recorder), move || {
        *kept.lock().unwrap() = Some(Cancellation::current());
        async { Ok(()) }
    });
    assert!(report.await.outcome.is_completed());
    let handle = handle.lock().unwrap().take().unwrap();
    // Too late to do anything.
    handle.cancel(CancelReason::LeaseLost);
    assert!(timeout(2 * LIMIT, handle.cancelled()).await.is_err());
    assert_eq!(recorder.reports(), [Seen::completed()]);
}

#[tokio::test(start_paused = true)]
async fn the_handle_is_known_in_call_in_the_future_and_in_its_destructor() {
    /// Cancels the job that it is dropped in, to no effect but to be seen.
    struct InDrop(Cancellation);

    impl Drop for InDrop {
        fn drop(&mut self) {
            assert!(self.0.is_cancelled());
            assert!(Cancellation::current().is_cancelled());
        }
    }

    let recorder = Recorder::default();
    let mut sentinel = layer(&recorder).layer(service_fn(|_: Unit| {
        let in_call = Cancellation::current();
        async move {
            let _in_drop = InDrop(Cancellation::current());
            sleep(SECOND).await;
            in_call.cancel(CancelReason::LeaseLost);
            pending::<Result<(), Refused>>().await
        }
    }));
    let report = call(&mut sentinel, Unit::default()).await.unwrap();
    assert_eq!(report.elapsed, SECOND);
    // No panic: the destructor saw what it should.
    let seen = Seen::cancelled(CancelReason::LeaseLost, true);
    assert_eq!(recorder.reports(), [seen]);
}

#[tokio::test(start_paused = true)]
async fn a_child_task_does_not_inherit_the_handle_but_can_be_given_it() {
    let recorder = Recorder::default();
    let report = run(layer(&recorder).grace(SECOND), || async {
        let told = cancelled();
        let handle = Cancellation::current();
        let child = tokio::spawn(async move {
            let own = Cancellation::current();
            told.await;
            assert!(handle.is_cancelled());
            assert!(!own.is_cancelled());
        });
        child.await.unwrap();
        Ok(())
    });
    assert_eq!(report.await.elapsed, LIMIT);
    assert_eq!(recorder.reports(), [Seen::completed()]);
}

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
    // Nobody had told it to stop; but it did not panic of its own accord either.
    let seen = Seen::cancelled(CancelReason::RuntimeGone, true).with_panic(true);
    assert_eq!(recorder.reports(), [seen]);
}

// === what came first, though nobody had looked ===

/// Hands out the handle of a job, which then ends as `fate` says.
fn handing_out(
    fate: Fate,
) -> (
    Arc<Mutex<Option<Cancellation>>>,
    impl Service<Unit, Response = (), Error = Refused, Future: Send> + Clone + Send,
) {
    let slot = Arc::<Mutex<Option<Cancellation>>>::default();
    let handed = Arc::clone(&slot);
    let service = service_fn(move |_: Unit| {
        *handed.lock().unwrap() = Some(Cancellation::current());
        async move {
            match fate {
                Fate::PanicFirst => raise("before the request"),
                _ => pending().await,
            }
        }
    });
    (slot, service)
}

async fn settle_down() {
    for _ in 0..8 {
        yield_now().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_that_comes_after_a_panic_does_not_excuse_it() {
    let recorder = Recorder::default();
    let (handle, service) = handing_out(Fate::PanicFirst);
    let mut sentinel = layer(&recorder).layer(service);
    let response = sentinel.ready().await.unwrap().call(Unit::default());
    settle_down().await;
    // The job has ended, so it is not affected.
    let handle = handle.lock().unwrap().take().unwrap();
    handle.cancel(CancelReason::Requested);
    response.await.unwrap();
    assert_eq!(recorder.reports(), [Seen::panicked()]);
}

#[tokio::test(start_paused = true)]
async fn a_request_that_comes_after_the_limit_is_not_the_cause() {
    let recorder = Recorder::default();
    let (handle, service) = handing_out(Fate::Hang);
    let mut sentinel = layer(&recorder).layer(service);
    let response = sentinel.ready().await.unwrap().call(Unit::default());
    sleep(LIMIT + SECOND).await;
    let handle = handle.lock().unwrap().take().unwrap();
    handle.cancel(CancelReason::Requested);
    response.await.unwrap();
    assert_eq!(recorder.reports(), [Seen::timed_out(true)]);
}

/// What may stop a job besides its limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cause {
    Shutdown,
    LeaseLost,
}

/// Runs a job that is stopped at these times, by this thread or another one, and that nobody looks at
/// before it is polled or dropped thereafter.
async fn look_late(causes: [Option<(Cause, u32)>; 2], elsewhere: bool, polls: bool) -> Seen {
    let recorder = Recorder::default();
    let token = CancellationToken::new();
    let (handle, service) = handing_out(Fate::Hang);
    let mut sentinel = layer(&recorder).shutdown(token.clone()).layer(service);
    let response = sentinel.ready().await.unwrap().call(Unit::default());
    let start = Instant::now();
    settle_down().await;
    for (cause, time) in causes.into_iter().flatten() {
        sleep_until(start + time * SECOND).await;
        let (token, handle) = (token.clone(), Arc::clone(&handle));
        let stop = move || match cause {
            Cause::Shutdown => token.cancel(),
            Cause::LeaseLost => {
                let handle = handle.lock().unwrap().take().unwrap();
                handle.cancel(CancelReason::LeaseLost);
            }
        };
        match elsewhere {
            true => thread::spawn(stop).join().unwrap(),
            false => stop(),
        }
    }
    sleep_until(start + LIMIT + 5 * SECOND).await;
    match polls {
        true => drop(response.await),
        false => drop(response),
    }
    idle(&Handle::current()).await;
    let [seen] = recorder.reports()[..] else {
        panic!("one report");
    };
    seen
}

#[tokio::test(start_paused = true)]
async fn the_first_cause_wins_by_its_time_and_not_by_the_poll_that_sees_it() {
    let shutdown = Seen::cancelled(CancelReason::Shutdown, true);
    let lease_lost = Seen::cancelled(CancelReason::LeaseLost, true);
    let timed_out = Seen::timed_out(true);
    // The limit passes at 10 s.
    for (causes, seen) in [
        ([Some((Cause::Shutdown, 5)), None], shutdown),
        ([Some((Cause::Shutdown, 11)), None], timed_out),
        ([Some((Cause::LeaseLost, 5)), None], lease_lost),
        ([Some((Cause::LeaseLost, 11)), None], timed_out),
        (
            [Some((Cause::Shutdown, 5)), Some((Cause::LeaseLost, 6))],
            shutdown,
        ),
        (
            [Some((Cause::LeaseLost, 5)), Some((Cause::Shutdown, 6))],
            lease_lost,
        ),
        (
            [Some((Cause::Shutdown, 5)), Some((Cause::LeaseLost, 11))],
            shutdown,
        ),
        (
            [Some((Cause::LeaseLost, 5)), Some((Cause::Shutdown, 11))],
            lease_lost,
        ),
        (
            [Some((Cause::Shutdown, 11)), Some((Cause::LeaseLost, 12))],
            timed_out,
        ),
    ] {
        for elsewhere in [false, true] {
            for polls in [true, false] {
                let case = format!("{causes:?}, {elsewhere}, {polls}");
                assert_eq!(look_late(causes, elsewhere, polls).await, seen, "{case}");
            }
        }
    }
}

/// Returns the time by the clock of the wall.
fn wall() -> Instant {
    thread::spawn(Instant::now).join().unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_request_by_a_clock_that_is_ahead_comes_before_a_limit_that_has_not_passed() {
    let recorder = Recorder::default();
    let jobs = Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let limit = Duration::from_millis(1);
    let (requested, is_requested) = std::sync::mpsc::channel();
    let service = service_fn(move |_: Unit| {
        let start = Instant::now();
        while start.elapsed() <= 2 * limit {}
        Cancellation::current().cancel(CancelReason::Requested);
        requested.send(()).unwrap();
        pending::<Result<(), Refused>>()
    });
    let mut sentinel = layer(&recorder)
        .timeout(limit)
        .runtime(jobs.handle().clone())
        .layer(service);
    let response = sentinel.ready().await.unwrap().call(Unit::default());
    is_requested.recv().unwrap();
    response.await.unwrap();
    let seen = recorder.reports()[0];
    assert_eq!(seen.reason, Some(CancelReason::Requested), "{seen:?}");
    jobs.shutdown_background();
}

#[tokio::test(start_paused = true)]
async fn a_request_from_a_plain_thread_is_timed_by_the_clock_of_its_job() {
    let recorder = Recorder::default();
    let (handle, service) = handing_out(Fate::Hang);
    let limit = Duration::from_millis(1);
    let mut sentinel = layer(&recorder).timeout(limit).layer(service);
    let response = sentinel.ready().await.unwrap().call(Unit::default());
    settle_down().await;
    // The clock of the wall goes beyond the limit, while that of the runtime stands still.
    let start = wall();
    while wall() - start <= 2 * limit {}
    let handle = handle.lock().unwrap().take().unwrap();
    let cancelling = thread::spawn(move || handle.cancel(CancelReason::LeaseLost));
    cancelling.join().unwrap();
    response.await.unwrap();
    let seen = Seen::cancelled(CancelReason::LeaseLost, true);
    assert_eq!(recorder.reports(), [seen]);
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_that_comes_after_a_panic_does_not_excuse_it_in_a_busy_task() {
    let recorder = Recorder::default();
    let token = CancellationToken::new();
    let mut sentinel = layer(&recorder)
        .shutdown(token.clone())
        .layer(Worker::default());
    let service = sentinel.ready().await.unwrap();
    let mut response = pin!(service.call(Work::new(Fate::PanicFirst)));
    settle_down().await;
    token.cancel();
    // A task out of budget is told by tokio that the job has not ended, although it has.
    poll_fn(|cx| {
        exhaust_budget(cx);
        assert!(response.as_mut().poll(cx).is_pending());
        Poll::Ready(())
    })
    .await;
    response.await.unwrap();
    assert_eq!(recorder.reports(), [Seen::panicked()]);
}

#[tokio::test(start_paused = true)]
async fn a_guard_that_cancels_when_it_is_dropped_does_not_excuse_the_panic_that_drops_it() {
    struct CancelsOnDrop(Cancellation);

    impl Drop for CancelsOnDrop {
        fn drop(&mut self) {
            self.0.cancel(CancelReason::Requested);
        }
    }

    let recorder = Recorder::default();
    for in_poll in [true, false] {
        let service = service_fn(move |_: Unit| {
            // For the child tasks of a job, as the `DropGuard` of tokio-util is used.
            let guard = CancelsOnDrop(Cancellation::current());
            let mut guard = Some(guard);
            poll_fn(move |_| {
                // Dropped as the panic unwinds, or with the future thereafter.
                let _guard = in_poll.then(|| guard.take());
                raise("with a guard")
            })
        });
        let service = service.map_future(|it: std::future::PollFn<_>| async move {
            let it: Result<(), Refused> = it.await;
            it
        });
        let mut sentinel = layer(&recorder).layer(service);
        call(&mut sentinel, Unit::default()).await.unwrap();
    }
    assert_eq!(recorder.reports(), [Seen::panicked(); 2]);
}

#[tokio::test(start_paused = true)]
async fn a_panic_that_the_job_caught_does_not_make_the_next_one_the_cause() {
    struct LosesLease;

    impl Drop for LosesLease {
        fn drop(&mut self) {
            Cancellation::current().cancel(CancelReason::LeaseLost);
        }
    }

    for grace in [Duration::ZERO, SECOND] {
        let recorder = Recorder::default();
        let service = service_fn(async |_: Unit| {
            let caught = catch_unwind(|| {
                let _guard = LosesLease;
                raise("and is caught")
            });
            assert!(caught.is_err());
            // Panics in its grace, or in a destructor as it is aborted.
            let _bomb = Bomb;
            yield_now().await;
            cancelled().await;
            yield_now().await;
            Ok::<_, Refused>(())
        });
        let mut sentinel = layer(&recorder).grace(grace).layer(service);
        call(&mut sentinel, Unit::default()).await.unwrap();
        let seen = Seen::cancelled(CancelReason::LeaseLost, true).with_panic(true);
        assert_eq!(recorder.reports(), [seen], "{grace:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_handle_that_outlives_its_job_does_not_keep_the_waker_of_its_caller() {
    struct Silent;

    impl Wake for Silent {
        fn wake(self: Arc<Self>) {}
    }

    let recorder = Recorder::default();
    let (handle, service) = handing_out(Fate::Hang);
    let mut sentinel = layer(&recorder).layer(service);
    let service = sentinel.ready().await.unwrap();
    let mut response = Box::pin(service.call(Unit::default()));
    let silent = Arc::new(Silent);
    let waker = Waker::from(Arc::clone(&silent));
    let mut context = Context::from_waker(&waker);
    assert!(response.as_mut().poll(&mut context).is_pending());
    settle_down().await;
    handle
        .lock()
        .unwrap()
        .as_ref()
        .unwrap()
        .cancel(CancelReason::Requested);
    while response.as_mut().poll(&mut context).is_pending() {
        yield_now().await;
    }
    drop((response, waker));
    assert_eq!(recorder.reports().len(), 1);
    assert_eq!(Arc::strong_count(&silent), 1);
    drop(handle);
}

#[tokio::test(start_paused = true)]
async fn a_job_is_told_of_its_limit_though_the_task_of_its_caller_is_busy() {
    let recorder = Recorder::default();
    let (handle, service) = handing_out(Fate::Hang);
    let mut sentinel = layer(&recorder).grace(SECOND).layer(service);
    let service = sentinel.ready().await.unwrap();
    let mut response = pin!(service.call(Unit::default()));
    assert!(poll!(&mut response).is_pending());
    sleep(LIMIT + SECOND).await;
    // What is polled before the response uses up the budget of the task each time.
    poll_fn(|cx| {
        exhaust_budget(cx);
        assert!(response.as_mut().poll(cx).is_pending());
        Poll::Ready(())
    })
    .await;
    assert!(handle.lock().unwrap().as_ref().unwrap().is_cancelled());
}
