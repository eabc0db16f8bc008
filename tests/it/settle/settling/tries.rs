//! Attempts, their limits and the pauses between them.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use tower::{Layer, service_fn};
use tower_sentinel::{
    SentinelError, SentinelLayer, SettlePolicy, Verdict,
    outcome::OutcomeKind,
    settle::{SettleError, Settled},
};

use super::{End, SECOND, TRY, Try, always, capabilities, expected, failed, ms, scripted, settle};
use crate::support::{Refused, call, tag::Tag};

// === the product ===

const SCRIPTS: [&[Try]; 17] = [
    &[Try::Ok],
    &[Try::Slow],
    &[Try::Again, Try::Ok],
    &[Try::AgainAtOnce, Try::Slow],
    &[Try::Again, Try::Again, Try::Ok],
    &[Try::Again, Try::Again, Try::Again, Try::Slow],
    &[Try::Again, Try::Again, Try::Again, Try::Again, Try::Ok],
    &[Try::Again],
    &[Try::AgainAtOnce],
    &[Try::Last],
    &[Try::LastAtOnce],
    &[Try::Again, Try::Last],
    &[Try::Hang],
    &[Try::Again, Try::Hang],
    &[Try::PanicInSettle],
    &[Try::PanicInFuture],
    &[Try::Again, Try::PanicInSettle],
];

const VERDICTS: [Verdict; 7] = [
    Verdict::Ack,
    Verdict::retry(),
    Verdict::retry_after(SECOND),
    Verdict::release(),
    Verdict::release_after(SECOND),
    Verdict::Reject,
    Verdict::Abandon,
];

fn end_of(
    verdict: Verdict,
    answer: Result<Settled, SentinelError<Refused, SettleError<Refused>>>,
) -> End {
    match answer {
        Ok(settled) => {
            assert_eq!(settled.verdict, verdict);
            assert_eq!(settled.kind, OutcomeKind::Failed);
            assert!(settled.stopped);
            assert_eq!(settled.tag, None);
            End::Settled {
                charged: settled.charged,
            }
        }
        Err(SentinelError::PolicyPanicked(panic)) => match panic.message() {
            "in settle" => End::Panicked("in settle"),
            "in the future of settle" => End::Panicked("in the future of settle"),
            other => panic!("{other}"),
        },
        Err(SentinelError::Policy(error)) => {
            let unanswered = !matches!(verdict, Verdict::Abandon);
            assert_eq!(error.must_give_up_channel(), unanswered, "{error:?}");
            match error {
                SettleError::Unsupported { verdict: of } => {
                    assert_eq!(of, verdict);
                    End::Unsupported
                }
                SettleError::TimedOut { verdict: of, limit } => {
                    assert_eq!((of, limit), (verdict, 5 * SECOND));
                    End::TimedOut
                }
                SettleError::Failed {
                    verdict: of,
                    tries,
                    error: Refused,
                } => {
                    assert_eq!(of, verdict);
                    End::Failed { tries }
                }
                other => panic!("{other:?}"),
            }
        }
        Err(other) => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn each_capability_verdict_and_result_settles_as_documented() {
    let mut cells = 0;
    for capabilities in capabilities() {
        for verdict in VERDICTS {
            for script in SCRIPTS {
                let tag = scripted(script).can(capabilities);
                let policy = SettlePolicy::new(always(verdict));
                let mut sentinel = SentinelLayer::new(policy)
                    .layer(service_fn(async |_: Tag| Err::<(), _>(Refused)));
                let started = Instant::now();
                let answer = call(&mut sentinel, tag.clone()).await;
                let seen = (
                    tag.times(started),
                    started.elapsed(),
                    end_of(verdict, answer),
                );
                let cell = format!("[{capabilities:?} × {verdict} × {script:?}]");
                assert_eq!(seen, expected(script, verdict, capabilities), "{cell}");
                for told in tag.told() {
                    assert_eq!(told.verdict, verdict, "{cell}");
                    assert_eq!(told.reason.kind, OutcomeKind::Failed, "{cell}");
                    assert_eq!(told.reason.message.as_deref(), Some("refused"), "{cell}");
                    assert_eq!(told.reason.elapsed, Duration::ZERO, "{cell}");
                }
                cells += 1;
            }
        }
    }
    assert_eq!(cells, 32 * 7 * 17);
}

// === the knobs ===

#[test]
fn by_default_all_tries_fit_into_the_settle_timeout_of_a_sentinel() {
    let longest = SettlePolicy::default().longest();
    assert_eq!(longest, 20 * SECOND + ms(700));
    // The sentinel's default, which `policy.rs` tests.
    assert!(longest < 30 * SECOND);
}

#[tokio::test(start_paused = true)]
async fn the_longest_settlement_takes_as_long_as_is_said() {
    // Each try takes nearly its limit and fails.
    for (retries, longest) in [(0, 300), (1, 1_100), (3, 3_700), (5, 6_300)] {
        let policy = SettlePolicy::new(always(Verdict::Ack))
            .try_timeout(TRY + ms(1))
            .retries(retries)
            .retry_backoff(ms(500)..=SECOND);
        let tries = retries + 1;
        assert_eq!(policy.longest(), ms(longest) + ms(1) * tries);
        let tag = scripted(&[Try::Again]);
        let started = Instant::now();
        let error = settle(policy, &tag, failed()).await.unwrap_err();
        assert!(matches!(error, SettleError::Failed { tries: t, .. } if t == tries));
        assert_eq!(started.elapsed(), ms(longest));
        assert_eq!(tag.tries(), tries as usize);
    }
}

#[test]
fn the_longest_settlement_may_be_longer_than_the_clock_can_tell() {
    let policy = SettlePolicy::default();
    assert_eq!(
        policy.clone().try_timeout(Duration::MAX).longest(),
        Duration::MAX
    );
    let retries = policy.try_timeout(Duration::ZERO).retries(u32::MAX);
    // 100, 200, 400 and 800 ms, and the rest at 1 s.
    assert_eq!(retries.longest(), SECOND * (u32::MAX - 4) + ms(1_500));
}

#[tokio::test(start_paused = true)]
async fn pauses_double_up_to_their_upper_bound() {
    let policy = SettlePolicy::new(always(Verdict::Ack))
        .retries(5)
        .retry_backoff(ms(250)..=SECOND);
    let tag = scripted(&[Try::AgainAtOnce]);
    let started = Instant::now();
    settle(policy, &tag, failed()).await.unwrap_err();
    let times = [0, 250, 750, 1_750, 2_750, 3_750].map(ms);
    assert_eq!(tag.times(started), times);
}

#[tokio::test(start_paused = true)]
async fn the_limit_is_that_of_each_try() {
    // Together they take longer than the limit.
    let policy = SettlePolicy::new(always(Verdict::Ack)).try_timeout(TRY + ms(50));
    let tag = scripted(&[Try::Again, Try::Again, Try::Again, Try::Slow]);
    let started = Instant::now();
    settle(policy.clone(), &tag, failed()).await.unwrap();
    assert_eq!(started.elapsed(), 4 * TRY + ms(700));

    let tag = scripted(&[Try::Again, Try::Hang]);
    let started = Instant::now();
    let error = settle(policy, &tag, failed()).await.unwrap_err();
    assert!(matches!(error, SettleError::TimedOut { limit, .. } if limit == TRY + ms(50)));
    assert_eq!(started.elapsed(), TRY + ms(100) + TRY + ms(50));
}

#[tokio::test(start_paused = true)]
async fn a_result_that_comes_with_the_limit_is_a_result() {
    let policy = SettlePolicy::new(always(Verdict::Ack)).try_timeout(TRY);
    let tag = scripted(&[Try::Slow]);
    settle(policy, &tag, failed()).await.unwrap();
}

#[test]
#[should_panic(expected = "a backoff from 0 would never grow")]
fn pauses_of_zero_are_refused() {
    let _policy = SettlePolicy::default().retry_backoff(Duration::ZERO..=SECOND);
}

#[tokio::test(start_paused = true)]
async fn the_sentinels_limit_ends_a_settlement_between_two_tries() {
    let policy = SettlePolicy::new(always(Verdict::Ack)).retry_backoff(SECOND..=SECOND);
    let mut sentinel = SentinelLayer::new(policy)
        .settle_timeout(2 * SECOND)
        .layer(service_fn(async |_: Tag| Ok::<_, Refused>(())));
    let tag = scripted(&[Try::Again]);
    let started = Instant::now();
    let error = call(&mut sentinel, tag.clone()).await.unwrap_err();
    assert!(matches!(error, SentinelError::PolicyTimedOut(limit) if limit == 2 * SECOND));
    assert_eq!(started.elapsed(), 2 * SECOND);
    sleep(60 * SECOND).await;
    assert_eq!(tag.times(started), [Duration::ZERO, TRY + SECOND]);
}
