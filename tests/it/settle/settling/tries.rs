//! Attempts, their limits and the pauses between them.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use tower::{Layer, service_fn};
use tower_sentinel::{
    SentinelError, SentinelLayer, SettlePolicy, Verdict,
    outcome::OutcomeKind,
    settle::{Capabilities, SettleError, Settled, Unsettled},
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

#[tokio::test(start_paused = true)]
async fn by_default_the_longest_settlement_fits_into_the_sentinel_and_into_a_drain() {
    let longest = SettlePolicy::default().longest();
    assert_eq!(longest, 15 * SECOND);
    // Half a minute is the sentinel's limit, which `policy.rs` tests. The last try begins at the very end of
    // the budget, and hangs.
    let policy = SettlePolicy::new(always(Verdict::Ack)).retry_backoff(5 * SECOND..=5 * SECOND);
    let mut sentinel =
        SentinelLayer::new(policy).layer(service_fn(async |_: Tag| Ok::<_, Refused>(())));
    let tag = scripted(&[Try::AgainAtOnce, Try::AgainAtOnce, Try::Hang]);
    let started = Instant::now();
    let error = call(&mut sentinel, tag.clone()).await.unwrap_err();
    assert!(matches!(
        error,
        SentinelError::Policy(SettleError::TimedOut { .. })
    ));
    assert_eq!(started.elapsed(), longest);
}

#[tokio::test(start_paused = true)]
async fn each_try_begins_within_the_budget_and_there_is_one_without_a_budget() {
    // Each try takes nearly its limit and fails.
    for (budget, begins) in [
        (0, &[0_u64] as &[u64]),
        (799, &[0]),
        (800, &[0, 800]),
        (2_099, &[0, 800]),
        (2_100, &[0, 800, 2_100]),
        (3_400, &[0, 800, 2_100, 3_400]),
    ] {
        let policy = SettlePolicy::new(always(Verdict::Ack))
            .try_timeout(TRY + ms(1))
            .retry_budget(ms(budget))
            .retry_backoff(ms(500)..=SECOND);
        let longest = policy.longest();
        assert_eq!(longest, ms(budget) + TRY + ms(1));
        let tag = scripted(&[Try::Again]);
        let started = Instant::now();
        let error = settle(policy, &tag, failed()).await.unwrap_err();
        let count = begins.len() as u32;
        assert!(matches!(error, SettleError::Failed { tries, .. } if tries == count));
        let begins: Vec<_> = begins.iter().copied().map(ms).collect();
        assert_eq!(tag.times(started), begins);
        assert!(started.elapsed() <= longest);
    }
}

#[tokio::test(start_paused = true)]
async fn the_budget_outlasts_an_election_of_nine_seconds() {
    let tag = Tag::new().can(Capabilities::none());
    let elected = Instant::now() + 9 * SECOND;
    let tag = tag.delivered(1).settling(move |tag| async move {
        match Instant::now() < elected {
            true => Err(Unsettled::again(tag, Refused)),
            false => Ok(()),
        }
    });
    settle(SettlePolicy::default(), &tag, failed())
        .await
        .unwrap();
    // Not a storm of tries.
    assert!(tag.tries() < 15, "{}", tag.tries());
}

#[test]
fn the_longest_settlement_may_be_longer_than_the_clock_can_tell() {
    let policy = SettlePolicy::default();
    for endless in [
        policy.clone().try_timeout(Duration::MAX),
        policy.retry_budget(Duration::MAX),
    ] {
        assert_eq!(endless.longest(), Duration::MAX);
    }
}

#[tokio::test(start_paused = true)]
async fn pauses_double_up_to_their_upper_bound() {
    let policy = SettlePolicy::new(always(Verdict::Ack))
        .retry_budget(4 * SECOND)
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
