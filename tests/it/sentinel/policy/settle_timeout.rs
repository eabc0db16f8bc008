//! The time limit of a settlement.

use std::{future::pending, time::Duration};

use tokio::{
    runtime::Handle,
    time::{Instant, sleep, timeout},
};
use tower::{Layer, service_fn};
use tower_sentinel::{Report, SentinelError, SentinelLayer};

use super::{PAUSE, SECOND, returns};
use crate::support::{
    Answer, Count, Fate, Plan, Recorder, Refused, Script, Unit, WORK, Work, Worker, call, idle,
};

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
