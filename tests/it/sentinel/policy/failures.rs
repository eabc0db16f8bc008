//! G6: the cost of a policy's failures.

use std::{
    future::{Future, ready},
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
};

use tokio::{runtime::Handle, time::timeout};
use tower::{Layer, Service, limit::ConcurrencyLimit, service_fn};
use tower_sentinel::{Report, SentinelError, SentinelLayer};

use super::{PAUSE, SECOND, returns};
use crate::support::{Answer, Bomb, Count, Plan, Recorder, Refused, Script, Unit, call, raise};

/// A policy that follows another plan from one job to the next.
#[derive(Debug)]
struct Switch {
    plan: Arc<Mutex<Plan>>,
    recorder: Recorder,
    /// Made of the plan of the moment.
    script: Script,
}

impl Switch {
    fn new(plan: &Arc<Mutex<Plan>>, recorder: &Recorder) -> Self {
        Self {
            plan: Arc::clone(plan),
            recorder: recorder.clone(),
            script: recorder.scripted(*plan.lock().unwrap(), PAUSE),
        }
    }
}

impl Clone for Switch {
    fn clone(&self) -> Self {
        Self::new(&self.plan, &self.recorder)
    }
}

impl Service<Report<Unit, (), Refused>> for Switch {
    type Response = Report<Unit, (), Refused>;
    type Error = Refused;
    type Future = <Script as Service<Report<Unit, (), Refused>>>::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Refused>> {
        Service::<Report<Unit, (), Refused>>::poll_ready(&mut self.script, cx)
    }

    fn call(&mut self, report: Report<Unit, (), Refused>) -> Self::Future {
        self.script.call(report)
    }
}

#[tokio::test(start_paused = true)]
async fn g6_a_policy_that_fails_costs_one_call_and_the_next_job_is_served() {
    let (plan, recorder) = (Arc::new(Mutex::new(Plan::Ok)), Recorder::default());
    let sentinel = SentinelLayer::new(Switch::new(&plan, &recorder)).layer(returns());
    // A permit that does not return would show at once.
    let mut gate = ConcurrencyLimit::new(sentinel, 1);
    for failing in Plan::ALL {
        *plan.lock().unwrap() = failing;
        let answer = call(&mut gate, Unit::default()).await;
        let fails = !matches!(failing, Plan::Ok | Plan::SlowReadiness);
        assert_eq!(answer.is_err(), fails, "{failing:?}");

        *plan.lock().unwrap() = Plan::Ok;
        let next = timeout(SECOND, call(&mut gate, Unit::default())).await;
        let report = next.expect("the permit is back").unwrap();
        assert!(report.outcome.is_completed(), "after {failing:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn g6_a_policy_that_panics_in_clone_panics_in_call_and_nothing_is_spawned() {
    #[derive(Debug, Default)]
    struct Unclonable {
        clones: Count,
    }

    impl Clone for Unclonable {
        fn clone(&self) -> Self {
            self.clones.add();
            // The first clone is the layer's.
            if self.clones.get() > 1 {
                raise("in clone");
            }
            let clones = self.clones.clone();
            Self { clones }
        }
    }

    impl Service<Report<Unit, (), Refused>> for Unclonable {
        type Response = ();
        type Error = Refused;
        type Future = std::future::Ready<Result<(), Refused>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Refused>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: Report<Unit, (), Refused>) -> Self::Future {
            ready(Ok(()))
        }
    }

    let mut sentinel = SentinelLayer::new(Unclonable::default()).layer(returns());
    let called = std::panic::AssertUnwindSafe(|| drop(sentinel.call(Unit::default())));
    assert!(std::panic::catch_unwind(called).is_err());
    assert_eq!(Handle::current().metrics().num_alive_tasks(), 0);
}

/// A future that panics when it is dropped, before or after its response.
struct Fragile(Option<Result<&'static str, Refused>>);

impl Future for Fragile {
    type Output = Result<&'static str, Refused>;

    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.take().map_or(Poll::Pending, Poll::Ready)
    }
}

impl Drop for Fragile {
    fn drop(&mut self) {
        raise("in the policy's drop");
    }
}

#[tokio::test(start_paused = true)]
async fn g6_a_policy_that_panics_in_drop_keeps_its_answer() {
    for (answer, result) in [
        (Some(Ok("acked")), Ok(Ok("acked"))),
        (Some(Err(Refused)), Ok(Err(Refused))),
        // It has none, so its limit is the result.
        (None, Err(())),
    ] {
        let policy = service_fn(move |_: Report<Unit, (), Refused>| Fragile(answer));
        let mut sentinel = SentinelLayer::new(policy).layer(returns());
        let answered = match call(&mut sentinel, Unit::default()).await {
            Ok(value) => Ok(Ok(value)),
            Err(SentinelError::Policy(error)) => Ok(Err(error)),
            Err(SentinelError::PolicyTimedOut(_)) => Err(()),
            Err(other) => panic!("{other:?}"),
        };
        assert_eq!(answered, result);
    }
}

#[tokio::test(start_paused = true)]
async fn g6_a_report_that_panics_in_drop_does_not_leave_a_policy_that_never_took_it() {
    for plan in [
        Plan::ReadinessError,
        Plan::PanicInReadiness,
        Plan::NeverReady,
    ] {
        let recorder = Recorder::default();
        let policy = recorder.scripted(plan, PAUSE);
        // The value that nobody takes is the bomb.
        let service = service_fn(|_: Unit| ready(Ok::<_, Refused>(Bomb)));
        let mut sentinel = SentinelLayer::new(policy).layer(service);
        let error = match call(&mut sentinel, Unit::default()).await {
            Ok(_) => panic!("{plan:?} answered"),
            Err(error) => Answer::from(&error),
        };
        let expected = match plan {
            Plan::ReadinessError => Answer::Policy,
            Plan::PanicInReadiness => Answer::PolicyPanicked,
            _ => Answer::PolicyTimedOut,
        };
        assert_eq!(error, expected, "{plan:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn on_unsettled_is_not_told_what_a_caller_is_told() {
    let recorder = Recorder::default();
    let mut sentinel = SentinelLayer::new(recorder.scripted(Plan::Error, PAUSE))
        .on_unsettled(recorder.unsettled())
        .layer(returns());
    call(&mut sentinel, Unit::default()).await.unwrap_err();
    assert_eq!(recorder.unsettled_errors(), []);
}
