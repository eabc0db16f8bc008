//! G5: the times of a policy's polls for readiness and of its calls.

use std::{
    future::ready,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::future::join_all;
use tokio::time::{Instant, sleep};
use tower::{Layer, Service, ServiceExt, limit::ConcurrencyLimit};
use tower_sentinel::{Report, SentinelError, SentinelLayer};

use super::{PAUSE, SECOND, returns};
use crate::support::{Count, Fate, Plan, Recorder, Refused, Seen, Unit, WORK, Work, Worker, call};

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

/// A policy whose instances require a poll for readiness right before each call.
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
