//! [`SettlePolicy`]: the [`AckPolicy`](crate::AckPolicy) that decides on a verdict and settles with it.

use std::{
    any::type_name,
    fmt,
    ops::RangeInclusive,
    task::{Context, Poll},
    time::Duration,
};

use tower_service::Service;
use tracing::Span;

use crate::{
    backoff::Delays,
    outcome::{CancelReason, Outcome, Remains, guard, print},
    policy::Report,
    settle::{
        Settle,
        attempts::{Attempts, SettleFuture, State},
        decision::{AckOnSuccess, Decision, Undecided},
        error::SettleError,
        events::{self, Decided, End, Fate},
        reason::Settled,
        spans::settle_span,
        verdict::{Verdict, VerdictKind},
    },
    telemetry::metrics::{Labels, SettleInstruments},
};

/// Default time limit of one try to settle.
pub(crate) const TRY_TIMEOUT: Duration = Duration::from_secs(5);

/// An [`AckPolicy`](crate::AckPolicy) made of a [`Decision`] and a tag that can [`Settle`].
///
/// The decision turns an outcome into a [`Verdict`], and the tag settles the delivery with it. The
/// response of the policy is [`Settled`].
///
/// # Settle under trouble
///
/// - A try that takes longer than [`try_timeout`](Self::try_timeout) is dropped, together with its tag.
///   The settlement has failed; it may or may not have reached the broker.
/// - A try that fails is repeated if it gave its tag back
///   ([`Unsettled::tag`](crate::settle::Unsettled::tag)), each time after a longer pause, while the
///   [`retry_budget`](Self::retry_budget) lasts. Its 10 s outlast the election of a leader in a cluster.
/// - Otherwise the tag can't be settled any more. The channel must be given up, so that the broker
///   redelivers; [`SettleError::must_give_up_channel`] says so.
///
/// By default a settlement takes at most 15 s ([`longest`](Self::longest)): the budget, and the limit of a
/// try that begins at its end. That fits into the sentinel's
/// [`settle_timeout`](crate::SentinelLayer::settle_timeout) of 30 s, and with it into the consumer's
/// [`stop_timeout`](crate::Consumer::stop_timeout) of 40 s. If you change one, check the others: the sentinel
/// drops a settlement at its limit, also between two tries.
///
/// # Contract
///
/// - *Readiness*: always ready.
/// - *Calls*: the tag is settled with one verdict, at once and in `call`. It is not settled at all if
///   there is no verdict ([`SettleError::Undecided`]) or the broker can't carry the verdict out
///   ([`SettleError::Unsupported`]); no other verdict takes its place. The tag carries out
///   [`Verdict::Abandon`] like any other verdict.
/// - *Cancellation*: the policy ignores the job's [`Cancellation`](crate::cancel::Cancellation) and any
///   shutdown. A settlement goes on during a drain.
/// - *Panics*: the sentinel catches panics in the decision and in the tag. The delivery is settled even if
///   the destructor of the job's value or error panics, or the error panics when it is printed.
/// - *Destructors*: the job's value, error or panic payload is dropped after the settlement. That happens
///   with the future, or in a task on the [`runtime`](crate::SentinelLayer::runtime) of the jobs if the
///   sentinel has one. In both cases a destructor that blocks does not delay its own settlement.
/// - *Events*: one for each job that has not completed, with the text of its error, the verdict and the
///   count of deliveries (see [`ProcessSpan`](crate::settle::ProcessSpan#events)), and a `warn!` for each
///   try that failed, with its verdict. None for a success.
/// - *Runtime*: a settlement may move to another tokio runtime, also when its own runtime ends. Its limits
///   and pauses keep their deadlines. Outside of any runtime, or in one without timers, a try has no limit
///   but the sentinel's, a pause that has begun ends, and a try that fails is not repeated.
///
/// A settlement that is ready at its first poll makes no timer and no allocation, apart from the message
/// of a [`Reason`](crate::settle::Reason). A completed job has no message.
///
/// # Examples
///
/// ```
/// use std::{convert::Infallible, future::{Ready, ready}, io, time::Duration};
/// use tower::{Service, ServiceBuilder, ServiceExt};
/// use tower_sentinel::{
///     DecisionExt, Job, SentinelLayer, SettlePolicy, Verdict, ack_on_success,
///     settle::{Capabilities, Lease, Reason, Settle, Unsettled},
/// };
///
/// /// Handle that a broker's client hands out with a delivery.
/// #[derive(Clone, Debug)]
/// struct Acker { deliveries: u32 }
///
/// impl Settle for Acker {
///     type Error = Infallible;
///     type Future = Ready<Result<(), Unsettled<Self, Infallible>>>;
///
///     fn settle(self, _: Verdict, _: Reason) -> Self::Future { ready(Ok(())) }
///     async fn keep_alive(&self) -> Result<Lease, Infallible> { Ok(Lease::Held) }
///     fn deliveries(&self) -> Option<u32> { Some(self.deliveries) }
///     fn capabilities(&self) -> Capabilities { Capabilities::none().free_release() }
/// }
///
/// struct Delivery { acker: Acker, body: &'static str }
///
/// impl Job for Delivery {
///     type Tag = Acker;
///     fn tag(&self) -> Acker { self.acker.clone() }
/// }
///
/// async fn process(delivery: Delivery) -> Result<u32, std::num::ParseIntError> {
///     delivery.body.parse()
/// }
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() {
/// let policy = SettlePolicy::new(ack_on_success().delivery_limit(3));
/// let mut handler = ServiceBuilder::new()
///     .concurrency_limit(64)
///     .layer(SentinelLayer::new(policy).timeout(Duration::from_secs(30)))
///     .service_fn(process);
///
/// for (deliveries, body, verdict) in [
///     (1, "42", Verdict::Ack),
///     (1, "not a number", Verdict::retry()),
///     (3, "not a number", Verdict::Reject),
/// ] {
///     let job = Delivery { acker: Acker { deliveries }, body };
///     let settled = handler.ready().await.unwrap().call(job).await.unwrap();
///     assert_eq!(settled.verdict, verdict);
///     assert_eq!(settled.charged, verdict == Verdict::retry());
/// }
/// # }
/// ```
///
/// The times of a settlement, for a consumer that is to give up sooner:
///
/// ```
/// use std::time::Duration;
/// use tower_sentinel::{SettlePolicy, ack_on_success};
///
/// let policy = SettlePolicy::new(ack_on_success())
///     .try_timeout(Duration::from_secs(2))
///     .retry_budget(Duration::from_secs(5))
///     .retry_backoff(Duration::from_millis(50)..=Duration::from_secs(1));
/// assert_eq!(policy.longest(), Duration::from_secs(7));
/// ```
#[derive(Clone)]
pub struct SettlePolicy<D = AckOnSuccess> {
    decision: D,
    attempts: Attempts,
    pub(crate) instruments: SettleInstruments,
}

impl<D> SettlePolicy<D> {
    /// Creates a policy that settles with the verdicts of `decision`.
    pub fn new(decision: D) -> Self {
        let ms = Duration::from_millis;
        Self {
            decision,
            attempts: Attempts {
                limit: TRY_TIMEOUT,
                budget: Duration::from_secs(10),
                pauses: Delays::new(ms(100)..=ms(1_000)),
            },
            instruments: SettleInstruments::new(Labels::default(), VerdictKind::NAMES),
        }
    }

    /// Sets the time limit of one try to settle; 5 s by default.
    ///
    /// The time counts from the first poll of the try that is not ready. With `Duration::MAX` only the
    /// sentinel's limit applies.
    pub fn try_timeout(mut self, limit: Duration) -> Self {
        self.attempts.limit = limit;
        self
    }

    /// Sets the time in which a failed settlement is tried again; 10 s by default.
    ///
    /// It counts from the first try. Each further try begins within it, so the last one may end up to
    /// [`try_timeout`](Self::try_timeout) later. With `Duration::ZERO` there is only one try.
    ///
    /// Only a tag that [comes back](crate::settle::Unsettled::tag) from a try can be settled again. A failure
    /// that is final or [moot](crate::settle::Unsettled::moot) ends the settlement at once.
    pub fn retry_budget(mut self, budget: Duration) -> Self {
        self.attempts.budget = budget;
        self
    }

    /// Sets the pauses between two tries; from 100 ms to 1 s by default.
    ///
    /// The first pause is the lower bound, each further one is twice as long, and none is longer than the
    /// upper bound. They have no jitter: jobs end at different times anyway, and the concurrency limit
    /// bounds how many settle at once.
    ///
    /// # Panics
    ///
    /// Panics if the lower bound is zero, since a pause of zero never grows, or above the upper bound.
    #[track_caller]
    pub fn retry_backoff(mut self, pauses: RangeInclusive<Duration>) -> Self {
        self.attempts.pauses = Delays::new(pauses);
        self
    }

    /// Returns the longest time that a settlement can take: its [`retry_budget`](Self::retry_budget) and one
    /// [`try_timeout`](Self::try_timeout).
    ///
    /// The sentinel's [`settle_timeout`](crate::SentinelLayer::settle_timeout) should not be shorter.
    ///
    /// ```
    /// use std::time::Duration;
    /// use tower_sentinel::{SentinelLayer, SettlePolicy, ack_on_success};
    ///
    /// let policy = SettlePolicy::new(ack_on_success());
    /// assert_eq!(policy.longest(), Duration::from_secs(10 + 5));
    ///
    /// let patient = policy.retry_budget(Duration::from_secs(60));
    /// let limit = patient.longest() + Duration::from_secs(1);
    /// let layer = SentinelLayer::new(patient).settle_timeout(limit);
    /// # drop(layer);
    /// ```
    pub fn longest(&self) -> Duration {
        let Attempts { limit, budget, .. } = self.attempts;
        budget.saturating_add(limit)
    }
}

#[cfg(feature = "metrics")]
impl<D> SettlePolicy<D> {
    /// Sets labels of this policy's metrics, beside those of the first delivery's
    /// [description](crate::settle::Settle::messaging); none by default.
    ///
    /// A label with the name of one of those takes its place. See
    /// [`describe_metrics`](crate::telemetry::describe_metrics#labels).
    ///
    /// ```
    /// use tower_sentinel::{SettlePolicy, ack_on_success};
    ///
    /// let labels = [("messaging.destination.name", "orders")];
    /// let policy = SettlePolicy::new(ack_on_success()).metric_labels(labels);
    /// # drop(policy);
    /// ```
    pub fn metric_labels<K, V>(mut self, labels: impl IntoIterator<Item = (K, V)>) -> Self
    where
        K: Into<::metrics::SharedString>,
        V: Into<::metrics::SharedString>,
    {
        self.instruments = SettleInstruments::new(
            crate::telemetry::metrics::labels(labels),
            VerdictKind::NAMES,
        );
        self
    }
}

/// The policy of [`ack_on_success`](crate::ack_on_success).
impl Default for SettlePolicy {
    fn default() -> Self {
        Self::new(AckOnSuccess)
    }
}

impl<D, Tag, T, E> Service<Report<Tag, T, E>> for SettlePolicy<D>
where
    D: Decision<Tag, T, E>,
    Tag: Settle + fmt::Debug + Send + 'static,
    E: fmt::Display,
{
    type Response = Settled;
    type Error = SettleError<Tag::Error>;
    type Future = SettleFuture<Tag, Tag::Future, Tag::Error, Outcome<T, E>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, report: Report<Tag, T, E>) -> Self::Future {
        let Report {
            tag,
            outcome,
            elapsed,
            elsewhere,
            measured,
        } = report;
        let decided = self.decision.decide(&tag, &outcome);
        // Before anything else that may panic, since it guards the destructor of the outcome.
        let mut remains = Remains::new(outcome, elsewhere);
        let outcome = remains.outcome();
        let case = Case {
            end: End::of(outcome),
            error: match outcome {
                Outcome::Failed(error) => Some(error),
                _ => None,
            },
            elapsed,
        };
        let instruments = measured.of_policy(&self.instruments);
        let state = begin(tag, decided, case, instruments, self.attempts);
        remains.skim();
        SettleFuture::new(state, remains)
    }
}

impl<D> fmt::Debug for SettlePolicy<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SettlePolicy")
            .field("decision", &format_args!("{}", type_name::<D>()))
            .field("attempts", &self.attempts)
            .finish()
    }
}

/// A job to settle, without its types.
#[derive(Clone, Copy)]
struct Case<'a> {
    end: End<'a>,
    /// The error of a job that failed.
    error: Option<&'a dyn fmt::Display>,
    elapsed: Duration,
}

/// Begins the settlement of a job, or refuses it.
///
/// It has no types of the job, so it is compiled once for each broker.
// The future is large: inline it is built in place.
#[inline]
fn begin<Tag: Settle + fmt::Debug>(
    tag: Tag,
    decided: Result<Verdict, Undecided>,
    case: Case<'_>,
    instruments: SettleInstruments,
    attempts: Attempts,
) -> State<Tag, Tag::Future, Tag::Error> {
    let Case {
        end,
        error,
        elapsed,
    } = case;
    let verdict = match decided {
        Ok(verdict) if tag.capabilities().can(verdict) => Ok(verdict),
        Ok(verdict) => Err(SettleError::Unsupported { verdict }),
        Err(undecided) => Err(SettleError::Undecided(undecided)),
    };
    let message = match end {
        End::Completed => None,
        _ => {
            let message = explain(&tag, end, error);
            tell(&tag, end, verdict.as_ref().ok(), message.as_deref());
            message.or_else(|| end.message())
        }
    };
    let verdict = match verdict {
        Ok(verdict) => verdict,
        Err(refusal) => return State::refused(refusal),
    };
    let stopped = end.is_stopped();
    let settled = Settled {
        kind: end.kind(),
        cancelled: end.cancel_reason(),
        verdict,
        charged: tag.capabilities().charges(verdict),
        stopped,
        tag: (!stopped).then(|| print("tag", &format_args!("{tag:?}")).into()),
        elapsed,
    };
    let stopwatch = instruments.begin(verdict.kind().index(), || tag.messaging());
    let span = settle_span(&tag, verdict);
    State::settling(span, stopwatch, (tag, settled, message), attempts)
}

/// Emits the event of a job that has not completed.
fn tell<Tag: Settle + fmt::Debug>(
    tag: &Tag,
    end: End<'_>,
    verdict: Option<&Verdict>,
    message: Option<&str>,
) {
    if let (End::Failed(_), Some(message)) = (end, message) {
        guard(|| {
            Span::current().record("error.message", message);
        });
    }
    let fate = match verdict {
        Some(&verdict) => Fate::Verdict {
            verdict,
            // A suspect is kept apart from the dead letters.
            has_dead_letter: tag.capabilities().has_dead_letter()
                || end.cancel_reason() == Some(CancelReason::Suspect),
        },
        None => Fate::Unsettled,
    };
    events::tell(end, fate, &|| Decided::new(tag, message));
}

/// Returns the text of a job's error, or the reason why a job was not run.
///
/// `None` for all other outcomes: they carry their own message, or have none.
fn explain<Tag: Settle>(
    tag: &Tag,
    end: End<'_>,
    error: Option<&dyn fmt::Display>,
) -> Option<String> {
    if let Some(error) = error {
        return Some(print("error", error));
    }
    match end.cancel_reason()? {
        CancelReason::DeliveryLimit => {
            // Invariant: a job passes the delivery limit only if its count is known.
            let deliveries = tag.deliveries().unwrap_or_default();
            Some(format!("delivered {deliveries} times without an outcome"))
        }
        CancelReason::Suspect => Some(format!("suspect: {}", CancelReason::Suspect)),
        _ => None,
    }
}
