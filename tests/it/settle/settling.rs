//! Settling: what the broker is told, how often and when, and what is said if it isn't.

use std::{error::Error, fmt, future::pending, mem, time::Duration};

use futures_util::FutureExt;
use tokio::{
    runtime::{Builder, Handle},
    task::yield_now,
    time::{Instant, advance, sleep},
};
use tokio_util::sync::CancellationToken;
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_sentinel::{
    DecisionExt, Outcome, Panic, Report, SentinelError, SentinelLayer, SettlePolicy, Verdict,
    ack_on_success,
    outcome::{CancelReason, Cancelled, OutcomeKind, TimedOut},
    settle::{
        Capabilities, Settle, SettleError, SettleFuture, Settled, Unsettled,
        decision::{Decision, Undecided},
    },
};

use crate::support::{
    Bomb, Refused, block_on, call, current_thread, idle,
    log::Log,
    paused_time, raise,
    tag::{Tag, Told},
};

const SECOND: Duration = Duration::from_secs(1);
/// How long a try takes that is not ready at once.
const TRY: Duration = Duration::from_millis(300);

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

// === a tag with a script ===

/// What one try does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Try {
    /// Succeeds when it is first polled.
    Ok,
    /// Succeeds after [`TRY`].
    Slow,
    /// Fails after [`TRY`], and gives the tag back.
    Again,
    /// Fails when it is first polled, and gives the tag back.
    AgainAtOnce,
    /// Fails after [`TRY`], and uses the tag up.
    Last,
    /// Fails when it is first polled, and uses the tag up.
    LastAtOnce,
    /// Never ends.
    Hang,
    PanicInSettle,
    PanicInFuture,
}

/// Returns a tag that does its tries in turn, the last of them for ever.
fn scripted(script: &'static [Try]) -> Tag {
    let tag = Tag::new().can(Capabilities::none().free_release());
    tag.delivered(1).settling(move |tag| {
        let step = script[(tag.tries() - 1).min(script.len() - 1)];
        if step == Try::PanicInSettle {
            raise("in settle");
        }
        async move {
            if matches!(step, Try::Slow | Try::Again | Try::Last) {
                sleep(TRY).await;
            }
            match step {
                Try::Ok | Try::Slow => Ok(()),
                Try::Again | Try::AgainAtOnce => Err(Unsettled::again(tag, Refused)),
                Try::Last | Try::LastAtOnce => Err(Unsettled::last(Refused)),
                Try::Hang => pending().await,
                Try::PanicInSettle => unreachable!(),
                Try::PanicInFuture => raise("in the future of settle"),
            }
        }
    })
}

type Answer = Result<Settled, SettleError<Refused>>;

/// Settles without a sentinel.
async fn settle<D, T, E>(policy: SettlePolicy<D>, tag: &Tag, outcome: Outcome<T, E>) -> Answer
where
    D: Decision<Tag, T, E>,
    E: fmt::Display,
{
    let report = Report::new(tag.clone(), outcome, SECOND);
    policy.oneshot(report).await
}

fn always(verdict: Verdict) -> impl Fn(&Tag, &Outcome<(), Refused>) -> Verdict + Clone {
    move |_, _| verdict
}

fn failed() -> Outcome<(), Refused> {
    Outcome::Failed(Refused)
}

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

fn capabilities() -> impl Iterator<Item = Capabilities> {
    (0..32).map(|bits: u8| {
        let mut capabilities = Capabilities::none();
        for (bit, add) in [
            (1, Capabilities::free_release as fn(_) -> _),
            (2, Capabilities::delay),
            (4, Capabilities::dead_letter),
            (8, Capabilities::keep_alive),
            (16, Capabilities::free_delayed_release),
        ] {
            if bits & bit != 0 {
                capabilities = add(capabilities);
            }
        }
        capabilities
    })
}

/// How a settlement ends.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Settled { charged: bool },
    Unsupported,
    TimedOut,
    Failed { tries: u32 },
    Panicked(&'static str),
}

/// What the documented rules say of a cell: when each try is made, when it is over, and how.
fn expected(
    script: &[Try],
    verdict: Verdict,
    capabilities: Capabilities,
) -> (Vec<Duration>, Duration, End) {
    let delayed =
        verdict == Verdict::retry_after(SECOND) || verdict == Verdict::release_after(SECOND);
    if delayed && !capabilities.has_delay() {
        return (Vec::new(), Duration::ZERO, End::Unsupported);
    }
    let mut now = Duration::ZERO;
    let mut times = Vec::new();
    for (index, pause) in [ms(100), ms(200), ms(400), Duration::ZERO]
        .into_iter()
        .enumerate()
    {
        let step = script[index.min(script.len() - 1)];
        times.push(now);
        now += match step {
            Try::Slow | Try::Again | Try::Last => TRY,
            Try::Hang => 5 * SECOND,
            _ => Duration::ZERO,
        };
        let tries = index as u32 + 1;
        let end = match step {
            Try::Ok | Try::Slow => End::Settled {
                charged: match verdict {
                    Verdict::Retry { .. } => true,
                    // One that is free is so with a delay, too.
                    Verdict::Release { after: None } => !capabilities.release_is_free(),
                    Verdict::Release { .. } => capabilities != capabilities.free_delayed_release(),
                    _ => false,
                },
            },
            Try::Again | Try::AgainAtOnce if tries < 4 => {
                now += pause;
                continue;
            }
            Try::Again | Try::AgainAtOnce | Try::Last | Try::LastAtOnce => End::Failed { tries },
            Try::Hang => End::TimedOut,
            Try::PanicInSettle => End::Panicked("in settle"),
            Try::PanicInFuture => End::Panicked("in the future of settle"),
        };
        return (times, now, end);
    }
    unreachable!("the fourth try is the last");
}

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

// === refusals ===

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
    // What does not depend on the count is settled.
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
            "the broker was not told \"ack\" in 1 try: refused",
        ),
        (
            &[Try::Again],
            "the broker was not told \"ack\" in 4 tries: refused",
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
        "the broker was not told \"ack\" within 5s"
    );
    assert!(error.source().is_none());
}

// === what the broker and the caller are told ===

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

// === under cancellation and drain ===

#[tokio::test(start_paused = true)]
async fn a_settlement_goes_on_though_a_drain_is_under_way() {
    let shutdown = CancellationToken::new();
    let sentinel = SentinelLayer::new(SettlePolicy::default())
        .shutdown(shutdown.clone())
        .layer(service_fn(async |_: Tag| {
            pending::<Result<(), Refused>>().await
        }));
    let tag = scripted(&[Try::Again, Try::Again, Try::Slow]);
    let response = tokio::spawn(sentinel.oneshot(tag.clone()));
    sleep(SECOND).await;
    assert_eq!(tag.tries(), 0);
    shutdown.cancel();
    let started = Instant::now();
    let settled = response.await.unwrap().unwrap();
    assert_eq!(settled.verdict, Verdict::release());
    assert!(!settled.charged);
    assert_eq!(started.elapsed(), 3 * TRY + ms(300));
    assert_eq!(tag.tries(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_drain_that_begins_while_a_job_settles_does_not_cut_it_short() {
    let shutdown = CancellationToken::new();
    let sentinel = SentinelLayer::new(SettlePolicy::default())
        .shutdown(shutdown.clone())
        .layer(service_fn(async |_: Tag| Ok::<_, Refused>(())));
    let tag = scripted(&[Try::Again, Try::Slow]);
    let started = Instant::now();
    let response = tokio::spawn(sentinel.oneshot(tag.clone()));
    // In the first try; the second is in the drain.
    sleep(TRY / 2).await;
    assert_eq!(tag.tries(), 1);
    shutdown.cancel();
    let settled = response.await.unwrap().unwrap();
    assert_eq!(settled.verdict, Verdict::Ack);
    assert_eq!(started.elapsed(), 2 * TRY + ms(100));
}

#[tokio::test(start_paused = true)]
async fn a_settlement_goes_on_though_the_caller_drops() {
    // While the job runs, in a try, and in a pause.
    for (dropped, ends, verdict) in [
        (ms(500), 500 + 300 + 100 + 300, Verdict::release()),
        (ms(1_100), 1_000 + 300 + 100 + 300, Verdict::Ack),
        (ms(1_350), 1_000 + 300 + 100 + 300, Verdict::Ack),
    ] {
        let sentinel =
            SentinelLayer::new(SettlePolicy::default()).layer(service_fn(async |_: Tag| {
                sleep(SECOND).await;
                Ok::<_, Refused>(())
            }));
        let tag = scripted(&[Try::Again, Try::Slow]);
        let started = Instant::now();
        let response = tokio::spawn(sentinel.oneshot(tag.clone()));
        sleep(dropped).await;
        response.abort();
        assert!(response.await.unwrap_err().is_cancelled());
        idle(&Handle::current()).await;
        let told = tag.told();
        assert!(
            told.iter().all(|told| told.verdict == verdict),
            "{dropped:?}"
        );
        assert_eq!(
            tag.times(started).last(),
            Some(&(ms(ends) - TRY)),
            "{dropped:?}"
        );
        assert_eq!(told.len(), 2);
    }
}

#[tokio::test(start_paused = true)]
async fn a_job_whose_lease_is_lost_is_abandoned_through_its_tag() {
    let mut sentinel =
        SentinelLayer::new(SettlePolicy::default()).layer(service_fn(async |_: Tag| {
            tower_sentinel::cancel::Cancellation::current().cancel(CancelReason::LeaseLost);
            pending::<Result<(), Refused>>().await
        }));
    let tag = scripted(&[Try::Ok]);
    let settled = call(&mut sentinel, tag.clone()).await.unwrap();
    assert_eq!(settled.verdict, Verdict::Abandon);
    assert!(!settled.charged);
    // The tag is told of it, and sends nothing.
    assert_eq!(tag.told()[0].verdict, Verdict::Abandon);
    assert_eq!(tag.tries(), 1);
}

// === what it costs ===

#[test]
fn a_settlement_that_is_ready_at_once_needs_no_timer() {
    // A runtime without timers, where to make one panics.
    let runtime = Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let tag = scripted(&[Try::Ok]);
        let done = Outcome::<_, Refused>::Completed(());
        let report = Report::new(tag.clone(), done, SECOND);
        let settled = SettlePolicy::default().call(report).now_or_never();
        assert_eq!(settled.unwrap().unwrap().verdict, Verdict::Ack);
        let last = scripted(&[Try::LastAtOnce]);
        settle(SettlePolicy::default(), &last, failed())
            .await
            .unwrap_err();
    });
}

#[test]
fn the_tag_is_settled_in_the_call() {
    let tag = scripted(&[Try::Ok]);
    let report = Report::new(tag.clone(), failed(), SECOND);
    let future = SettlePolicy::default().call(report);
    assert_eq!(tag.tries(), 1);
    assert!(
        format!("{future:?}").contains("verdict: Retry"),
        "{future:?}"
    );
}

#[test]
fn a_settlement_adds_little_to_the_future_of_its_tag() {
    type Boxed = <Tag as Settle>::Future;
    let added = mem::size_of::<SettleFuture<u8, Boxed, Refused>>() - mem::size_of::<Boxed>();
    // Its own span is 40 of them.
    let measured = if cfg!(feature = "metrics") { 24 } else { 0 };
    assert!(added <= 200 + measured, "{added} bytes");
    // And the outcome, which is dropped last.
    type Done = Outcome<(), Refused>;
    type Keeping = SettleFuture<u8, Boxed, Refused, Done>;
    let added = mem::size_of::<Keeping>() - mem::size_of::<SettleFuture<u8, Boxed, Refused>>();
    assert!(added <= mem::size_of::<Done>(), "{added} bytes");
}

/// Returns a tag that lets itself be waited for without a timer, and fails so often.
fn timerless(fails: usize) -> Tag {
    Tag::new().settling(move |tag| async move {
        yield_now().await;
        match tag.tries() > fails {
            true => Ok(()),
            false => Err(Unsettled::again(tag, Refused)),
        }
    })
}

#[test]
fn a_settlement_outside_of_a_runtime_has_no_limit_and_no_pause() {
    for (fails, settles) in [(3, true), (4, false)] {
        let report = Report::new(timerless(fails), failed(), SECOND);
        let answer = block_on(SettlePolicy::default().oneshot(report));
        assert_eq!(answer.is_ok(), settles);
    }
}

#[test]
fn a_settlement_may_be_polled_outside_of_the_runtime_it_began_in() {
    let runtime = paused_time();
    for script in [&[Try::AgainAtOnce, Try::Ok] as &'static [Try], &[Try::Hang]] {
        let tag = scripted(script);
        let report = Report::new(tag.clone(), failed(), SECOND);
        let mut settlement = Box::pin(SettlePolicy::default().oneshot(report));
        runtime.block_on(async {
            assert!(settlement.as_mut().now_or_never().is_none());
        });
        // The timer that was made is still waited for.
        assert!(settlement.as_mut().now_or_never().is_none());
        assert_eq!(tag.tries(), 1);
        runtime.block_on(advance(10 * SECOND));
        let answer = block_on(settlement);
        assert_eq!(answer.is_ok(), script.contains(&Try::Ok));
        assert_eq!(tag.tries(), script.len());
    }
}

#[test]
fn a_settlement_goes_on_though_the_runtime_of_its_timer_ends() {
    for script in [&[Try::AgainAtOnce, Try::Ok] as &'static [Try], &[Try::Hang]] {
        let tag = scripted(script);
        let report = Report::new(tag.clone(), failed(), SECOND);
        let mut settlement = Box::pin(SettlePolicy::default().oneshot(report));
        let first = paused_time();
        first.block_on(async {
            assert!(settlement.as_mut().now_or_never().is_none());
        });
        drop(first);
        let answer = paused_time().block_on(settlement);
        assert_eq!(answer.is_ok(), script.contains(&Try::Ok), "{answer:?}");
        assert_eq!(tag.tries(), script.len());
    }
}

#[test]
fn g1_a_job_is_settled_though_its_callers_runtime_ends_while_it_settles() {
    let jobs = Builder::new_multi_thread().enable_all().build().unwrap();
    for drops in [false, true] {
        let tag = scripted(&[Try::AgainAtOnce, Try::Ok]);
        let (settling, tried) = (tag.clone(), tag.clone());
        let layer = SentinelLayer::new(SettlePolicy::default()).runtime(jobs.handle().clone());
        let sentinel = layer.layer(service_fn(async |_: Tag| Ok::<_, Refused>(())));
        let callers = current_thread();
        let mut response = Box::pin(sentinel.oneshot(settling));
        callers.block_on(async {
            while tried.tries() == 0 {
                assert!(response.as_mut().now_or_never().is_none());
                sleep(ms(1)).await;
            }
        });
        if drops {
            callers.block_on(async {
                tokio::spawn(response);
                yield_now().await;
            });
            drop(callers);
            jobs.block_on(idle(jobs.handle()));
        } else {
            drop(callers);
            assert!(block_on(&mut response).is_ok());
        }
        assert_eq!(tag.tries(), 2, "drops: {drops}");
    }
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
                "a settlement failed verdict=retry tries=1 again=true error=refused",
                "a settlement failed verdict=retry tries=2 again=true error=refused",
            ],
        ),
        (
            &[Try::Last],
            &["a settlement failed verdict=retry tries=1 again=false error=refused"],
        ),
        (
            &[Try::Hang],
            &["a settlement took too long verdict=retry tries=1 limit=5s"],
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
    assert!(printed.contains("retries: 3"), "{printed}");
}
