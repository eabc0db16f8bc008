//! Late events: for a job that has ended, for a supervisor that is busy, for a job that nobody can supervise
//! any more.

use std::{
    future::{pending, ready},
    pin::pin,
    sync::{Arc, Mutex},
    task::{Context, Poll, Waker},
    thread,
    time::Duration,
};

use tokio::{
    runtime::{Builder, Handle, Runtime},
    time::sleep,
};
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_sentinel::{
    KeepAliveLayer, Report, SentinelError, SentinelLayer, SettlePolicy, ack_on_success,
    cancel::Cancellation,
    outcome::{CancelReason, OutcomeKind},
    sentinel::OnDrop,
    settle::Lease,
};

use crate::support::{
    Blocked, Recorder, Refused, Seen, Unit, block_on, call, exhaust_budget, raise, tag::Tag, until,
    wait_until,
};

const SECOND: Duration = Duration::from_secs(1);
const SHORT: Duration = Duration::from_millis(10);

fn threads() -> Runtime {
    let mut builder = Builder::new_multi_thread();
    builder.worker_threads(2).enable_all().build().unwrap()
}

// === requests and limits ===

#[tokio::test(start_paused = true)]
async fn a_request_that_comes_after_a_panic_in_call_does_not_excuse_it() {
    let (recorder, handle) = (Recorder::default(), Arc::new(Mutex::new(None)));
    let given = Arc::clone(&handle);
    let service = service_fn(move |_: Unit| {
        *given.lock().unwrap() = Some(Cancellation::current());
        if true {
            raise("in call");
        }
        ready(Ok::<(), Refused>(()))
    });
    let mut sentinel = SentinelLayer::new(recorder.policy()).layer(service);
    let response = sentinel.ready().await.unwrap().call(Unit::default());
    until(|| handle.lock().unwrap().is_some()).await;
    let handle = handle.lock().unwrap().take().unwrap();
    handle.cancel(CancelReason::Requested);
    response.await.unwrap();
    assert_eq!(recorder.reports(), [Seen::panicked()]);
}

#[tokio::test(start_paused = true)]
async fn a_job_that_was_gone_before_its_stop_wait_was_over_has_stopped_in_a_busy_task_too() {
    let recorder = Recorder::default();
    let mut sentinel = SentinelLayer::new(recorder.policy())
        .timeout(SECOND)
        .stop_wait(SECOND)
        .layer(service_fn(|_: Unit| pending::<Result<(), Refused>>()));
    let mut response = pin!(sentinel.ready().await.unwrap().call(Unit::default()));
    let mut cx = Context::from_waker(Waker::noop());
    assert!(response.as_mut().poll(&mut cx).is_pending());
    sleep(SECOND).await;
    // It is cancelled and aborted, and is gone before the supervisor has its next turn.
    assert!(response.as_mut().poll(&mut cx).is_pending());
    sleep(2 * SECOND).await;
    exhaust_budget(&mut cx);
    assert!(response.as_mut().poll(&mut cx).is_pending());
    response.await.unwrap();
    assert_eq!(recorder.reports(), [Seen::timed_out(true)]);
}

#[test]
fn a_settlement_has_its_limit_though_no_runtime_is_left_to_measure_it() {
    let gone = threads();
    let policy = service_fn(|_: Report<Unit, (), Refused>| pending::<Result<(), Refused>>());
    let mut sentinel = SentinelLayer::new(policy)
        .settle_timeout(SHORT)
        .runtime(gone.handle().clone())
        .layer(service_fn(|_: Unit| ready(Ok::<_, Refused>(()))));
    drop(gone);
    let mut response = pin!(block_on(sentinel.ready()).unwrap().call(Unit::default()));
    // Somebody has to ask.
    let mut cx = Context::from_waker(Waker::noop());
    for _ in 0..10_000 {
        if let Poll::Ready(settled) = response.as_mut().poll(&mut cx) {
            assert!(matches!(settled, Err(SentinelError::PolicyTimedOut(SHORT))));
            return;
        }
        thread::sleep(Duration::from_millis(1));
    }
    panic!("the limit has passed");
}

#[test]
fn a_job_that_nobody_can_supervise_any_more_is_told_to_stop() {
    let jobs = threads();
    let (thread, handle) = (Blocked::until_released(), Arc::new(Mutex::new(None)));
    let (blocked, given) = (Arc::clone(&thread), Arc::clone(&handle));
    let service = service_fn(move |_: Unit| {
        *given.lock().unwrap() = Some(Cancellation::current());
        blocked.block();
        ready(Ok::<(), Refused>(()))
    });
    let recorder = Recorder::default();
    let mut sentinel = SentinelLayer::new(recorder.policy())
        .on_drop(OnDrop::Detach)
        .runtime(jobs.handle().clone())
        .layer(service);
    let response = block_on(sentinel.ready()).unwrap().call(Unit::default());
    assert!(wait_until(|| thread.entered()));
    jobs.shutdown_background();
    let handle = handle.lock().unwrap().take().unwrap();
    assert!(!handle.is_cancelled());
    // It would be settled on the runtime of the jobs, which is gone.
    drop(response);
    assert!(wait_until(|| handle.is_cancelled()));
    assert!(recorder.reports().is_empty());
    thread.release();
}

// === keep-alives ===

fn kept() -> Tag {
    Tag::new().keeping(|| ready(Ok(Lease::Held)))
}

fn sentinel(jobs: &Runtime) -> SentinelLayer<SettlePolicy> {
    SentinelLayer::new(SettlePolicy::new(ack_on_success()))
        .timeout(5 * SHORT)
        .stop_wait(SHORT)
        .runtime(jobs.handle().clone())
}

/// Its tickers are on the runtime of the test.
fn keep_alive() -> KeepAliveLayer {
    KeepAliveLayer::new(SHORT).runtime(Handle::current())
}

#[tokio::test]
async fn all_keep_alives_of_a_job_end_with_its_outcome() {
    let jobs = threads();
    let thread = Blocked::until_released();
    let blocked = Arc::clone(&thread);
    let (outer, inner) = (kept(), kept());
    let given = inner.clone();
    let blocking = keep_alive().layer(service_fn(move |_: Tag| {
        blocked.block();
        ready(Ok::<_, Refused>(()))
    }));
    let blocking = blocking.map_request(move |_: Tag| given.clone());
    let mut service = sentinel(&jobs).layer(keep_alive().layer(blocking));
    let settled = call(&mut service, outer.clone()).await.unwrap();
    assert!(!settled.stopped && settled.kind == OutcomeKind::TimedOut);
    let asked = || [&outer, &inner].map(|tag| tag.asked());
    let before = asked();
    sleep(10 * SHORT).await;
    assert_eq!(asked(), before);
    assert_eq!(outer.tries(), 1);
    thread.release();
    jobs.shutdown_background();
}

#[tokio::test]
async fn a_keep_alive_that_a_job_begins_after_its_outcome_asks_nothing() {
    let jobs = threads();
    let (thread, done) = (Blocked::until_released(), Blocked::until_released());
    let (blocked, ended) = (Arc::clone(&thread), Arc::clone(&done));
    let (tag, late) = (kept(), kept());
    let given = late.clone();
    let layer = keep_alive();
    let mut service = sentinel(&jobs).layer(service_fn(move |_: Tag| {
        blocked.block();
        let never = service_fn(|_: Tag| pending::<Result<(), Refused>>());
        let kept = layer.layer(never).call(given.clone());
        // It runs on for longer than many intervals.
        ended.block();
        kept
    }));
    let settled = call(&mut service, tag.clone()).await.unwrap();
    assert!(!settled.stopped);
    thread.release();
    until(|| done.entered()).await;
    sleep(10 * SHORT).await;
    assert_eq!(late.asked(), 0);
    done.release();
    jobs.shutdown_background();
}
