//! Panics of a job, from each place and with each payload.

use std::{
    any::Any,
    future::{Future, pending, ready},
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use futures_util::future::join_all;
use tokio::runtime::{Builder, Handle};
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_sentinel::{
    Job, Outcome, Report, SentinelError, SentinelLayer, TimeLimit, outcome::OutcomeKind,
};
use tracing::Span;

use crate::support::{
    Blocked, Bomb, Count, Plan, Recorder, Refused, Seen, Unit, WORK, call, idle, wait_until,
};

// === payloads ===

/// A payload whose destructor panics, the first time with another one like it.
struct BombInBomb;

impl Drop for BombInBomb {
    fn drop(&mut self) {
        resume_unwind(Box::new(Bomb));
    }
}

fn payloads() -> Vec<(Box<dyn Any + Send>, &'static str)> {
    vec![
        (Box::new("a literal"), "a literal"),
        (Box::new(String::from("a string")), "a string"),
        (Box::new(42_u8), "Box<dyn Any>"),
        (Box::new(Bomb), "Box<dyn Any>"),
        (Box::new(BombInBomb), "Box<dyn Any>"),
    ]
}

/// A job that is its own panic payload.
struct Payload {
    payload: Box<dyn Any + Send>,
    in_call: bool,
}

impl Job for Payload {
    type Tag = ();

    fn tag(&self) {}
}

#[tokio::test]
async fn g1_a_panic_is_one_outcome_whatever_its_payload() {
    for in_call in [true, false] {
        for (payload, message) in payloads() {
            let recorder = Recorder::default();
            let service = service_fn(|Payload { payload, in_call }: Payload| {
                let mut payload = Some(payload);
                if in_call {
                    resume_unwind(payload.take().unwrap());
                }
                async move {
                    tokio::task::yield_now().await;
                    resume_unwind(payload.take().unwrap());
                    #[expect(unreachable_code, reason = "tells the type of the block")]
                    Ok::<(), Refused>(())
                }
            });
            let mut sentinel = SentinelLayer::new(recorder.policy()).layer(service);
            let report = call(&mut sentinel, Payload { payload, in_call }).await;
            let Outcome::Panicked(panic) = report.unwrap().outcome else {
                panic!("{message} in call: {in_call} did not panic");
            };
            assert_eq!(panic.message(), message);
            // Must not panic in its turn.
            drop(panic);
            assert_eq!(recorder.reports(), [Seen::panicked()]);
        }
    }
}

#[tokio::test]
async fn g1_the_payload_of_a_panic_comes_back_as_it_was_raised() {
    let recorder = Recorder::default();
    let service = service_fn(|_: Unit| -> std::future::Ready<Result<(), Refused>> {
        resume_unwind(Box::new(42_u8))
    });
    let mut sentinel = SentinelLayer::new(recorder.policy()).layer(service);
    let report = call(&mut sentinel, Unit::default()).await.unwrap();
    let Outcome::Panicked(panic) = report.outcome else {
        panic!("{report:?}");
    };
    assert_eq!(*panic.into_payload().downcast::<u8>().unwrap(), 42);
}

#[tokio::test]
async fn g1_a_payload_that_panics_in_drop_does_not_leave_a_policy_that_ignores_it() {
    let calls = Count::default();
    let told = calls.clone();
    let policy = service_fn(move |report: Report<Unit, (), Refused>| {
        told.add();
        drop(report);
        ready(Ok::<_, Refused>(()))
    });
    let service = service_fn(|_: Unit| -> std::future::Ready<Result<(), Refused>> {
        resume_unwind(Box::new(BombInBomb))
    });
    let mut sentinel = SentinelLayer::new(policy).layer(service);
    call(&mut sentinel, Unit::default()).await.unwrap();
    assert_eq!(calls.get(), 1);
}

// === where a panic comes from ===

/// A future that panics at a set place.
struct Fragile {
    result: Option<Result<(), Refused>>,
    panics_in_poll: bool,
}

impl Future for Fragile {
    type Output = Result<(), Refused>;

    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Self::Output> {
        assert!(!self.panics_in_poll, "in poll");
        self.result.take().map_or(Poll::Pending, Poll::Ready)
    }
}

impl Drop for Fragile {
    fn drop(&mut self) {
        panic!("in drop");
    }
}

#[tokio::test(start_paused = true)]
async fn g1_a_panic_in_drop_cannot_take_back_what_the_job_returned() {
    for (result, seen) in [(Ok(()), Seen::completed()), (Err(Refused), Seen::failed())] {
        let recorder = Recorder::default();
        let service = service_fn(move |_: Unit| Fragile {
            result: Some(result),
            panics_in_poll: false,
        });
        let mut sentinel = SentinelLayer::new(recorder.policy()).layer(service);
        call(&mut sentinel, Unit::default()).await.unwrap();
        assert_eq!(recorder.reports(), [seen]);
    }
}

#[tokio::test(start_paused = true)]
async fn g1_a_future_that_panics_in_poll_and_again_in_drop_is_one_panic() {
    let recorder = Recorder::default();
    let service = service_fn(|_: Unit| Fragile {
        result: None,
        panics_in_poll: true,
    });
    let mut sentinel = SentinelLayer::new(recorder.policy()).layer(service);
    let report = call(&mut sentinel, Unit::default()).await.unwrap();
    let Outcome::Panicked(panic) = report.outcome else {
        panic!("{report:?}");
    };
    assert!(panic.message().contains("in poll"), "{panic}");
    assert_eq!(recorder.reports(), [Seen::panicked()]);
}

#[tokio::test(start_paused = true)]
async fn g1_a_future_that_panics_in_drop_when_it_is_stopped_has_timed_out() {
    let recorder = Recorder::default();
    let service = service_fn(|_: Unit| Fragile {
        result: None,
        panics_in_poll: false,
    });
    let mut sentinel = SentinelLayer::new(recorder.policy()).layer(service);
    let report = call(&mut sentinel, Unit::default()).await.unwrap();
    let Outcome::TimedOut(timed_out) = report.outcome else {
        panic!("{report:?}");
    };
    assert_eq!(timed_out.panic().unwrap().message(), "in drop");
    assert!(timed_out.stopped());
}

#[tokio::test(start_paused = true)]
async fn g1_a_payload_that_panics_in_drop_can_be_attached_to_a_time_out() {
    let recorder = Recorder::default();
    let service = service_fn(|_: Unit| async {
        let _raises = Raises;
        pending::<Result<(), Refused>>().await
    });
    let mut sentinel = SentinelLayer::new(recorder.policy()).layer(service);
    drop(call(&mut sentinel, Unit::default()).await.unwrap());
    assert_eq!(recorder.reports(), [Seen::timed_out(true).with_panic(true)]);
}

/// Panics when it is dropped, with a payload whose own destructor does.
#[derive(Debug)]
struct Raises;

impl Drop for Raises {
    fn drop(&mut self) {
        resume_unwind(Box::new(BombInBomb));
    }
}

/// Behaviour of a job that blocked its thread until nobody waited for it any more.
#[derive(Clone, Copy, Debug)]
enum Late {
    ReturnsValue,
    ReturnsError,
    /// And is dropped there.
    Awaits,
}

#[tokio::test(start_paused = true)]
async fn g1_what_a_late_job_leaves_behind_may_panic_when_it_is_dropped() {
    for late in [Late::ReturnsValue, Late::ReturnsError, Late::Awaits] {
        let policy = service_fn(async |report: Report<Unit, Raises, Raises>| {
            Ok::<_, Refused>(Seen::from(&report.outcome))
        });
        let jobs = Builder::new_multi_thread()
            .worker_threads(1)
            .build()
            .unwrap();
        let thread = Blocked::until_released();
        let blocked = Arc::clone(&thread);
        let mut sentinel = SentinelLayer::new(policy)
            .runtime(jobs.handle().clone())
            .layer(service_fn(move |_: Unit| {
                let (raises, blocked) = (Raises, Arc::clone(&blocked));
                async move {
                    blocked.block();
                    match late {
                        Late::ReturnsValue => Ok(raises),
                        Late::ReturnsError => Err(raises),
                        Late::Awaits => pending().await,
                    }
                }
            }));
        let response = sentinel.ready().await.unwrap().call(Unit::default());
        assert!(wait_until(|| thread.entered()));
        assert_eq!(response.await.unwrap(), Seen::timed_out(false), "{late:?}");
        thread.release();
        // It ends the process, or nothing.
        assert!(wait_until(|| jobs.metrics().num_alive_tasks() == 0));
        jobs.shutdown_background();
    }
}

#[tokio::test(start_paused = true)]
async fn g2_a_hook_for_unsettled_errors_may_panic_with_any_payload() {
    let recorder = Recorder::default();
    let told = Count::default();
    let hook = told.clone();
    let mut sentinel = SentinelLayer::new(recorder.scripted(Plan::Error, WORK))
        .on_unsettled(move |_: SentinelError<Refused, Refused>| {
            hook.add();
            drop(Raises);
        })
        .layer(service_fn(|_: Unit| pending::<Result<(), Refused>>()));
    drop(sentinel.ready().await.unwrap().call(Unit::default()));
    idle(&Handle::current()).await;
    assert_eq!((recorder.reports().len(), told.get()), (1, 1));
}

/// A service whose called instance is not fit for a second call.
#[derive(Clone, Debug, Default)]
struct Instance {
    poisoned: bool,
    drops: Count,
    panics_in_drop: bool,
}

impl Service<Arc<bool>> for Instance {
    type Response = ();
    type Error = Refused;
    type Future = std::future::Ready<Result<(), Refused>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Refused>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, panics: Arc<bool>) -> Self::Future {
        assert!(!self.poisoned, "the poisoned instance is called again");
        self.poisoned = true;
        assert!(!*panics, "told to");
        ready(Ok(()))
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        if self.poisoned {
            self.drops.add();
            assert!(!self.panics_in_drop, "in the service's drop");
        }
    }
}

#[tokio::test]
async fn g2_the_instance_that_panicked_in_call_is_dropped_and_a_fresh_clone_serves_the_next() {
    let recorder = Recorder::default();
    let instance = Instance::default();
    let drops = instance.drops.clone();
    let mut sentinel = SentinelLayer::new(recorder.policy()).layer(instance);
    for (n, panics) in [true, true, false, true, false].into_iter().enumerate() {
        let report = call(&mut sentinel, Arc::new(panics)).await.unwrap();
        let kind = match panics {
            true => OutcomeKind::Panicked,
            false => OutcomeKind::Completed,
        };
        assert_eq!(report.outcome.kind(), kind, "job {n}");
        assert_eq!(drops.get(), n + 1, "instances dropped after job {n}");
    }
}

#[tokio::test]
async fn g2_a_service_that_panics_in_drop_does_not_change_the_outcome() {
    for (panics, seen) in [(true, Seen::panicked()), (false, Seen::completed())] {
        let recorder = Recorder::default();
        let mut instance = Instance::default();
        instance.panics_in_drop = true;
        let mut sentinel = SentinelLayer::new(recorder.policy()).layer(instance);
        call(&mut sentinel, Arc::new(panics)).await.unwrap();
        assert_eq!(recorder.reports(), [seen]);
    }
}

#[tokio::test]
async fn g2_jobs_that_panic_leave_their_neighbours_and_their_caller_alone() {
    let recorder = Recorder::default();
    let service = service_fn(|n: Arc<usize>| async move {
        tokio::task::yield_now().await;
        assert_ne!(*n % 2, 0, "told to");
        Ok::<_, Refused>(*n)
    });
    let sentinel = SentinelLayer::new(recorder.policy()).layer(service);
    // All in this task, which would panic if one of the panics got through.
    let reports = join_all((0..100).map(|n| {
        let mut sentinel = sentinel.clone();
        async move { call(&mut sentinel, Arc::new(n)).await.unwrap() }
    }));
    for (n, report) in reports.await.into_iter().enumerate() {
        assert_eq!(*report.tag, n);
        match report.outcome {
            Outcome::Completed(value) => assert_eq!((value, n % 2), (n, 1)),
            Outcome::Panicked(_) => assert_eq!(n % 2, 0),
            other => panic!("{n}: {other:?}"),
        }
    }
    assert_eq!(recorder.reports().len(), 100);
}

// === panics before anything is spawned ===

#[derive(Clone, Copy, Debug, Default)]
struct Careless {
    panics_in_tag: bool,
    panics_in_limit: bool,
}

impl Job for Careless {
    type Tag = ();

    fn tag(&self) {
        assert!(!self.panics_in_tag, "in tag");
    }

    fn time_limit(&self) -> TimeLimit {
        assert!(!self.panics_in_limit, "in time_limit");
        TimeLimit::After(Duration::from_secs(1))
    }
}

/// A service whose `Clone` panics when it is set to.
#[derive(Debug, Default)]
struct Unclonable {
    armed: Arc<AtomicBool>,
    calls: Count,
}

impl Clone for Unclonable {
    fn clone(&self) -> Self {
        assert!(!self.armed.load(Ordering::SeqCst), "in clone");
        Self {
            armed: Arc::clone(&self.armed),
            calls: self.calls.clone(),
        }
    }
}

impl Service<Careless> for Unclonable {
    type Response = ();
    type Error = Refused;
    type Future = std::future::Ready<Result<(), Refused>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Refused>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Careless) -> Self::Future {
        self.calls.add();
        ready(Ok(()))
    }
}

#[tokio::test(start_paused = true)]
async fn g1_a_panic_in_tag_or_time_limit_or_clone_is_the_callers_and_nothing_is_spawned() {
    let recorder = Recorder::default();
    let service = Unclonable::default();
    let (armed, calls) = (Arc::clone(&service.armed), service.calls.clone());
    let mut sentinel = SentinelLayer::new(recorder.policy()).layer(service);
    let harmless = Careless::default();
    let in_tag = Careless {
        panics_in_tag: true,
        ..harmless
    };
    let in_limit = Careless {
        panics_in_limit: true,
        ..harmless
    };
    for (job, panics_in_clone, message) in [
        (in_tag, false, "in tag"),
        (in_limit, false, "in time_limit"),
        (harmless, true, "in clone"),
    ] {
        armed.store(panics_in_clone, Ordering::SeqCst);
        let called = catch_unwind(AssertUnwindSafe(|| sentinel.call(job)));
        armed.store(false, Ordering::SeqCst);
        let payload = called.expect_err(message);
        assert_eq!(payload.downcast_ref(), Some(&message));
        assert_eq!(
            Handle::current().metrics().num_alive_tasks(),
            0,
            "{message}"
        );
        assert_eq!((recorder.asked(), calls.get()), (0, 0), "{message}");
    }
    // The sentinel is none the worse for it.
    call(&mut sentinel, harmless).await.unwrap();
    assert_eq!((recorder.reports().len(), calls.get()), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn g1_a_panic_in_make_span_is_the_callers_and_nothing_is_spawned() {
    let recorder = Recorder::default();
    let panics: fn(&Unit) -> Span = |_| panic!("in make_span");
    let service = service_fn(|_: Unit| ready(Ok::<_, Refused>(())));
    let mut sentinel = SentinelLayer::new(recorder.policy())
        .make_span(panics)
        .layer(service);
    let called = catch_unwind(AssertUnwindSafe(|| sentinel.call(Unit::default())));
    assert!(called.is_err());
    idle(&Handle::current()).await;
    assert_eq!(recorder.asked(), 0);
}
