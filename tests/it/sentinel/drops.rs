//! Callers that drop the response future: where, when, and what becomes of the job.

use std::{
    fmt::Debug,
    future::{Future, pending, poll_fn},
    pin::Pin,
    sync::{Arc, Mutex},
    task::Poll,
    thread,
    time::Duration,
};

use futures_util::poll;
use tokio::{
    runtime::{Builder, Handle},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_sentinel::{
    Outcome, Report, SentinelLayer,
    cancel::Cancellation,
    cancelled,
    outcome::{CancelReason, OutcomeKind},
    sentinel::OnDrop,
};

use crate::support::{
    Answer, Count, Fate, Plan, Recorder, Refused, Script, Seen, Unit, WORK, Work, Worker, call,
    current_thread, idle, raise, until, wait_until,
};

const SECOND: Duration = Duration::from_secs(1);
const LIMIT: Duration = Duration::from_secs(10);

const BOTH: [OnDrop; 2] = [OnDrop::Abort, OnDrop::Detach];

fn layer(recorder: &Recorder) -> SentinelLayer<Script> {
    SentinelLayer::new(recorder.policy()).timeout(LIMIT)
}

fn caller_dropped() -> Seen {
    Seen::cancelled(CancelReason::CallerDropped, true)
}

/// Calls `sentinel`, polls the response once and lets `time` pass without a look at it.
async fn call_and_look_away<S, J>(sentinel: &mut S, job: J, time: Duration) -> Pin<Box<S::Future>>
where
    S: Service<J, Error: Debug>,
{
    let mut response = Box::pin(sentinel.ready().await.unwrap().call(job));
    assert!(poll!(&mut response).is_pending());
    sleep(time).await;
    response
}

// === when ===

/// How often the job of the next two tests awaits.
const AWAITS: usize = 4;

/// Drops the caller while the job is at its await number `at`; returns how many it got past.
async fn drop_at_await(recorder: &Recorder, on_drop: OnDrop, at: usize) -> (usize, usize) {
    let (passed, guards) = (Count::default(), Count::default());
    let (passing, guarding) = (passed.clone(), guards.clone());
    let service = service_fn(move |_: Unit| {
        let (passed, guard) = (passing.clone(), guarding.guard());
        async move {
            let _guard = guard;
            for _ in 0..AWAITS {
                sleep(SECOND).await;
                passed.add();
            }
            Ok::<_, Refused>(())
        }
    });
    let mut sentinel = layer(recorder).on_drop(on_drop).layer(service);
    let time = SECOND * u32::try_from(at).unwrap() + SECOND / 2;
    let response = call(&mut sentinel, Unit::default());
    assert!(timeout(time, response).await.is_err());
    idle(&Handle::current()).await;
    (passed.get(), guards.get())
}

#[tokio::test(start_paused = true)]
async fn g1_a_drop_aborts_the_job_at_whichever_await_it_is() {
    for at in 0..AWAITS {
        let recorder = Recorder::default();
        let went = drop_at_await(&recorder, OnDrop::Abort, at).await;
        assert_eq!(went, (at, 1), "awaits passed, futures dropped");
        assert_eq!(recorder.reports(), [caller_dropped()], "at await {at}");
    }
}

#[tokio::test(start_paused = true)]
async fn g1_a_detached_job_goes_on_from_whichever_await_it_is_at() {
    for at in 0..AWAITS {
        let recorder = Recorder::default();
        let went = drop_at_await(&recorder, OnDrop::Detach, at).await;
        assert_eq!(went, (AWAITS, 1), "awaits passed, futures dropped");
        assert_eq!(recorder.reports(), [Seen::completed()], "at await {at}");
    }
}

#[tokio::test(start_paused = true)]
async fn g1_a_drop_after_any_number_of_polls_leaves_one_outcome() {
    for on_drop in BOTH {
        for polls in 0.. {
            let recorder = Recorder::default();
            let policy = recorder.scripted(Plan::SlowReadiness, SECOND);
            let mut sentinel = SentinelLayer::new(policy)
                .on_drop(on_drop)
                .layer(Worker::default());
            let response = sentinel.ready().await.unwrap();
            let mut response = Box::pin(response.call(Work::new(Fate::Value)));
            let mut left = polls;
            let resolved = poll_fn(|cx| {
                if left == 0 {
                    return Poll::Ready(false);
                }
                left -= 1;
                let resolved = response.as_mut().poll(cx).is_ready();
                if resolved || left == 0 {
                    return Poll::Ready(resolved);
                }
                Poll::Pending
            });
            let resolved = resolved.await;
            drop(response);
            idle(&Handle::current()).await;

            let reports = recorder.reports();
            let ran_on = on_drop == OnDrop::Detach || recorder.reports() == [Seen::completed()];
            if ran_on {
                assert_eq!(
                    reports,
                    [Seen::completed()],
                    "{on_drop:?} after {polls} polls"
                );
            } else {
                assert_eq!(
                    reports,
                    [caller_dropped()],
                    "{on_drop:?} after {polls} polls"
                );
            }
            if resolved {
                // The job's end, the policy's readiness and its answer were each polled for.
                assert!(polls >= 4, "{polls}");
                break;
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn g1_a_drop_before_the_first_poll_keeps_an_aborted_job_from_starting() {
    let (recorder, calls) = (Recorder::default(), Count::default());
    let called = calls.clone();
    let mut sentinel = layer(&recorder).layer(service_fn(move |_: Unit| {
        called.add();
        async { Ok::<_, Refused>(()) }
    }));
    drop(sentinel.ready().await.unwrap().call(Unit::default()));
    idle(&Handle::current()).await;
    assert_eq!(calls.get(), 0);
    assert_eq!(recorder.reports(), [caller_dropped()]);
}

#[tokio::test(start_paused = true)]
async fn a_drop_after_the_end_changes_nothing() {
    let recorder = Recorder::default();
    let mut sentinel = layer(&recorder).layer(Worker::default());
    let response = sentinel.ready().await.unwrap();
    let mut response = Box::pin(response.call(Work::new(Fate::Value)));
    response.as_mut().await.unwrap();
    drop(response);
    assert_eq!(Handle::current().metrics().num_alive_tasks(), 0);
    assert_eq!(recorder.reports(), [Seen::completed()]);
}

#[tokio::test(start_paused = true)]
async fn a_detached_job_is_still_under_its_limit() {
    let recorder = Recorder::default();
    let mut sentinel = layer(&recorder)
        .on_drop(OnDrop::Detach)
        .layer(Worker::default());
    drop(sentinel.ready().await.unwrap().call(Work::new(Fate::Hang)));
    sleep(LIMIT - SECOND).await;
    assert_eq!(recorder.reports(), []);
    sleep(2 * SECOND).await;
    assert_eq!(recorder.reports(), [Seen::timed_out(true)]);
}

#[tokio::test(start_paused = true)]
async fn a_dropped_job_has_its_grace_like_any_other() {
    let recorder = Recorder::default();
    let service = service_fn(|_: Unit| async {
        cancelled().await;
        sleep(SECOND).await;
        Ok::<_, Refused>(())
    });
    let mut sentinel = layer(&recorder).grace(2 * SECOND).layer(service);
    let response = call(&mut sentinel, Unit::default());
    assert!(timeout(SECOND, response).await.is_err());
    idle(&Handle::current()).await;
    assert_eq!(recorder.reports(), [Seen::completed()]);
}

// === which cause came first ===

#[tokio::test(start_paused = true)]
async fn a_drop_after_the_limit_is_a_time_out_though_nobody_had_looked() {
    for on_drop in BOTH {
        let recorder = Recorder::default();
        let mut sentinel = layer(&recorder).on_drop(on_drop).layer(Worker::default());
        let response = call_and_look_away(&mut sentinel, Work::new(Fate::Hang), LIMIT).await;
        drop(response);
        idle(&Handle::current()).await;
        assert_eq!(recorder.reports(), [Seen::timed_out(true)], "{on_drop:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_drop_by_a_plain_thread_is_timed_by_the_clock_of_its_caller() {
    for (time, seen) in [
        (LIMIT - SECOND, caller_dropped()),
        (LIMIT + SECOND, Seen::timed_out(true)),
    ] {
        let recorder = Recorder::default();
        let mut sentinel = layer(&recorder).layer(Worker::default());
        let response = call_and_look_away(&mut sentinel, Work::new(Fate::Hang), time).await;
        thread::spawn(move || drop(response)).join().unwrap();
        idle(&Handle::current()).await;
        assert_eq!(recorder.reports(), [seen], "{time:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_drop_just_before_the_limit_is_a_cancellation() {
    let recorder = Recorder::default();
    let mut sentinel = layer(&recorder).layer(Worker::default());
    let response = call_and_look_away(
        &mut sentinel,
        Work::new(Fate::Hang),
        LIMIT - Duration::from_millis(1),
    )
    .await;
    drop(response);
    idle(&Handle::current()).await;
    assert_eq!(recorder.reports(), [caller_dropped()]);
}

#[tokio::test(start_paused = true)]
async fn a_drop_during_the_stop_does_not_change_its_cause_nor_cut_its_grace() {
    for on_drop in BOTH {
        let times = Arc::new(Mutex::new(Vec::new()));
        let noted = Arc::clone(&times);
        let policy = service_fn(move |report: Report<Fate, (), Refused>| {
            let seen = Seen::from(&report.outcome);
            noted.lock().unwrap().push((seen, report.elapsed));
            async { Ok::<_, Refused>(()) }
        });
        let mut sentinel = SentinelLayer::new(policy)
            .timeout(LIMIT)
            .grace(3 * SECOND)
            .on_drop(on_drop)
            .layer(Worker::default());
        let response = call(&mut sentinel, Work::new(Fate::Hang));
        assert!(timeout(LIMIT + SECOND, response).await.is_err());
        idle(&Handle::current()).await;
        let expected = [(Seen::timed_out(true), LIMIT + 3 * SECOND)];
        assert_eq!(*times.lock().unwrap(), expected, "{on_drop:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_job_that_finished_before_the_drop_has_completed_though_nobody_had_looked() {
    for on_drop in BOTH {
        // Even when the limit has passed since: what is finished must not run twice.
        for time in [2 * WORK, 2 * LIMIT] {
            for (fate, seen) in [
                (Fate::Value, Seen::completed()),
                (Fate::Error, Seen::failed()),
            ] {
                let recorder = Recorder::default();
                let mut sentinel = layer(&recorder).on_drop(on_drop).layer(Worker::default());
                let response = call_and_look_away(&mut sentinel, Work::new(fate), time).await;
                drop(response);
                idle(&Handle::current()).await;
                assert_eq!(recorder.reports(), [seen], "{on_drop:?} after {time:?}");
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_job_that_panicked_before_the_drop_has_panicked_though_nobody_had_looked() {
    for on_drop in BOTH {
        for time in [2 * WORK, 2 * LIMIT] {
            let recorder = Recorder::default();
            let mut sentinel = layer(&recorder).on_drop(on_drop).layer(Worker::default());
            let response =
                call_and_look_away(&mut sentinel, Work::new(Fate::PanicLater), time).await;
            drop(response);
            idle(&Handle::current()).await;
            // Nobody had told it to stop: a poison job must not pass for a cancelled one.
            assert_eq!(
                recorder.reports(),
                [Seen::panicked()],
                "{on_drop:?} {time:?}"
            );
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_before_the_drop_wins() {
    for on_drop in BOTH {
        let recorder = Recorder::default();
        let service = service_fn(|_: Unit| async {
            Cancellation::current().cancel(CancelReason::LeaseLost);
            pending::<Result<(), Refused>>().await
        });
        let mut sentinel = layer(&recorder).on_drop(on_drop).layer(service);
        let response = call_and_look_away(&mut sentinel, Unit::default(), SECOND).await;
        drop(response);
        idle(&Handle::current()).await;
        let seen = Seen::cancelled(CancelReason::LeaseLost, true);
        assert_eq!(recorder.reports(), [seen], "{on_drop:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_before_the_drop_wins() {
    for on_drop in BOTH {
        let (recorder, shutdown) = (Recorder::default(), CancellationToken::new());
        let mut sentinel = layer(&recorder)
            .on_drop(on_drop)
            .shutdown(shutdown.clone())
            .layer(Worker::default());
        let response = call_and_look_away(&mut sentinel, Work::new(Fate::Hang), SECOND).await;
        // As a server does that cancels its token and then lets go of its futures.
        shutdown.cancel();
        drop(response);
        idle(&Handle::current()).await;
        let seen = Seen::cancelled(CancelReason::Shutdown, true);
        assert_eq!(recorder.reports(), [seen], "{on_drop:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_jobs_future_is_gone_before_the_policy_hears_of_the_drop() {
    let drops = Count::default();
    let (guarded, heard) = (drops.clone(), Count::default());
    let hearing = heard.clone();
    let policy = service_fn(move |report: Report<Unit, (), Refused>| {
        assert_eq!(report.outcome.kind(), OutcomeKind::Cancelled);
        assert_eq!(drops.get(), 1);
        hearing.add();
        async move { Ok::<_, Refused>(()) }
    });
    let mut sentinel = SentinelLayer::new(policy).layer(service_fn(move |_: Unit| {
        let guard = guarded.guard();
        async move {
            let _guard = guard;
            pending::<Result<(), Refused>>().await
        }
    }));
    let response = call(&mut sentinel, Unit::default());
    assert!(timeout(SECOND, response).await.is_err());
    idle(&Handle::current()).await;
    assert_eq!(heard.get(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_panic_in_a_destructor_after_a_drop_is_attached_to_the_cancellation() {
    let recorder = Recorder::default();
    let service = service_fn(|_: Unit| async {
        cancelled().await;
        raise("while tidying up");
        #[expect(unreachable_code, reason = "tells the type of the block")]
        Ok::<(), Refused>(())
    });
    let mut sentinel = layer(&recorder).grace(SECOND).layer(service);
    let response = call(&mut sentinel, Unit::default());
    assert!(timeout(SECOND, response).await.is_err());
    idle(&Handle::current()).await;
    assert_eq!(recorder.reports(), [caller_dropped().with_panic(true)]);
}

// === where ===

#[tokio::test(start_paused = true)]
async fn g1_a_drop_outside_of_any_runtime_settles_on_the_runtime_of_the_call() {
    for (on_drop, seen) in [
        (OnDrop::Abort, caller_dropped()),
        (OnDrop::Detach, Seen::timed_out(true)),
    ] {
        let recorder = Recorder::default();
        let mut sentinel = layer(&recorder).on_drop(on_drop).layer(Worker::default());
        for polled in [false, true] {
            let work = Work::new(Fate::Hang);
            let response = match polled {
                true => call_and_look_away(&mut sentinel, work, SECOND).await,
                false => Box::pin(sentinel.ready().await.unwrap().call(work)),
            };
            let outside = thread::spawn(move || {
                assert!(Handle::try_current().is_err());
                drop(response);
            });
            outside.join().unwrap();
            idle(&Handle::current()).await;
        }
        assert_eq!(recorder.reports(), [seen; 2], "{on_drop:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn g1_a_drop_outside_of_any_runtime_lets_a_settlement_go_on() {
    for (plan, unsettled) in [
        (Plan::Ok, vec![]),
        (Plan::Error, vec![Answer::Policy]),
        (Plan::Hang, vec![Answer::PolicyTimedOut]),
    ] {
        let recorder = Recorder::default();
        let mut sentinel = SentinelLayer::new(recorder.scripted(plan, SECOND))
            .on_unsettled(recorder.unsettled())
            .layer(Worker::default());
        let response = sentinel.ready().await.unwrap();
        let mut response = Box::pin(response.call(Work::new(Fate::Value)));
        let settling = poll_fn(|cx| match response.as_mut().poll(cx) {
            Poll::Pending if !recorder.reports().is_empty() => Poll::Ready(()),
            Poll::Pending => Poll::Pending,
            Poll::Ready(settled) => panic!("{settled:?}"),
        });
        settling.await;
        thread::spawn(move || drop(response)).join().unwrap();
        idle(&Handle::current()).await;
        assert_eq!(recorder.reports(), [Seen::completed()], "{plan:?}");
        assert_eq!(recorder.unsettled_errors(), unsettled, "{plan:?}");
    }
}

#[test]
#[expect(
    clippy::async_yields_async,
    reason = "the response outlives what runs it"
)]
fn g1_a_drop_inside_another_runtime_settles_there() {
    let recorder = Recorder::default();
    let first = Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let mut sentinel = layer(&recorder).layer(Worker::default());
    let response = first.block_on(async {
        let response = sentinel.ready().await.unwrap();
        let mut response = Box::pin(response.call(Work::new(Fate::Hang)));
        assert!(poll!(&mut response).is_pending());
        response
    });
    let second = current_thread();
    second.block_on(async {
        drop(response);
        assert_eq!(Handle::current().metrics().num_alive_tasks(), 1);
        idle(&Handle::current()).await;
    });
    assert_eq!(recorder.reports(), [caller_dropped()]);
}

#[test]
#[expect(
    clippy::async_yields_async,
    reason = "the response outlives what runs it"
)]
fn g1_a_drop_after_the_runtime_of_the_call_ended_settles_on_the_current_one() {
    let recorder = Recorder::default();
    let first = current_thread();
    let mut sentinel = layer(&recorder).layer(Worker::default());
    let response = first.block_on(async {
        let response = sentinel.ready().await.unwrap();
        Box::pin(response.call(Work::new(Fate::Hang)))
    });
    drop(first);
    current_thread().block_on(async {
        drop(response);
        idle(&Handle::current()).await;
    });
    // The runtime took the job with it before the drop, so that came first.
    let seen = Seen::cancelled(CancelReason::RuntimeGone, true);
    assert_eq!(recorder.reports(), [seen]);
}

#[test]
#[expect(
    clippy::async_yields_async,
    reason = "the response outlives what runs it"
)]
fn a_drop_with_no_runtime_left_does_not_panic() {
    let recorder = Recorder::default();
    let runtime = current_thread();
    let mut sentinel = layer(&recorder).layer(Worker::default());
    let response = runtime.block_on(async {
        let response = sentinel.ready().await.unwrap();
        Box::pin(response.call(Work::new(Fate::Hang)))
    });
    drop(runtime);
    // Out of reach, as documented: the broker redelivers.
    drop(response);
    assert_eq!(recorder.reports(), []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn g1_thousands_of_callers_that_drop_at_any_moment_leave_one_outcome_each() {
    const JOBS: u64 = 5_000;
    for on_drop in BOTH {
        let recorder = Recorder::default();
        let service = service_fn(|n: Arc<u64>| async move {
            sleep(Duration::from_millis(*n % 3)).await;
            Ok::<_, Refused>(())
        });
        let sentinel = SentinelLayer::new(recorder.policy())
            .on_drop(on_drop)
            .layer(service);
        for n in 0..JOBS {
            let mut sentinel = sentinel.clone();
            let response = sentinel.call(n.into());
            tokio::spawn(timeout(Duration::from_millis(n / 3 % 3), response));
        }
        until(|| recorder.reports().len() as u64 >= JOBS).await;
        idle(&Handle::current()).await;
        let reports = recorder.reports();
        assert_eq!(reports.len() as u64, JOBS);
        for seen in reports {
            // Which of the two is the scheduler's choice, unless the job is detached.
            let legal =
                seen == Seen::completed() || on_drop == OnDrop::Abort && seen == caller_dropped();
            assert!(legal, "{on_drop:?}: {seen:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_report_keeps_its_value_when_a_dropped_job_had_finished() {
    let values = Arc::new(Mutex::new(Vec::new()));
    let told = Arc::clone(&values);
    let policy = service_fn(move |report: Report<Unit, u8, Refused>| {
        if let Outcome::Completed(value) = report.outcome {
            told.lock().unwrap().push(value);
        }
        async { Ok::<_, Refused>(()) }
    });
    let service = service_fn(|_: Unit| async { Ok::<_, Refused>(7_u8) });
    let mut sentinel = SentinelLayer::new(policy).layer(service);
    let response = call_and_look_away(&mut sentinel, Unit::default(), SECOND).await;
    drop(response);
    idle(&Handle::current()).await;
    assert_eq!(*values.lock().unwrap(), [7]);
}

// === the runtime of the callers ends ===

fn callers_runtime_ends(on_drop: OnDrop, already_dropped: bool) -> Vec<Seen> {
    let recorder = Recorder::default();
    let guards = Count::default();
    // So long, in real time, that a busy machine does not come near it.
    let limit = match on_drop {
        OnDrop::Abort => LIMIT,
        OnDrop::Detach => Duration::from_millis(50),
    };
    let jobs = Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let guard = guards.clone();
    let mut sentinel = layer(&recorder)
        .timeout(limit)
        // So that a job whose caller is gone is not aborted in the destructor already.
        .grace(Duration::from_millis(1))
        .on_drop(on_drop)
        .runtime(jobs.handle().clone())
        .layer(service_fn(move |_: Unit| {
            let guard = guard.guard();
            async move {
                let _guard = guard;
                pending::<Result<(), Refused>>().await
            }
        }));
    let callers = current_thread();
    callers.block_on(async {
        let mut response = Box::pin(sentinel.ready().await.unwrap().call(Unit::default()));
        assert!(poll!(&mut response).is_pending());
        match already_dropped {
            true => drop(response),
            false => drop(tokio::spawn(response)),
        }
    });
    drop(callers);
    // Its runtime is alive, but nobody is left to stop it except there.
    assert!(wait_until(|| guards.get() == 1), "the job goes on");
    wait_until(|| !recorder.reports().is_empty());
    recorder.reports()
}

#[test]
fn g1_a_job_whose_callers_runtime_ends_is_settled_on_the_runtime_of_the_jobs() {
    for already_dropped in [false, true] {
        let reports = callers_runtime_ends(OnDrop::Abort, already_dropped);
        assert_eq!(reports, [caller_dropped()], "{already_dropped}");
    }
}

#[test]
fn g1_a_detached_job_keeps_its_limit_though_its_callers_runtime_ends() {
    for already_dropped in [false, true] {
        let reports = callers_runtime_ends(OnDrop::Detach, already_dropped);
        assert_eq!(reports, [Seen::timed_out(true)], "{already_dropped}");
    }
}
