//! Places where a caller drops, and the end of its runtime.

use std::{
    future::{Future, pending, poll_fn},
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
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_sentinel::{Outcome, Report, SentinelLayer, outcome::CancelReason, sentinel::OnDrop};

use super::{BOTH, LIMIT, SECOND, call_and_look_away, caller_dropped, layer};
use crate::support::{
    Answer, Count, Fate, Plan, Recorder, Refused, Seen, Unit, Work, Worker, current_thread, idle,
    until, wait_until,
};

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
    // Its runtime is alive, and only its drop there can stop it.
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
