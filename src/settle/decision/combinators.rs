//! Ready decisions that compose.

use std::{any::type_name, fmt, ops::RangeInclusive, sync::Arc, time::Duration};

#[cfg(feature = "process")]
use super::crash::{CrashLimit, OnCrash};
use super::decide::{Decision, Undecided, within};
use crate::{
    backoff::{Delays, full_jitter},
    decode::DecodeError,
    outcome::{CancelReason, Outcome},
    settle::{Settle, verdict::Verdict},
};

// === BoxDecision ===

/// A [`Decision`] with its type erased, for a field or for a choice by configuration.
///
/// It is created by `new`, or by the method `boxed` of a ready decision.
///
/// ```
/// use std::{io, time::Duration};
/// use tower_sentinel::{
///     DecisionExt, Outcome, SettlePolicy, Verdict, ack_on_success,
///     settle::decision::{BoxDecision, Decision},
/// };
///
/// fn decision(is_strict: bool) -> BoxDecision<u64, (), io::Error> {
///     match is_strict {
///         true => BoxDecision::new(|_: &u64, _: &Outcome<(), io::Error>| Verdict::Reject),
///         false => ack_on_success().poison_on_panic().boxed(),
///     }
/// }
///
/// let failed = Outcome::Failed(io::Error::other("no such user"));
/// assert_eq!(decision(true).decide(&7, &failed), Ok(Verdict::Reject));
/// assert_eq!(decision(false).decide(&7, &failed), Ok(Verdict::retry()));
/// let policy = SettlePolicy::new(decision(true));
/// # drop(policy);
/// ```
pub struct BoxDecision<Tag, T, E>(Arc<dyn Decision<Tag, T, E> + Send + Sync>);

impl<Tag, T, E> BoxDecision<Tag, T, E> {
    /// Creates a decision that erases the type of `decision`.
    pub fn new(decision: impl Decision<Tag, T, E> + Send + Sync + 'static) -> Self {
        Self(Arc::new(decision))
    }
}

impl<Tag, T, E> Decision<Tag, T, E> for BoxDecision<Tag, T, E> {
    fn decide(&self, tag: &Tag, outcome: &Outcome<T, E>) -> Result<Verdict, Undecided> {
        self.0.decide(tag, outcome)
    }
}

impl<Tag, T, E> Clone for BoxDecision<Tag, T, E> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<Tag, T, E> fmt::Debug for BoxDecision<Tag, T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BoxDecision")
    }
}

// Inherent, since `DecisionExt` is implemented for every type: its `boxed` would make calls of
// `tower::ServiceExt::boxed` or `futures::FutureExt::boxed` ambiguous.
macro_rules! boxed {
    ($($decision:ident<$($parameter:ident),*>),*) => {$(
        impl<$($parameter),*> $decision<$($parameter),*> {
            /// Returns this decision with its type erased; see [`BoxDecision`].
            pub fn boxed<Tag, T, E>(self) -> BoxDecision<Tag, T, E>
            where
                Self: Decision<Tag, T, E> + Send + Sync + 'static,
            {
                BoxDecision::new(self)
            }
        }
    )*};
}

boxed!(
    AckOnSuccess<>, OnError<D, F>, PoisonOnPanic<D>, RejectUndecodable<D>, Backoff<D, R>,
    RetryOnce<D>, DeliveryLimit<D>
);

#[cfg(feature = "process")]
boxed!(OnCrash<D>, CrashLimit<D>);

// === AckOnSuccess ===

/// Returns the default decision; see [`AckOnSuccess`].
#[doc(alias = "ack")]
pub fn ack_on_success() -> AckOnSuccess {
    AckOnSuccess
}

/// The default [`Decision`], which acks completed jobs, and retries or releases most others.
///
/// | outcome | verdict |
/// | --- | --- |
/// | `Completed` | [`Ack`](Verdict::Ack) |
/// | `Failed`, `Panicked`, `TimedOut` | [`Retry`](Verdict::Retry) at once |
/// | `TimedOut` of a job that never [started](crate::outcome::TimedOut::started) | [`Release`](Verdict::Release) |
/// | `Cancelled` with [`LeaseLost`](CancelReason::LeaseLost) | [`Abandon`](Verdict::Abandon) |
/// | `Cancelled` with [`DeliveryLimit`](CancelReason::DeliveryLimit) or [`Suspect`](CancelReason::Suspect) | [`Reject`](Verdict::Reject) |
/// | `Cancelled` for any other reason | [`Release`](Verdict::Release) |
///
/// Alone it retries for ever and without a pause. The methods of [`DecisionExt`] add limits.
///
/// ```
/// use std::io;
/// use tower_sentinel::{Outcome, Verdict, ack_on_success, settle::decision::Decision};
///
/// let failed = Outcome::<(), _>::Failed(io::Error::other("no such user"));
/// assert_eq!(ack_on_success().decide(&7, &failed), Ok(Verdict::retry()));
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct AckOnSuccess;

impl<Tag, T, E> Decision<Tag, T, E> for AckOnSuccess {
    fn decide(&self, _: &Tag, outcome: &Outcome<T, E>) -> Result<Verdict, Undecided> {
        Ok(match outcome {
            Outcome::Completed(_) => Verdict::Ack,
            Outcome::TimedOut(timed_out) if !timed_out.started() => Verdict::release(),
            Outcome::Failed(_) | Outcome::Panicked(_) | Outcome::TimedOut(_) => Verdict::retry(),
            Outcome::Cancelled(cancelled) => match cancelled.reason() {
                CancelReason::LeaseLost => Verdict::Abandon,
                CancelReason::DeliveryLimit | CancelReason::Suspect => Verdict::Reject,
                _ => Verdict::release(),
            },
        })
    }
}

// === DecisionExt ===

/// Methods of every [`Decision`] that return a new one, based on it.
///
/// # Order
///
/// Each method wraps the decision before it, and its own verdict is the final one. Some methods *replace* a
/// verdict without looking at it: [`on_error`](Self::on_error), [`poison_on_panic`](Self::poison_on_panic),
/// [`reject_undecodable`](Self::reject_undecodable), and with the feature `process` `on_crash`. They belong first. Others *bound* a `Retry`:
/// [`backoff`](Self::backoff), [`retry_once`](Self::retry_once), [`delivery_limit`](Self::delivery_limit), and `crash_limit`.
/// They belong after those.
///
/// | order | effect |
/// | --- | --- |
/// | `.on_error(f).delivery_limit(5)` | a `Retry` of `f` becomes a `Reject` at the 5th delivery |
/// | `.delivery_limit(5).on_error(f)` | a `Retry` of `f` has no limit: the limit applies only to panics and time limits |
/// | `.on_error(f).backoff(r)` | a `Retry` of `f` without a delay gets one |
/// | `.backoff(r).on_error(f)` | a `Retry` of `f` without a delay comes back at once |
/// | `.on_error(f).poison_on_panic()`, in either order | the same: a job either fails or panics |
/// | `.on_error(f).reject_undecodable()` | jobs that can't be decoded are rejected, and `f` decides on the errors of the handler |
/// | `.reject_undecodable().on_error(f)` | `f` decides on jobs that can't be decoded too: a `Retry` of them is a hot loop |
/// | none of `reject_undecodable`, `on_error` and `delivery_limit` | jobs that can't be decoded come back for ever: at once, or with `backoff` after a growing delay |
/// | `.backoff(r).delivery_limit(5)`, in either order | the same: one sets the delay, the other the number |
///
/// # Examples
///
/// ```
/// use std::{io, time::Duration};
/// use tower_sentinel::{
///     DecisionExt, Outcome, Panic, Verdict, ack_on_success, settle::decision::Decision,
/// };
/// # use std::{convert::Infallible, future::{Ready, ready}};
/// # use tower_sentinel::settle::{Capabilities, Lease, Reason, Settle, Unsettled};
/// #
/// # struct Tag { deliveries: u32 }
/// # impl Settle for Tag {
/// #     type Error = Infallible;
/// #     type Future = Ready<Result<(), Unsettled<Self, Infallible>>>;
/// #     fn settle(self, _: Verdict, _: Reason) -> Self::Future { ready(Ok(())) }
/// #     async fn keep_alive(&self) -> Result<Lease, Infallible> { Ok(Lease::Held) }
/// #     fn deliveries(&self) -> Option<u32> { Some(self.deliveries) }
/// #     fn capabilities(&self) -> Capabilities { Capabilities::none().delay() }
/// # }
///
/// let second = Duration::from_secs(1);
/// let decision = ack_on_success()
///     .on_error(|error: &io::Error| match error.kind() {
///         // The dependency is down: not the fault of the job, so no attempt is counted.
///         io::ErrorKind::ConnectionRefused => Verdict::release_after(60 * second),
///         // This job can never succeed.
///         io::ErrorKind::InvalidData => Verdict::Reject,
///         _ => Verdict::retry(),
///     })
///     .poison_on_panic()
///     .backoff(second..=60 * second)
///     .delivery_limit(5);
///
/// let decide = |deliveries, outcome: Outcome<(), io::Error>| {
///     decision.decide(&Tag { deliveries }, &outcome).unwrap()
/// };
/// let failed = |kind: io::ErrorKind| Outcome::Failed(kind.into());
///
/// assert_eq!(decide(1, Outcome::Completed(())), Verdict::Ack);
/// assert_eq!(decide(1, Outcome::Panicked(Panic::new("index 7"))), Verdict::Reject);
/// assert_eq!(decide(1, failed(io::ErrorKind::InvalidData)), Verdict::Reject);
/// assert_eq!(
///     decide(9, failed(io::ErrorKind::ConnectionRefused)),
///     Verdict::release_after(60 * second)
/// );
/// // The third delivery waits for up to 4 s; the fifth was the last.
/// assert!(matches!(
///     decide(3, failed(io::ErrorKind::Other)),
///     Verdict::Retry { after: Some(delay) } if delay <= 4 * second
/// ));
/// assert_eq!(decide(5, failed(io::ErrorKind::Other)), Verdict::Reject);
/// ```
// For every type, like `tracing::Instrument`: a bound would need `Tag`, `T` and `E`. The methods do not
// know these, so they could not be inferred.
pub trait DecisionExt: Sized {
    /// Decides with `classify` on a job that returned an error.
    ///
    /// Use it to distinguish "the dependency is down" from "this job is bad". The decision before is not
    /// called for [`Outcome::Failed`]. If `classify` returns a [`Verdict::retry_after`], a later
    /// [`backoff`](Self::backoff) keeps that delay.
    ///
    /// Give a `Release` a delay ([`Verdict::release_after`]), since no `backoff` and no
    /// [`delivery_limit`](Self::delivery_limit) bounds it. Without a delay it is a hot loop while the
    /// dependency is down, unless an [`IntensityLayer`](crate::IntensityLayer) pauses the worker.
    fn on_error<E, F>(self, classify: F) -> OnError<Self, F>
    where
        F: Fn(&E) -> Verdict,
    {
        OnError {
            inner: self,
            classify,
        }
    }

    /// Rejects a job that panicked, since it would panic again.
    ///
    /// This does not apply to a job that panicked after its time limit or a cancellation: its outcome is
    /// [`TimedOut`](Outcome::TimedOut) or [`Cancelled`](Outcome::Cancelled).
    fn poison_on_panic(self) -> PoisonOnPanic<Self> {
        PoisonOnPanic { inner: self }
    }

    /// Rejects a job that [can't be decoded](crate::DecodeLayer), since a retry could not decode it either.
    ///
    /// Use it together with every [`DecodeLayer`](crate::DecodeLayer). Without it, such a job fails like any
    /// other. If the decision retries failures at once, as [`ack_on_success`] does, the job goes back and
    /// forth between broker and worker at full speed.
    ///
    /// The errors of the jobs are [`DecodeError`]s, also for an [`on_error`](Self::on_error) before it:
    ///
    /// ```
    /// use std::{io, string::FromUtf8Error, time::Duration};
    /// use tower_sentinel::{
    ///     DecisionExt, Outcome, Verdict, ack_on_success, decode::DecodeError,
    ///     settle::decision::Decision,
    /// };
    ///
    /// type Error = DecodeError<FromUtf8Error, io::Error>;
    ///
    /// const MINUTE: Duration = Duration::from_secs(60);
    ///
    /// let decision = ack_on_success()
    ///     .on_error(|error: &Error| match error {
    ///         DecodeError::Inner(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
    ///             Verdict::release_after(MINUTE)
    ///         }
    ///         _ => Verdict::retry(),
    ///     })
    ///     .reject_undecodable();
    ///
    /// let decide = |error| decision.decide(&7, &Outcome::<(), Error>::Failed(error)).unwrap();
    /// let not_text = String::from_utf8(vec![0xff]).unwrap_err();
    /// assert_eq!(decide(DecodeError::Undecodable(not_text)), Verdict::Reject);
    ///
    /// let refused = io::ErrorKind::ConnectionRefused.into();
    /// assert_eq!(decide(DecodeError::Inner(refused)), Verdict::release_after(MINUTE));
    /// ```
    fn reject_undecodable(self) -> RejectUndecodable<Self> {
        RejectUndecodable { inner: self }
    }

    /// Gives one verdict to each job that [took its process down](crate::process::ProcessError::is_crash).
    ///
    /// Without it, such a job fails like any other. The errors of the jobs are
    /// [`ProcessError`](crate::process::ProcessError)s, or others that are a
    /// [`Crash`](crate::settle::decision::Crash).
    ///
    /// ```
    /// use tower_sentinel::{
    ///     DecisionExt, Outcome, Verdict, ack_on_success,
    ///     process::ProcessError, settle::decision::Decision,
    /// };
    ///
    /// type Error = ProcessError<String, std::str::Utf8Error>;
    ///
    /// let decision = ack_on_success().on_crash(Verdict::Reject);
    /// let decide = |error| decision.decide(&7, &Outcome::<(), Error>::Failed(error)).unwrap();
    /// assert_eq!(decide(ProcessError::Crashed { status: None }), Verdict::Reject);
    /// assert_eq!(decide(ProcessError::Failed("no such user".to_owned())), Verdict::retry());
    /// ```
    #[cfg(feature = "process")]
    fn on_crash(self, verdict: Verdict) -> OnCrash<Self> {
        OnCrash {
            inner: self,
            verdict,
        }
    }

    /// Limits the deliveries of a job that takes its process down: a `Retry` or a `Release` of one that
    /// [crashed](crate::process::ProcessError::is_crash) at its delivery number `limit` or later becomes a
    /// `Reject`.
    ///
    /// A crash is dearer than an error, and more likely to happen again, so its limit is lower than that of
    /// [`delivery_limit`](Self::delivery_limit). The count is that of the [deliveries](Settle::deliveries),
    /// which the broker keeps, and not one of the crashes: a job that failed four times and then crashes is at
    /// its fifth delivery. A verdict of an [`on_crash`](Self::on_crash) *after* it has no limit.
    ///
    /// ```
    /// use tower_sentinel::{DecisionExt, ack_on_success};
    ///
    /// // A crash is tried once more, and an error four times.
    /// let decision = ack_on_success().crash_limit(2).delivery_limit(5);
    /// # drop(decision);
    /// ```
    ///
    /// # Panics
    ///
    /// Panics if `limit` is 0.
    #[cfg(feature = "process")]
    #[track_caller]
    fn crash_limit(self, limit: u32) -> CrashLimit<Self> {
        assert!(limit > 0, "no job is delivered less than once");
        CrashLimit { inner: self, limit }
    }

    /// Delays each `Retry` that has no delay yet, with a growing delay and full jitter.
    ///
    /// The delay is a random part of a ceiling, evenly distributed from zero up to the ceiling. The ceiling
    /// is the lower bound at the first delivery, doubles with each further one, and ends at the upper bound.
    /// So a delay can be *shorter* than the lower bound, by any amount. This is the "full jitter" of
    /// [Exponential Backoff And Jitter](https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/),
    /// which causes the least work when many jobs fail together.
    ///
    /// It needs a broker that [can delay](crate::settle::Capabilities::has_delay) and counts
    /// [`deliveries`](Settle::deliveries).
    ///
    /// # Panics
    ///
    /// Panics if the lower bound is zero, since a ceiling of zero never grows, or above the upper bound.
    #[track_caller]
    fn backoff(self, ceilings: RangeInclusive<Duration>) -> Backoff<Self> {
        Backoff {
            inner: self,
            ceilings: Delays::new(ceilings),
            random: fastrand::f64,
        }
    }

    /// Allows one redelivery: a `Retry` of a job that was [redelivered](Settle::redelivered) becomes a
    /// `Reject`.
    ///
    /// For brokers that flag a redelivery and don't count deliveries. The flag is also set by a `Release` and
    /// by a lost connection. It corresponds to Broadway's `reject_and_requeue_once`.
    fn retry_once(self) -> RetryOnce<Self> {
        RetryOnce { inner: self }
    }

    /// Limits the deliveries of a job: a `Retry` of a job that was [delivered](Settle::deliveries) `limit`
    /// times or more becomes a `Reject`.
    ///
    /// A `Release` has no limit, but its deliveries may count toward the limit, depending on the broker.
    ///
    /// A decision gets outcomes, and a job that takes its process down has no outcome. Limit such jobs with
    /// [`SentinelLayer::delivery_limit`](crate::SentinelLayer::delivery_limit).
    ///
    /// # Panics
    ///
    /// Panics if `limit` is 0: elsewhere 0 means "no limit", but here it would reject at once.
    #[track_caller]
    fn delivery_limit(self, limit: u32) -> DeliveryLimit<Self> {
        assert!(limit > 0, "no job is delivered less than once");
        DeliveryLimit { inner: self, limit }
    }
}

impl<D> DecisionExt for D {}

// === OnError ===

/// The [`Decision`] returned by [`DecisionExt::on_error`].
#[derive(Clone, Copy)]
pub struct OnError<D, F> {
    inner: D,
    classify: F,
}

impl<D, F, Tag, T, E> Decision<Tag, T, E> for OnError<D, F>
where
    D: Decision<Tag, T, E>,
    F: Fn(&E) -> Verdict,
{
    fn decide(&self, tag: &Tag, outcome: &Outcome<T, E>) -> Result<Verdict, Undecided> {
        match outcome {
            Outcome::Failed(error) => Ok((self.classify)(error)),
            _ => self.inner.decide(tag, outcome),
        }
    }
}

impl<D: fmt::Debug, F> fmt::Debug for OnError<D, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OnError")
            .field("inner", &self.inner)
            .field("classify", &format_args!("{}", type_name::<F>()))
            .finish()
    }
}

// === PoisonOnPanic ===

/// The [`Decision`] returned by [`DecisionExt::poison_on_panic`].
#[derive(Clone, Copy, Debug)]
pub struct PoisonOnPanic<D> {
    inner: D,
}

impl<D, Tag, T, E> Decision<Tag, T, E> for PoisonOnPanic<D>
where
    D: Decision<Tag, T, E>,
{
    fn decide(&self, tag: &Tag, outcome: &Outcome<T, E>) -> Result<Verdict, Undecided> {
        match outcome {
            Outcome::Panicked(_) => Ok(Verdict::Reject),
            _ => self.inner.decide(tag, outcome),
        }
    }
}

// === RejectUndecodable ===

/// The [`Decision`] returned by [`DecisionExt::reject_undecodable`].
#[derive(Clone, Copy, Debug)]
pub struct RejectUndecodable<D> {
    inner: D,
}

impl<D, Tag, T, C, E> Decision<Tag, T, DecodeError<C, E>> for RejectUndecodable<D>
where
    D: Decision<Tag, T, DecodeError<C, E>>,
{
    fn decide(
        &self,
        tag: &Tag,
        outcome: &Outcome<T, DecodeError<C, E>>,
    ) -> Result<Verdict, Undecided> {
        match outcome {
            Outcome::Failed(DecodeError::Undecodable(_)) => Ok(Verdict::Reject),
            _ => self.inner.decide(tag, outcome),
        }
    }
}

// === Backoff ===

/// The [`Decision`] returned by [`DecisionExt::backoff`].
#[derive(Clone, Copy)]
pub struct Backoff<D, R = fn() -> f64> {
    inner: D,
    ceilings: Delays,
    random: R,
}

impl<D, R> Backoff<D, R> {
    /// Sets the source of the random numbers; a generator for each thread by default.
    ///
    /// A number is from 0 to 1, and the delay is that part of the ceiling. A number outside of this range
    /// counts as the nearest bound, and a NaN as 1.
    ///
    /// ```
    /// use std::time::Duration;
    /// use tower_sentinel::{
    ///     DecisionExt, ack_on_success, broker::memory::DeliveryTag, settle::decision::BoxDecision,
    /// };
    ///
    /// let bounds = Duration::from_secs(1)..=Duration::from_secs(60);
    /// // Without jitter: always the ceiling.
    /// let decision = ack_on_success().backoff(bounds).random(|| 1.0);
    /// let decision: BoxDecision<DeliveryTag<u64>, (), &str> = decision.boxed();
    /// # drop(decision);
    /// ```
    pub fn random<F: Fn() -> f64>(self, random: F) -> Backoff<D, F> {
        Backoff {
            inner: self.inner,
            ceilings: self.ceilings,
            random,
        }
    }
}

impl<D, R, Tag, T, E> Decision<Tag, T, E> for Backoff<D, R>
where
    D: Decision<Tag, T, E>,
    R: Fn() -> f64,
    Tag: Settle,
{
    fn decide(&self, tag: &Tag, outcome: &Outcome<T, E>) -> Result<Verdict, Undecided> {
        let verdict = self.inner.decide(tag, outcome)?;
        if verdict != Verdict::retry() {
            return Ok(verdict);
        }
        let deliveries = tag.deliveries().ok_or(Undecided::DeliveriesUnknown)?;
        let ceiling = self.ceilings.nth(deliveries);
        Ok(Verdict::retry_after(full_jitter(ceiling, (self.random)())))
    }
}

impl<D: fmt::Debug, R> fmt::Debug for Backoff<D, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Backoff")
            .field("inner", &self.inner)
            .field("ceilings", &self.ceilings)
            .field("random", &format_args!("{}", type_name::<R>()))
            .finish()
    }
}

// === RetryOnce ===

/// The [`Decision`] returned by [`DecisionExt::retry_once`].
#[derive(Clone, Copy, Debug)]
pub struct RetryOnce<D> {
    inner: D,
}

impl<D, Tag, T, E> Decision<Tag, T, E> for RetryOnce<D>
where
    D: Decision<Tag, T, E>,
    Tag: Settle,
{
    fn decide(&self, tag: &Tag, outcome: &Outcome<T, E>) -> Result<Verdict, Undecided> {
        let verdict = self.inner.decide(tag, outcome)?;
        if !matches!(verdict, Verdict::Retry { .. }) {
            return Ok(verdict);
        }
        match tag.redelivered() {
            Some(false) => Ok(verdict),
            Some(true) => Ok(Verdict::Reject),
            None => Err(Undecided::RedeliveredUnknown),
        }
    }
}

// === DeliveryLimit ===

/// The [`Decision`] returned by [`DecisionExt::delivery_limit`].
#[derive(Clone, Copy, Debug)]
pub struct DeliveryLimit<D> {
    inner: D,
    limit: u32,
}

impl<D, Tag, T, E> Decision<Tag, T, E> for DeliveryLimit<D>
where
    D: Decision<Tag, T, E>,
    Tag: Settle,
{
    fn decide(&self, tag: &Tag, outcome: &Outcome<T, E>) -> Result<Verdict, Undecided> {
        let verdict = self.inner.decide(tag, outcome)?;
        let is_bounded = match verdict {
            Verdict::Retry { .. } => true,
            // It would come back again and again, and never be run.
            Verdict::Release { .. } => is_refused(outcome),
            Verdict::Ack | Verdict::Reject | Verdict::Abandon => false,
        };
        if !is_bounded {
            return Ok(verdict);
        }
        within(self.limit, tag, verdict)
    }
}

/// Returns whether the job was refused at its arrival, as it would be the next time.
fn is_refused<T, E>(outcome: &Outcome<T, E>) -> bool {
    matches!(
        outcome.cancel_reason(),
        Some(CancelReason::DeliveryLimit | CancelReason::Suspect)
    )
}
