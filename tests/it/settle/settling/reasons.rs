//! Reports to the broker, the caller and the log.

use std::fmt;

use tower::{Layer, service_fn};
use tower_sentinel::{
    Outcome, Panic, SentinelError, SentinelLayer, SettlePolicy, Verdict,
    outcome::{CancelReason, Cancelled, OutcomeKind, TimedOut},
    settle::SettleError,
};

use super::{SECOND, Try, always, failed, scripted, settle};
use crate::support::{
    Bomb, Refused, call,
    log::Log,
    raise,
    tag::{Tag, Told},
};

// === reports to the broker and the caller ===

#[tokio::test(start_paused = true)]
async fn the_reason_says_what_became_of_the_job_at_each_try() {
    let cancelled = Cancelled::new(CancelReason::Shutdown, true);
    for (outcome, kind, message) in [
        (Outcome::Completed(()), OutcomeKind::Completed, None),
        (failed(), OutcomeKind::Failed, Some("refused")),
        (
            Outcome::Panicked(Panic::new("index 7")),
            OutcomeKind::Panicked,
            Some("index 7"),
        ),
        (
            Outcome::TimedOut(TimedOut::new(SECOND, true)),
            OutcomeKind::TimedOut,
            Some("the job passed its time limit of 1s"),
        ),
        (
            Outcome::Cancelled(cancelled),
            OutcomeKind::Cancelled,
            Some("the job was cancelled: shutdown"),
        ),
    ] {
        let tag = scripted(&[Try::Again, Try::AgainAtOnce, Try::Ok]);
        let settled = settle(SettlePolicy::default(), &tag, outcome)
            .await
            .unwrap();
        assert_eq!((settled.kind, settled.elapsed), (kind, SECOND));
        assert_eq!(tag.tries(), 3);
        for Told { reason, .. } in tag.told() {
            assert_eq!((reason.kind, reason.elapsed), (kind, SECOND));
            assert_eq!(reason.message.as_deref(), message);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn the_tag_of_a_job_that_still_runs_is_told() {
    for stopped in [false, true] {
        let timed_out = Outcome::<(), Refused>::TimedOut(TimedOut::new(SECOND, stopped));
        let cancelled = Outcome::Cancelled(Cancelled::new(CancelReason::LeaseLost, stopped));
        for (outcome, verdict) in [(timed_out, Verdict::retry()), (cancelled, Verdict::Abandon)] {
            let tag = scripted(&[Try::Ok]);
            let settled = settle(SettlePolicy::default(), &tag, outcome)
                .await
                .unwrap();
            assert_eq!(settled.verdict, verdict);
            assert_eq!(settled.stopped, stopped);
            let expected = (!stopped).then_some("Tag 7");
            assert_eq!(settled.tag.as_deref(), expected);
            assert_eq!(tag.tries(), 1);
        }
    }
    let settled = settle(SettlePolicy::default(), &scripted(&[Try::Ok]), failed()).await;
    assert_eq!(settled.unwrap().tag, None);
}

#[tokio::test(start_paused = true)]
async fn a_policy_by_default_acks_on_success() {
    let tag = scripted(&[Try::Ok]);
    let done = Outcome::<_, Refused>::Completed(());
    let settled = settle(SettlePolicy::default(), &tag, done).await.unwrap();
    assert_eq!(settled.verdict, Verdict::Ack);
    assert!(!settled.charged);
}

/// A handler's error that panics when it is printed.
struct Unprintable;

impl fmt::Display for Unprintable {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        raise("no words")
    }
}

#[tokio::test(start_paused = true)]
async fn a_jobs_error_that_cannot_be_printed_costs_no_answer() {
    let tag = scripted(&[Try::Ok]);
    let outcome = Outcome::<(), _>::Failed(Unprintable);
    let settled = settle(SettlePolicy::default(), &tag, outcome)
        .await
        .unwrap();
    assert_eq!(settled.verdict, Verdict::retry());
    let reason = &tag.told()[0].reason;
    let message = "the error cannot be printed: no words";
    assert_eq!(reason.message.as_deref(), Some(message));
    assert_eq!(reason.kind, OutcomeKind::Failed);
}

#[tokio::test(start_paused = true)]
async fn a_jobs_value_whose_destructor_panics_costs_no_answer() {
    let tag = scripted(&[Try::Ok]);
    let outcome = Outcome::<_, Refused>::Completed(Bomb);
    let settled = settle(SettlePolicy::default(), &tag, outcome)
        .await
        .unwrap();
    assert_eq!(settled.verdict, Verdict::Ack);
    assert_eq!(tag.tries(), 1);
    // Nor does it hide a refusal.
    let refuse = |_: &Tag, _: &Outcome<Bomb, Refused>| Verdict::retry_after(SECOND);
    let outcome = Outcome::Completed(Bomb);
    let error = settle(SettlePolicy::new(refuse), &tag, outcome)
        .await
        .unwrap_err();
    assert!(matches!(error, SettleError::Unsupported { .. }));
}

#[tokio::test(start_paused = true)]
async fn a_decision_that_panics_is_the_sentinels_to_catch() {
    let decide = |_: &Tag, _: &Outcome<(), Refused>| -> Verdict { raise("in the decision") };
    let mut sentinel = SentinelLayer::new(SettlePolicy::new(decide))
        .layer(service_fn(async |_: Tag| Ok::<_, Refused>(())));
    let tag = scripted(&[Try::Ok]);
    let error = call(&mut sentinel, tag.clone()).await.unwrap_err();
    assert!(
        matches!(error, SentinelError::PolicyPanicked(panic) if panic.message() == "in the decision")
    );
    assert_eq!(tag.tries(), 0);
}

// === events ===

#[tokio::test(start_paused = true)]
async fn each_try_that_fails_is_warned_of_with_its_verdict() {
    for (script, lines) in [
        (&[Try::Ok] as &'static [Try], &[] as &[&str]),
        (&[Try::Slow], &[]),
        (
            &[Try::Again, Try::AgainAtOnce, Try::Ok],
            &[
                "settlement failed verdict=retry tries=1 again=true error=refused",
                "settlement failed verdict=retry tries=2 again=true error=refused",
            ],
        ),
        (
            &[Try::Last],
            &["settlement failed verdict=retry tries=1 again=false error=refused"],
        ),
        (
            &[Try::Hang],
            &["settlement timed out verdict=retry tries=1 limit=5s"],
        ),
    ] {
        let (log, guard) = Log::start();
        let _answer = settle(SettlePolicy::default(), &scripted(script), failed()).await;
        drop(guard);
        let mut logged = log.lines();
        assert!(logged.remove(0).starts_with("WARN the job failed"));
        assert_eq!(logged.len(), lines.len(), "{logged:?}");
        for (logged, line) in logged.iter().zip(lines) {
            assert!(logged.starts_with("WARN"), "{logged}");
            assert!(logged.ends_with(line), "{logged}");
        }
    }
}

#[test]
fn a_policy_prints_what_it_is_made_of() {
    let printed = format!("{:?}", SettlePolicy::new(always(Verdict::Ack)));
    assert!(printed.contains("always"), "{printed}");
    assert!(printed.contains("budget: 10s"), "{printed}");
}
