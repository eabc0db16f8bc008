//! Times at which a caller drops.

use std::{
    future::{Future, poll_fn},
    task::Poll,
};

use tokio::{
    runtime::Handle,
    time::{sleep, timeout},
};
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_sentinel::{SentinelLayer, cancelled, sentinel::OnDrop};

use super::{BOTH, LIMIT, SECOND, caller_dropped, layer};
use crate::support::{Count, Fate, Plan, Recorder, Refused, Seen, Unit, Work, Worker, call, idle};

/// Number of awaits in the job of the next two tests.
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
                // The job's end, the policy's readiness and its response were each polled for.
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
