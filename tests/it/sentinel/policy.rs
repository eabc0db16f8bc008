//! The policy: when it is asked and called, and what its own failures cost (G5, G6).

use std::{
    future::{Future, pending, ready},
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{
    future::{BoxFuture, join_all},
    poll,
};
use tokio::{
    runtime::Handle,
    task::{coop, yield_now},
    time::{Instant, advance, sleep, timeout},
};
use tower::{
    BoxError, Layer, Service, ServiceBuilder, ServiceExt, buffer::Buffer, limit::ConcurrencyLimit,
    retry, service_fn,
};
use tower_sentinel::{Outcome, Report, SentinelError, SentinelLayer, outcome::OutcomeKind};

use crate::support::{
    Answer, Bomb, Count, Fate, Plan, Recorder, Refused, Script, Seen, Unit, WORK, Work, Worker,
    call, idle, raise,
};

const SECOND: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(100);

fn returns() -> impl Service<Unit, Response = (), Error = Refused, Future: Send> + Clone + Send {
    service_fn(|_: Unit| ready(Ok::<_, Refused>(())))
}

// === readiness ===

#[tokio::test(start_paused = true)]
async fn g5_the_policy_is_not_asked_before_the_outcome_is_known() {
    let recorder = Recorder::default();
    let mut sentinel = SentinelLayer::new(recorder.policy()).layer(Worker::default());
    let response = tokio::spawn(sentinel.ready().await.unwrap().call(Work::new(Fate::Value)));
    sleep(WORK / 2).await;
    assert_eq!(recorder.asked(), 0);
    response.await.unwrap().unwrap();
    assert_eq!(recorder.asked(), 1);
    assert_eq!(recorder.reports(), [Seen::completed()]);
}

/// A policy whose instances insist that they be asked right before they are called.
#[derive(Debug, Default)]
struct Strict {
    /// One for each clone.
    instances: Count,
    ready: bool,
    called: bool,
    asks: usize,
}

impl Clone for Strict {
    fn clone(&self) -> Self {
        self.instances.add();
        Self {
            instances: self.instances.clone(),
            ..Self::default()
        }
    }
}

impl Service<Report<Unit, (), Refused>> for Strict {
    type Response = ();
    type Error = Refused;
    type Future = std::future::Ready<Result<(), Refused>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Refused>> {
        assert!(!self.ready, "asked again though it was ready");
        self.asks += 1;
        if self.asks < 3 {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.ready = true;
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Report<Unit, (), Refused>) -> Self::Future {
        assert!(self.ready, "called though it was not ready");
        assert!(!self.called, "one instance for two jobs");
        self.called = true;
        ready(Ok(()))
    }
}

#[tokio::test]
async fn g5_each_job_settles_through_a_clone_of_its_own_that_is_ready_when_called() {
    let policy = Strict::default();
    let instances = policy.instances.clone();
    let sentinel = SentinelLayer::new(policy).layer(returns());
    let mut one = sentinel.clone();
    let before = instances.get();
    for _ in 0..10 {
        call(&mut one, Unit::default()).await.unwrap();
    }
    assert_eq!(instances.get() - before, 10);
    let side_by_side = (0..10).map(|_| sentinel.clone().oneshot(Unit::default()));
    for answer in join_all(side_by_side).await {
        answer.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn g5_a_running_job_holds_no_place_in_a_limited_policy() {
    let recorder = Recorder::default();
    // One place for all jobs: reserved while a job runs, it would be missed by the others.
    let policy = ConcurrencyLimit::new(recorder.policy(), 1);
    let sentinel = SentinelLayer::new(policy).layer(Worker::default());
    let hung = tokio::spawn(sentinel.clone().oneshot(Work::new(Fate::Hang)));
    sleep(SECOND).await;
    let quick = sentinel.clone().oneshot(Work::new(Fate::Value));
    let started = Instant::now();
    quick.await.unwrap();
    assert_eq!(started.elapsed(), WORK);
    assert!(!hung.is_finished());
    hung.await.unwrap().unwrap();
    assert_eq!(recorder.reports().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn g5_a_policy_is_waited_for_until_it_is_ready() {
    let recorder = Recorder::default();
    let policy = recorder.scripted(Plan::SlowReadiness, PAUSE);
    let mut sentinel = SentinelLayer::new(policy).layer(returns());
    let started = Instant::now();
    let report = call(&mut sentinel, Unit::default()).await.unwrap();
    assert_eq!(started.elapsed(), 3 * PAUSE);
    // The time of the policy is not the job's.
    assert_eq!(report.elapsed, Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn g1_a_policy_that_cannot_become_ready_is_not_called() {
    for plan in [
        Plan::ReadinessError,
        Plan::PanicInReadiness,
        Plan::NeverReady,
    ] {
        let recorder = Recorder::default();
        let policy = recorder.scripted(plan, PAUSE);
        let mut sentinel = SentinelLayer::new(policy).layer(returns());
        let error = call(&mut sentinel, Unit::default()).await.unwrap_err();
        match (plan, &error) {
            (Plan::ReadinessError, SentinelError::Policy(Refused)) => {}
            (Plan::PanicInReadiness, SentinelError::PolicyPanicked(panic)) => {
                assert_eq!(panic.message(), "in the policy's readiness");
            }
            (Plan::NeverReady, SentinelError::PolicyTimedOut(_)) => {}
            _ => panic!("{plan:?}: {error:?}"),
        }
        assert!(recorder.asked() > 0);
        assert_eq!(recorder.reports(), [], "{plan:?}");
    }
}

// === settle_timeout ===

#[tokio::test(start_paused = true)]
async fn the_settle_timeout_is_30_s_unless_the_layer_says_otherwise() {
    for (layer, limit) in [
        (SentinelLayer::new as fn(Script) -> _, 30 * SECOND),
        (
            |policy| SentinelLayer::new(policy).settle_timeout(SECOND),
            SECOND,
        ),
    ] {
        for plan in [Plan::NeverReady, Plan::Hang] {
            let recorder = Recorder::default();
            let mut sentinel = layer(recorder.scripted(plan, PAUSE)).layer(returns());
            let started = Instant::now();
            let error = call(&mut sentinel, Unit::default()).await.unwrap_err();
            assert!(matches!(error, SentinelError::PolicyTimedOut(l) if l == limit));
            assert_eq!(started.elapsed(), limit, "{plan:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn the_settle_timeout_covers_readiness_and_call_together() {
    // Readiness takes two pauses and the call takes one.
    for (pause, answer) in [
        (Duration::from_millis(300), Answer::Ok),
        (Duration::from_millis(400), Answer::PolicyTimedOut),
    ] {
        let recorder = Recorder::default();
        let policy = recorder.scripted(Plan::SlowReadiness, pause);
        let mut sentinel = SentinelLayer::new(policy)
            .settle_timeout(SECOND)
            .layer(returns());
        let started = Instant::now();
        let answered = match call(&mut sentinel, Unit::default()).await {
            Ok(_) => Answer::Ok,
            Err(error) => Answer::from(&error),
        };
        assert_eq!(answered, answer);
        assert_eq!(started.elapsed(), (3 * pause).min(SECOND));
        assert_eq!(recorder.reports().len(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn the_settle_timeout_counts_from_the_outcome_and_not_from_the_call() {
    let recorder = Recorder::default();
    let policy = recorder.scripted(Plan::Ok, PAUSE);
    let mut sentinel = SentinelLayer::new(policy)
        .settle_timeout(2 * PAUSE)
        .layer(Worker::default());
    let started = Instant::now();
    call(&mut sentinel, Work::new(Fate::Value)).await.unwrap();
    assert_eq!(started.elapsed(), WORK + PAUSE);
}

#[tokio::test(start_paused = true)]
async fn the_settle_timeout_goes_on_though_the_caller_drops() {
    let recorder = Recorder::default();
    let mut sentinel = SentinelLayer::new(recorder.scripted(Plan::Hang, PAUSE))
        .settle_timeout(SECOND)
        .on_unsettled(recorder.unsettled())
        .layer(returns());
    let response = call(&mut sentinel, Unit::default());
    assert!(timeout(SECOND / 2, response).await.is_err());
    // Not a second one: half of it has passed.
    sleep(SECOND / 2 + Duration::from_millis(2)).await;
    assert_eq!(recorder.unsettled_errors(), [Answer::PolicyTimedOut]);
    idle(&Handle::current()).await;
}

#[tokio::test(start_paused = true)]
async fn a_policy_that_runs_into_its_limit_is_dropped() {
    let drops = Count::default();
    let guarded = drops.clone();
    let policy = service_fn(move |report: Report<Unit, (), Refused>| {
        let guard = guarded.guard();
        async move {
            let _guard = guard;
            drop(report);
            pending::<Result<(), Refused>>().await
        }
    });
    let mut sentinel = SentinelLayer::new(policy).layer(returns());
    let error = call(&mut sentinel, Unit::default()).await.unwrap_err();
    assert!(matches!(error, SentinelError::PolicyTimedOut(_)));
    assert_eq!(drops.get(), 1);
}

// === failures ===

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

/// A future that panics when it is dropped, whether it has answered or not.
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
        // It has none, so its limit is the answer.
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

// === tower's own middleware on a policy ===

#[tokio::test(start_paused = true)]
async fn a_policy_may_be_under_towers_timeout() {
    let recorder = Recorder::default();
    let policy = ServiceBuilder::new()
        .timeout(SECOND)
        .service(recorder.scripted(Plan::Hang, PAUSE));
    let mut sentinel = SentinelLayer::new(policy).layer(returns());
    let started = Instant::now();
    let error = call(&mut sentinel, Unit::default()).await.unwrap_err();
    let SentinelError::Policy(error) = error else {
        panic!("{error:?}");
    };
    assert!(error.is::<tower::timeout::error::Elapsed>());
    assert_eq!(started.elapsed(), SECOND);
    assert_eq!(recorder.reports(), [Seen::completed()]);
}

#[tokio::test(start_paused = true)]
async fn a_policy_may_be_behind_towers_buffer() {
    let recorder = Recorder::default();
    // One worker answers for all jobs, in their order, from a policy that need not be `Clone`.
    let policy = Buffer::new(recorder.scripted(Plan::SlowReadiness, PAUSE), 2);
    let sentinel = SentinelLayer::new(policy).layer(returns());
    let jobs = (0..20).map(|_| sentinel.clone().oneshot(Unit::default()));
    for report in join_all(jobs).await {
        assert!(report.unwrap().outcome.is_completed());
    }
    assert_eq!(recorder.reports(), [Seen::completed(); 20]);
}

/// Retries what fails, a few times.
#[derive(Clone)]
struct Attempts(usize);

impl<Req: Clone, Res> retry::Policy<Req, Res, Refused> for Attempts {
    type Future = std::future::Ready<()>;

    fn retry(&mut self, _: &mut Req, result: &mut Result<Res, Refused>) -> Option<Self::Future> {
        if result.is_ok() {
            return None;
        }
        self.0 = self.0.checked_sub(1)?;
        Some(ready(()))
    }

    fn clone_request(&mut self, request: &Req) -> Option<Req> {
        Some(request.clone())
    }
}

#[tokio::test(start_paused = true)]
async fn a_policy_may_be_retried_over_an_arc_of_the_report() {
    for (failures, attempts, settled) in [(0, 1, true), (2, 3, true), (3, 3, false)] {
        let asked = Count::default();
        let counted = asked.clone();
        let broker = service_fn(move |report: Arc<Report<Unit, (), Refused>>| {
            counted.add();
            ready(match counted.get() > failures {
                true => Ok(report.outcome.kind()),
                false => Err(Refused),
            })
        });
        let policy = ServiceBuilder::new()
            .map_request(Arc::new)
            .retry(Attempts(attempts - 1))
            .service(broker);
        let mut sentinel = SentinelLayer::new(policy).layer(returns());
        match call(&mut sentinel, Unit::default()).await {
            Ok(kind) => assert_eq!((kind, settled), (OutcomeKind::Completed, true)),
            Err(error) => {
                assert!(matches!(error, SentinelError::Policy(Refused)));
                assert!(!settled);
            }
        }
        assert_eq!(asked.get(), attempts.min(failures + 1));
    }
}

#[tokio::test(start_paused = true)]
async fn a_policy_of_boxed_errors_goes_under_towers_timeout_with_its_sentinel() {
    // A plain compile check that pays: no adapter is needed around either of the two timeouts.
    let policy = ServiceBuilder::new().timeout(SECOND).service_fn(
        |report: Report<Unit, (), BoxError>| async move {
            match report.outcome {
                Outcome::Failed(error) => Err(error),
                _ => Ok(()),
            }
        },
    );
    let mut stack = ServiceBuilder::new()
        .timeout(60 * SECOND)
        .layer(SentinelLayer::new(policy))
        .timeout(SECOND)
        .service_fn(|_: Unit| pending::<Result<(), Refused>>());
    let error: BoxError = call(&mut stack, Unit::default()).await.unwrap_err();
    let error = error.downcast::<SentinelError<BoxError, BoxError>>();
    let error = *error.unwrap();
    // The inner timeout failed the job, and the policy passed that on.
    let SentinelError::Policy(error) = error else {
        panic!("{error:?}");
    };
    assert!(error.is::<tower::timeout::error::Elapsed>());
}

#[tokio::test(start_paused = true)]
async fn g6_a_policy_that_never_yields_but_to_its_budget_has_its_limit_too() {
    let policy = service_fn(|_: Report<Unit, (), Refused>| async {
        loop {
            coop::consume_budget().await;
        }
        #[expect(unreachable_code)]
        Ok::<(), Refused>(())
    });
    let mut sentinel = SentinelLayer::new(policy)
        .settle_timeout(SECOND)
        .layer(returns());
    let mut response = Box::pin(sentinel.ready().await.unwrap().call(Unit::default()));
    // Its task is always ready, so time does not pass by itself.
    for _ in 0..8 {
        assert!(poll!(&mut response).is_pending());
        yield_now().await;
    }
    advance(2 * SECOND).await;
    let Poll::Ready(answer) = poll!(&mut response) else {
        panic!("no limit");
    };
    assert!(matches!(answer, Err(SentinelError::PolicyTimedOut(SECOND))));
}

/// A policy whose instance panics when it is dropped after its call.
#[derive(Default)]
struct OnceCalled(Option<Bomb>);

impl Clone for OnceCalled {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl Service<Report<Unit, (), Refused>> for OnceCalled {
    type Response = &'static str;
    type Error = Refused;
    type Future = BoxFuture<'static, Result<&'static str, Refused>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Refused>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Report<Unit, (), Refused>) -> Self::Future {
        self.0 = Some(Bomb);
        Box::pin(async {
            sleep(SECOND).await;
            Ok("acked")
        })
    }
}

#[tokio::test(start_paused = true)]
async fn g6_a_policy_whose_instance_panics_in_drop_still_settles() {
    let mut sentinel = SentinelLayer::new(OnceCalled::default()).layer(returns());
    let answer = call(&mut sentinel, Unit::default()).await;
    assert_eq!(answer.unwrap(), "acked");
}
