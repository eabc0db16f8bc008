//! Decisions, as tables: no broker, no clock, no runtime.

use std::{borrow::Borrow, collections::HashSet, panic::catch_unwind, sync::Arc, time::Duration};

use tower_sentinel::{
    DecisionExt, Outcome, Panic, Verdict, ack_on_success,
    outcome::{CancelReason, Cancelled, TimedOut},
    settle::{
        VerdictKind,
        decision::{BoxDecision, Decision, Undecided},
    },
};

use crate::support::tag::Tag;

const SECOND: Duration = Duration::from_secs(1);

/// The error of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    DependencyDown,
    BadJob,
    Other,
}

fn times(deliveries: u32) -> Tag {
    Tag::new().delivered(deliveries)
}

fn again(redelivered: bool) -> Tag {
    Tag::new().redelivered(redelivered)
}

fn unknown() -> Tag {
    Tag::new()
}

type End = Outcome<(), Fault>;

/// Outcome of a job, as the tables use it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Case {
    Completed,
    Failed(Fault),
    Panicked,
    TimedOut { stopped: bool },
    Cancelled { reason: CancelReason, stopped: bool },
}

impl Case {
    fn all() -> Vec<Case> {
        let mut all = vec![Case::Completed, Case::Panicked];
        all.extend([Fault::DependencyDown, Fault::BadJob, Fault::Other].map(Case::Failed));
        for stopped in [false, true] {
            all.push(Case::TimedOut { stopped });
            all.extend(
                [
                    CancelReason::CallerDropped,
                    CancelReason::Shutdown,
                    CancelReason::LeaseLost,
                    CancelReason::RuntimeGone,
                    CancelReason::DeliveryLimit,
                    CancelReason::Suspect,
                    CancelReason::Requested,
                ]
                .map(|reason| Case::Cancelled { reason, stopped }),
            );
        }
        all
    }

    fn outcome(self) -> End {
        match self {
            Case::Completed => Outcome::Completed(()),
            Case::Failed(fault) => Outcome::Failed(fault),
            Case::Panicked => Outcome::Panicked(Panic::new("index 7")),
            Case::TimedOut { stopped } => Outcome::TimedOut(TimedOut::new(SECOND, stopped)),
            Case::Cancelled { reason, stopped } => {
                Outcome::Cancelled(Cancelled::new(reason, stopped))
            }
        }
    }

    /// Returns the documented verdict of [`ack_on_success`].
    fn by_default(self) -> Verdict {
        match self {
            Case::Completed => Verdict::Ack,
            Case::Failed(_) | Case::Panicked | Case::TimedOut { .. } => Verdict::retry(),
            Case::Cancelled {
                reason: CancelReason::LeaseLost,
                ..
            } => Verdict::Abandon,
            Case::Cancelled {
                reason: CancelReason::DeliveryLimit | CancelReason::Suspect,
                ..
            } => Verdict::Reject,
            Case::Cancelled { .. } => Verdict::release(),
        }
    }

    fn is_retried(self) -> bool {
        self.by_default() == Verdict::retry()
    }
}

fn decide(
    decision: &impl Decision<Tag, (), Fault>,
    tag: impl Borrow<Tag>,
    case: Case,
) -> Result<Verdict, Undecided> {
    decision.decide(tag.borrow(), &case.outcome())
}

/// Verdict of an application for its errors.
fn classify(fault: &Fault) -> Verdict {
    match fault {
        Fault::DependencyDown => Verdict::release_after(SECOND),
        Fault::BadJob => Verdict::Reject,
        Fault::Other => Verdict::retry(),
    }
}

// === each decision by itself ===

#[test]
fn ack_on_success_acks_what_completed_and_gives_back_the_rest() {
    assert_eq!(Case::all().len(), 21);
    for case in Case::all() {
        let verdict = decide(&ack_on_success(), unknown(), case);
        assert_eq!(verdict, Ok(case.by_default()), "{case:?}");
    }
}

#[test]
fn a_delivery_limit_rejects_from_the_last_delivery_on() {
    let decision = ack_on_success().delivery_limit(5);
    for case in Case::all() {
        for deliveries in [0, 1, 4, 5, 6, u32::MAX] {
            let expected = match case.is_retried() && deliveries >= 5 {
                true => Verdict::Reject,
                false => case.by_default(),
            };
            let verdict = decide(&decision, times(deliveries), case);
            assert_eq!(verdict, Ok(expected), "{case:?} at delivery {deliveries}");
        }
    }
}

#[test]
fn a_delivery_limit_of_one_never_retries() {
    let decision = ack_on_success().delivery_limit(1);
    let verdict = decide(&decision, times(1), Case::Panicked);
    assert_eq!(verdict, Ok(Verdict::Reject));
}

#[test]
fn a_delivery_limit_bounds_a_delayed_retry_too() {
    let later = |_: &Tag, _: &End| Verdict::retry_after(SECOND);
    let decision = later.delivery_limit(2);
    let verdicts = [1, 2].map(|n| decide(&decision, times(n), Case::Panicked));
    assert_eq!(
        verdicts,
        [Ok(Verdict::retry_after(SECOND)), Ok(Verdict::Reject)]
    );
}

#[test]
#[should_panic(expected = "no job is delivered less than once")]
fn a_delivery_limit_of_zero_is_refused() {
    let _decision = ack_on_success().delivery_limit(0);
}

#[test]
fn a_count_that_is_unknown_is_an_error_and_not_a_zero() {
    let limit = ack_on_success().delivery_limit(5);
    let backoff = ack_on_success().backoff(SECOND..=SECOND);
    let once = ack_on_success().retry_once();
    for case in Case::all() {
        let expect = |error| match case.is_retried() {
            true => Err(error),
            // A verdict that does not depend on the count is decided without it.
            false => Ok(case.by_default()),
        };
        let deliveries = expect(Undecided::DeliveriesUnknown);
        assert_eq!(decide(&limit, unknown(), case), deliveries, "{case:?}");
        assert_eq!(decide(&backoff, unknown(), case), deliveries, "{case:?}");
        // The flag does not stand for a count, nor a count for the flag.
        let flagged = again(true);
        assert_eq!(decide(&limit, flagged, case), deliveries, "{case:?}");
        let redelivered = expect(Undecided::RedeliveredUnknown);
        assert_eq!(decide(&once, unknown(), case), redelivered, "{case:?}");
    }
}

#[test]
fn poison_on_panic_rejects_a_panic_and_nothing_else() {
    let decision = ack_on_success().poison_on_panic();
    for case in Case::all() {
        let expected = match case {
            Case::Panicked => Verdict::Reject,
            _ => case.by_default(),
        };
        let verdict = decide(&decision, unknown(), case);
        assert_eq!(verdict, Ok(expected), "{case:?}");
    }
}

#[test]
fn retry_once_rejects_what_was_redelivered() {
    let decision = ack_on_success().retry_once();
    for case in Case::all() {
        for redelivered in [false, true] {
            let expected = match case.is_retried() && redelivered {
                true => Verdict::Reject,
                false => case.by_default(),
            };
            let verdict = decide(&decision, again(redelivered), case);
            assert_eq!(verdict, Ok(expected), "{case:?}, {redelivered}");
        }
    }
}

#[test]
fn on_error_decides_by_the_error_and_on_nothing_else() {
    let decision = ack_on_success().on_error(classify);
    for case in Case::all() {
        let expected = match case {
            Case::Failed(Fault::DependencyDown) => Verdict::release_after(SECOND),
            Case::Failed(Fault::BadJob) => Verdict::Reject,
            Case::Failed(Fault::Other) => Verdict::retry(),
            _ => case.by_default(),
        };
        let verdict = decide(&decision, unknown(), case);
        assert_eq!(verdict, Ok(expected), "{case:?}");
    }
}

// === backoff ===

#[test]
fn a_backoff_is_a_part_of_a_ceiling_that_doubles() {
    let bounds = SECOND..=60 * SECOND;
    for (deliveries, ceiling) in [
        (0, 1),
        (1, 1),
        (2, 2),
        (3, 4),
        (4, 8),
        (5, 16),
        (6, 32),
        (7, 60),
        (8, 60),
        (1_000, 60),
        (u32::MAX, 60),
    ] {
        for (draw, part) in [(0.0, 0), (0.25, 250), (0.5, 500), (1.0, 1_000)] {
            let decision = ack_on_success().backoff(bounds.clone()).random(|| draw);
            for case in Case::all() {
                let expected = match case.is_retried() {
                    true => Verdict::retry_after(Duration::from_millis(ceiling * part)),
                    false => case.by_default(),
                };
                let verdict = decide(&decision, times(deliveries), case);
                assert_eq!(verdict, Ok(expected), "{case:?}, {deliveries}, {draw}");
            }
        }
    }
}

#[test]
fn a_backoff_stays_within_any_bounds() {
    let tiny = Duration::from_nanos(1);
    for (min, max) in [
        (tiny, tiny),
        (tiny, Duration::MAX),
        (SECOND / 10, SECOND),
        (Duration::MAX, Duration::MAX),
    ] {
        let ceiling = |deliveries| {
            let decision = ack_on_success().backoff(min..=max).random(|| 1.0);
            match decide(&decision, times(deliveries), Case::Panicked) {
                Ok(Verdict::Retry { after: Some(delay) }) => delay,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(ceiling(1), min);
        assert_eq!(ceiling(u32::MAX), max);
        for deliveries in 1..120 {
            let (this, next) = (ceiling(deliveries), ceiling(deliveries + 1));
            assert!(
                this <= next && next <= max,
                "{deliveries}: {this:?}, {next:?}"
            );
            // The sequence is in single precision, and in whole milliseconds.
            let error = this.mul_f64(1e-6) + SECOND / 500;
            let double = this.saturating_mul(2).min(max);
            assert!(next.abs_diff(double) <= error, "{this:?}, {next:?}");
        }
    }
}

#[test]
fn a_random_number_out_of_bounds_is_taken_for_the_nearest() {
    for (draw, expected) in [
        (f64::NAN, SECOND),
        (f64::NEG_INFINITY, Duration::ZERO),
        (-0.5, Duration::ZERO),
        (1.5, SECOND),
        (f64::INFINITY, SECOND),
    ] {
        let decision = ack_on_success().backoff(SECOND..=SECOND).random(|| draw);
        let verdict = decide(&decision, times(1), Case::Panicked);
        assert_eq!(verdict, Ok(Verdict::retry_after(expected)), "{draw}");
    }
}

#[test]
fn jitter_is_full_unless_told_otherwise() {
    let decision = ack_on_success().backoff(4 * SECOND..=60 * SECOND);
    let mut quarters = HashSet::new();
    let mut delays = HashSet::new();
    for _ in 0..400 {
        match decide(&decision, times(2), Case::Panicked) {
            Ok(Verdict::Retry { after: Some(delay) }) => {
                assert!(delay < 8 * SECOND, "{delay:?}");
                quarters.insert(delay.as_secs() / 2);
                delays.insert(delay);
            }
            other => panic!("{other:?}"),
        }
    }
    // From zero on, evenly: that a quarter stays empty has a chance of 0.75^400.
    assert_eq!(quarters.len(), 4);
    assert!(delays.len() > 300, "{} of 400", delays.len());
}

#[test]
fn a_backoff_draws_once_for_each_retry_and_for_nothing_else() {
    let drawn = std::cell::Cell::new(0);
    let decision = ack_on_success().backoff(SECOND..=SECOND).random(|| {
        drawn.set(drawn.get() + 1);
        0.5
    });
    let retried = Case::all().into_iter().filter(|case| case.is_retried());
    let expected = retried.count();
    for case in Case::all() {
        decide(&decision, times(1), case).unwrap();
    }
    assert_eq!(drawn.get(), expected);
}

#[test]
fn a_delay_that_is_given_is_kept() {
    let later = |_: &Tag, _: &End| Verdict::retry_after(7 * SECOND);
    let decision = later.backoff(SECOND..=SECOND);
    for tag in [times(3), unknown()] {
        let verdict = decide(&decision, tag, Case::Panicked);
        assert_eq!(verdict, Ok(Verdict::retry_after(7 * SECOND)));
    }
}

#[test]
fn bounds_that_make_no_backoff_are_refused() {
    for (min, max, why) in [
        (Duration::ZERO, SECOND, "a backoff from 0 would never grow"),
        (2 * SECOND, SECOND, "a backoff from 2s can't end at 1s"),
    ] {
        let payload = catch_unwind(|| ack_on_success().backoff(min..=max)).unwrap_err();
        assert_eq!(Panic::from_payload(payload).message(), why);
    }
}

// === composition ===

#[test]
fn a_whole_chain_decides_as_its_parts_say() {
    let decision = ack_on_success()
        .on_error(classify)
        .poison_on_panic()
        .backoff(SECOND..=4 * SECOND)
        .random(|| 1.0)
        .delivery_limit(4);
    for case in Case::all() {
        for (deliveries, retry) in [
            (1, Verdict::retry_after(SECOND)),
            (2, Verdict::retry_after(2 * SECOND)),
            (3, Verdict::retry_after(4 * SECOND)),
            (4, Verdict::Reject),
            (5, Verdict::Reject),
        ] {
            let expected = match case {
                Case::Completed => Verdict::Ack,
                Case::Failed(Fault::DependencyDown) => Verdict::release_after(SECOND),
                Case::Failed(Fault::BadJob) | Case::Panicked => Verdict::Reject,
                Case::Failed(Fault::Other) | Case::TimedOut { .. } => retry,
                Case::Cancelled { .. } => case.by_default(),
            };
            let verdict = decide(&decision, times(deliveries), case);
            assert_eq!(verdict, Ok(expected), "{case:?} at delivery {deliveries}");
        }
    }
}

/// Returns the verdicts of two decisions for a job that failed with [`Fault::Other`] at the 9th delivery.
fn of_a_failure(
    one: &impl Decision<Tag, (), Fault>,
    other: &impl Decision<Tag, (), Fault>,
) -> [Verdict; 2] {
    let (tag, case) = (times(9), Case::Failed(Fault::Other));
    [
        decide(one, &tag, case).unwrap(),
        decide(other, &tag, case).unwrap(),
    ]
}

#[test]
fn a_limit_bounds_only_what_stands_before_it() {
    let verdicts = of_a_failure(
        &ack_on_success().on_error(classify).delivery_limit(5),
        &ack_on_success().delivery_limit(5).on_error(classify),
    );
    assert_eq!(verdicts, [Verdict::Reject, Verdict::retry()]);
    let panicked = decide(
        &ack_on_success().delivery_limit(5).on_error(classify),
        times(9),
        Case::Panicked,
    );
    assert_eq!(panicked, Ok(Verdict::Reject));
}

#[test]
fn a_backoff_delays_only_what_stands_before_it() {
    let bounds = SECOND..=SECOND;
    let before = ack_on_success().backoff(bounds.clone()).random(|| 1.0);
    let after = ack_on_success().on_error(classify).backoff(bounds);
    let verdicts = of_a_failure(&after.random(|| 1.0), &before.on_error(classify));
    assert_eq!(verdicts, [Verdict::retry_after(SECOND), Verdict::retry()]);
}

#[test]
fn the_order_of_what_does_not_meet_makes_no_difference() {
    let bounds = SECOND..=4 * SECOND;
    let early = ack_on_success().backoff(bounds.clone()).random(|| 0.5);
    let late = ack_on_success().delivery_limit(3).backoff(bounds);
    let (early, late) = (early.delivery_limit(3), late.random(|| 0.5));
    let one = ack_on_success().on_error(classify).poison_on_panic();
    let other = ack_on_success().poison_on_panic().on_error(classify);
    for case in Case::all() {
        for tag in [1, 2, 3, 4].map(times) {
            assert_eq!(decide(&early, &tag, case), decide(&late, &tag, case));
            assert_eq!(decide(&one, &tag, case), decide(&other, &tag, case));
        }
    }
}

#[test]
fn what_is_replaced_is_not_asked_for() {
    let unasked = |_: &Tag, _: &End| -> Verdict { panic!("asked") };
    let decision = unasked.poison_on_panic().on_error(classify);
    for case in [Case::Panicked, Case::Failed(Fault::BadJob)] {
        let verdict = decide(&decision, unknown(), case);
        assert_eq!(verdict, Ok(Verdict::Reject));
    }
    // An unknown count does not matter either to a verdict that is replaced.
    let decision = ack_on_success().delivery_limit(5).poison_on_panic();
    let verdict = decide(&decision, unknown(), Case::Panicked);
    assert_eq!(verdict, Ok(Verdict::Reject));
}

// === other people's decisions ===

/// A decision that is its own type.
#[derive(Debug)]
struct Never;

impl<Tag, T, E> Decision<Tag, T, E> for Never {
    fn decide(&self, _: &Tag, _: &Outcome<T, E>) -> Result<Verdict, Undecided> {
        Err(Undecided::DeliveriesUnknown)
    }
}

#[test]
fn a_function_a_closure_and_a_type_can_decide() {
    fn function(_: &Tag, _: &End) -> Verdict {
        Verdict::Reject
    }
    let verdict = Verdict::release();
    let closure = move |_: &Tag, _: &End| verdict;
    let (tag, case) = (times(1), Case::Completed);
    assert_eq!(decide(&function, &tag, case), Ok(Verdict::Reject));
    assert_eq!(decide(&closure, &tag, case), Ok(Verdict::release()));
    let undecided = Err(Undecided::DeliveriesUnknown);
    assert_eq!(decide(&Never, &tag, case), undecided);
    // An undecided verdict stays so through each bound.
    let bounded = Never
        .backoff(SECOND..=SECOND)
        .retry_once()
        .delivery_limit(1);
    assert_eq!(decide(&bounded, &tag, case), undecided);
}

#[test]
fn a_decision_prints_what_it_is_made_of() {
    let decision = ack_on_success()
        .on_error(classify)
        .poison_on_panic()
        .backoff(SECOND..=SECOND)
        .random(|| 1.0)
        .retry_once()
        .delivery_limit(3);
    let printed = format!("{decision:?}");
    for part in [
        "AckOnSuccess",
        "OnError",
        "classify",
        "PoisonOnPanic",
        "Backoff",
        "RetryOnce",
        "limit: 3",
    ] {
        assert!(printed.contains(part), "{printed}");
    }
}

#[test]
fn a_decision_behind_a_pointer_decides_as_it_does() {
    let strict = Arc::new(ack_on_success().poison_on_panic().delivery_limit(3));
    let boxed = ack_on_success().poison_on_panic().delivery_limit(3).boxed();
    let closure = |_: &Tag, _: &End| Verdict::Abandon;
    let nested = Arc::new(BoxDecision::new(closure)).poison_on_panic();
    for case in Case::all() {
        for tag in [times(1), times(3), unknown()] {
            let expected = strict.as_ref().decide(&tag, &case.outcome());
            assert_eq!(strict.decide(&tag, &case.outcome()), expected, "{case:?}");
            assert_eq!(
                boxed.clone().decide(&tag, &case.outcome()),
                expected,
                "{case:?}"
            );
            let expected = match case {
                Case::Panicked => Verdict::Reject,
                _ => Verdict::Abandon,
            };
            assert_eq!(nested.decide(&tag, &case.outcome()), Ok(expected));
        }
    }
    // Each kind has one name, with any delay.
    let verdicts = [Verdict::retry(), Verdict::retry_after(SECOND)];
    assert!(verdicts.iter().all(|it| it.kind() == VerdictKind::Retry));
    assert_eq!(VerdictKind::from(Verdict::release()).to_string(), "release");
}
