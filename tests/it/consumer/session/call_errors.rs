//! Errors of calls, and their reach.

use std::time::Duration;

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tower::{BoxError, ServiceBuilder, service_fn};
use tower_sentinel::{
    Consumer, SentinelError, Verdict,
    consumer::{AfterError, EndCause, Escalate, Escalation},
    settle::SettleError,
};

use super::{MS, call_alone, consume, plain};
use crate::{
    consumer::{CallError, ends, here, stack},
    support::{
        Fate, Refused, raise,
        subscription::{Channel, Refusal},
    },
};

#[tokio::test(start_paused = true)]
async fn a_policy_that_panics_costs_the_channel() {
    let channel = Channel::of([Fate::Value, Fate::Value]);
    channel.refuse(Refusal::Panics);
    let error = consume(&channel).await.unwrap_err();
    let EndCause::Unanswered(SentinelError::PolicyPanicked(_)) = error.cause() else {
        panic!("{error:?}");
    };
    assert_eq!(channel.verdicts(), [Verdict::Ack]);
    assert_eq!((error.summary().unanswered, channel.closed()), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_decision_that_can_not_be_made_is_a_wrong_configuration() {
    let channel = Channel::of([Fate::Error]);
    channel.refuse(Refusal::Unsupported);
    let error = consume(&channel).await.unwrap_err();
    let EndCause::Misconfigured(SentinelError::Policy(SettleError::Undecided(_))) = error.cause()
    else {
        panic!("{error:?}");
    };
    assert!(!error.cause().is_transient());
    assert_eq!((error.summary().unanswered, channel.closed()), (1, 1));
}

#[test]
fn errors_know_how_far_they_reach() {
    let failed = |verdict| SettleError::Failed {
        verdict,
        tries: 1,
        error: Refused,
    };
    let limit = MS(5);
    let unsupported = SettleError::Unsupported {
        verdict: Verdict::Ack,
    };
    for (error, escalation) in [
        (CallError::Unready(Refused), Escalation::Channel),
        (CallError::Policy(failed(Verdict::Ack)), Escalation::Channel),
        (
            CallError::Policy(failed(Verdict::release())),
            Escalation::Channel,
        ),
        (
            CallError::Policy(failed(Verdict::Abandon)),
            Escalation::Call,
        ),
        (CallError::Policy(unsupported), Escalation::Consumer),
        (CallError::PolicyTimedOut(limit), Escalation::Channel),
    ] {
        assert_eq!(error.escalation(), escalation, "{error:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_error_of_one_call_stops_or_not_as_it_is_told() {
    for (after_error, calls) in [(AfterError::Stop, 1), (AfterError::Continue, 4)] {
        let channel = Channel::of([Fate::Error, Fate::Error, Fate::Value, Fate::Value]);
        let service = ServiceBuilder::new().concurrency_limit(1).service_fn(plain);
        let consumer = Consumer::new(channel.subscribe(), service)
            .escalation(call_alone)
            .on_error(after_error)
            .with_graceful_shutdown(sleep(MS(10)));
        let (summary, failed) = match ends(consumer).await {
            Ok(summary) => (summary, 2),
            Err(error) => {
                assert!(matches!(error.cause(), EndCause::Failed(_)));
                (error.into_parts().1, 1)
            }
        };
        assert_eq!((summary.called, summary.failed), (calls, failed));
        assert_eq!((summary.unanswered, channel.closed()), (0, 1));
    }
}

#[tokio::test(start_paused = true)]
async fn a_closure_that_panics_costs_the_channel() {
    let channel = Channel::of([Fate::Error]);
    let consumer = Consumer::new(channel.subscribe(), service_fn(plain))
        .escalation(|_: &BoxError| raise("in the closure"));
    let error = ends(consumer).await.unwrap_err();
    assert!(matches!(error.cause(), EndCause::Unanswered(_)));
}

#[tokio::test(start_paused = true)]
async fn a_sentinel_under_more_middleware_is_told_of_by_a_closure() {
    let channel = Channel::of([Fate::Value]);
    channel.refuse(Refusal::Fails);
    let service = ServiceBuilder::new()
        .timeout(Duration::from_secs(60))
        .service(stack(1, CancellationToken::new(), here()));
    let consumer = Consumer::new(channel.subscribe(), service).escalation(|error: &BoxError| {
        let inner = error.downcast_ref::<CallError>();
        inner.map_or(Escalation::Channel, Escalate::escalation)
    });
    let error = ends(consumer).await.unwrap_err();
    assert!(matches!(error.cause(), EndCause::Unanswered(_)));
}
