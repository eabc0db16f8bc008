//! Verdicts that cannot be sent, and errors of the tag.

use std::error::Error;

use tower_sentinel::{
    DecisionExt, Outcome, SettlePolicy, Verdict, ack_on_success,
    settle::{Capabilities, SettleError, decision::Undecided},
};

use super::{SECOND, Try, always, failed, scripted, settle};
use crate::support::Refused;

#[tokio::test(start_paused = true)]
async fn nothing_is_sent_without_a_verdict() {
    let unknown = || scripted(&[Try::Ok]).delivered(None);
    let limit = SettlePolicy::new(ack_on_success().delivery_limit(5));
    let backoff = SettlePolicy::new(ack_on_success().backoff(SECOND..=SECOND));
    let once = SettlePolicy::new(ack_on_success().retry_once());

    let tag = unknown();
    for (answer, why) in [
        (
            settle(limit.clone(), &tag, failed()).await,
            Undecided::DeliveriesUnknown,
        ),
        (
            settle(backoff, &tag, failed()).await,
            Undecided::DeliveriesUnknown,
        ),
        (
            settle(once, &tag, failed()).await,
            Undecided::RedeliveredUnknown,
        ),
    ] {
        let error = answer.unwrap_err();
        assert!(matches!(error, SettleError::Undecided(undecided) if undecided == why));
        assert!(error.must_give_up_channel());
        assert_eq!(error.source().unwrap().to_string(), why.to_string());
        assert_eq!(error.to_string(), format!("there is no verdict: {why}"));
    }
    assert_eq!(tag.tries(), 0);
    // An outcome that does not depend on the count is settled.
    let done = Outcome::<_, Refused>::Completed(());
    assert_eq!(
        settle(limit, &tag, done).await.unwrap().verdict,
        Verdict::Ack
    );
    assert_eq!(tag.tries(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_delay_that_the_broker_cannot_do_is_refused_and_not_left_out() {
    let policy = SettlePolicy::new(ack_on_success().backoff(SECOND..=SECOND).random(|| 1.0));
    let tag = scripted(&[Try::Ok]);
    let error = settle(policy.clone(), &tag, failed()).await.unwrap_err();
    let refused = Verdict::retry_after(SECOND);
    assert!(matches!(error, SettleError::Unsupported { verdict } if verdict == refused));
    assert!(error.must_give_up_channel());
    assert!(error.source().is_none());
    let printed = "the broker can't carry out \"retry after 1s\"";
    assert_eq!(error.to_string(), printed);
    assert_eq!(tag.tries(), 0);

    let able = scripted(&[Try::Ok]).can(Capabilities::none().delay());
    assert_eq!(
        settle(policy, &able, failed()).await.unwrap().verdict,
        refused
    );
}

#[tokio::test(start_paused = true)]
async fn an_error_of_the_tag_is_the_source() {
    let policy = SettlePolicy::new(always(Verdict::Ack));
    for (script, printed) in [
        (
            &[Try::LastAtOnce],
            "the delivery was not settled with \"ack\" in 1 try: refused",
        ),
        (
            &[Try::Again],
            "the delivery was not settled with \"ack\" in 10 tries: refused",
        ),
    ] {
        let tag = scripted(script);
        let error = settle(policy.clone(), &tag, failed()).await.unwrap_err();
        assert_eq!(error.to_string(), printed);
        assert!(error.source().unwrap().is::<Refused>());
    }
    let hung = scripted(&[Try::Hang]);
    let error = settle(policy, &hung, failed()).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "the delivery was not settled with \"ack\" within 5s"
    );
    assert!(error.source().is_none());
}
