//! Decisions on jobs that took their process down, as tables.

use std::{os::unix::process::ExitStatusExt, process::ExitStatus, str::Utf8Error};

use tower_sentinel::{
    DecisionExt, Outcome, Panic, Verdict, ack_on_success,
    process::ProcessError,
    settle::decision::{Crash, Decision, Undecided},
};

use crate::support::tag::Tag;

type Error = ProcessError<String, Utf8Error>;

fn crashes() -> [Error; 4] {
    [
        ProcessError::Crashed {
            status: Some(ExitStatus::from_raw(6)),
        },
        ProcessError::Crashed { status: None },
        ProcessError::OutOfMemory { limit: 1 },
        ProcessError::Garbled,
    ]
}

fn others() -> [Error; 3] {
    [
        ProcessError::Failed("no such user".to_owned()),
        ProcessError::Panicked {
            message: "index 7".to_owned(),
            location: None,
        },
        ProcessError::Undecodable(String::from_utf8(vec![0xff]).unwrap_err().utf8_error()),
    ]
}

fn failed(error: Error) -> Outcome<(), Error> {
    Outcome::Failed(error)
}

#[test]
fn a_crash_counts_as_an_attempt_by_default() {
    let tag = Tag::new().delivered(1);
    for error in crashes() {
        assert!(error.is_crash() && Crash::is_crash(&error));
        let verdict = ack_on_success().decide(&tag, &failed(error));
        assert_eq!(verdict, Ok(Verdict::retry()));
    }
}

#[test]
fn on_crash_decides_on_crashes_and_on_nothing_else() {
    let tag = Tag::new();
    let decision = ack_on_success()
        .on_error(|_: &Error| Verdict::release())
        .on_crash(Verdict::Reject)
        .boxed();
    for error in crashes() {
        assert_eq!(decision.decide(&tag, &failed(error)), Ok(Verdict::Reject));
    }
    for error in others() {
        assert!(!error.is_crash());
        let verdict = decision.decide(&tag, &failed(error));
        assert_eq!(verdict, Ok(Verdict::release()));
    }
    let completed = decision.decide(&tag, &Outcome::Completed(()));
    assert_eq!(completed, Ok(Verdict::Ack));
    // A panic in the worker itself is no crash of a child.
    let panicked = decision.decide(&tag, &Outcome::Panicked(Panic::new("it")));
    assert_eq!(panicked, Ok(Verdict::retry()));
}

#[test]
fn a_crash_limit_bounds_what_comes_back() {
    for (deliveries, is_last) in [(1, false), (2, false), (3, true), (4, true)] {
        let tag = Tag::new().delivered(deliveries);
        for given in [Verdict::retry(), Verdict::release(), Verdict::Ack] {
            let decision = ack_on_success().on_crash(given).crash_limit(3);
            let bounded = match is_last && given != Verdict::Ack {
                true => Verdict::Reject,
                false => given,
            };
            for error in crashes() {
                assert_eq!(decision.decide(&tag, &failed(error)), Ok(bounded));
            }
        }
        let decision = ack_on_success().crash_limit(3).boxed();
        for error in others() {
            assert_eq!(decision.decide(&tag, &failed(error)), Ok(Verdict::retry()));
        }
    }
}

#[test]
fn a_crash_limit_needs_a_count_for_crashes_alone() {
    let decision = ack_on_success().crash_limit(3);
    let [crash, ..] = crashes();
    let verdict = decision.decide(&Tag::new(), &failed(crash));
    assert_eq!(verdict, Err(Undecided::DeliveriesUnknown));
    let [other, ..] = others();
    assert_eq!(
        decision.decide(&Tag::new(), &failed(other)),
        Ok(Verdict::retry())
    );
}
