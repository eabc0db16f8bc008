//! Settling: the broker's verdicts, their number and time, and the events of a failure.

mod drain;
mod reasons;
mod refusals;
mod runtimes;
mod tries;

use std::{fmt, future::pending, iter::repeat, time::Duration};

use tokio::time::sleep;
use tower::ServiceExt;
use tower_sentinel::{
    Outcome, Report, SettlePolicy, Verdict,
    settle::{Capabilities, SettleError, Settled, Unsettled, decision::Decision},
};

use crate::support::{Refused, raise, tag::Tag};

const SECOND: Duration = Duration::from_secs(1);

/// Time in which an attempt begins, by default.
const BUDGET: Duration = Duration::from_secs(10);

/// Time that an attempt takes that is not ready at once.
const TRY: Duration = Duration::from_millis(300);

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

// === a tag with a script ===

/// Behaviour of one attempt.
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

/// End of a settlement.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Settled { charged: bool },
    Unsupported,
    TimedOut,
    Failed { tries: u32 },
    Panicked(&'static str),
}

/// Expected result of a cell by the documented rules: the time of each attempt, its end, and its result.
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
    let pauses = [100, 200, 400, 800].map(ms).into_iter();
    for (index, pause) in pauses.chain(repeat(SECOND)).enumerate() {
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
            Try::Again | Try::AgainAtOnce if now + pause <= BUDGET => {
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
    unreachable!("the budget ends");
}
