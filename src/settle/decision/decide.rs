//! [`Decision`], a function from the outcome of a job to its [`Verdict`].

use std::{error::Error, fmt, sync::Arc};

use crate::{
    outcome::Outcome,
    settle::{Settle, verdict::Verdict},
};

/// Function from the outcome of a job to its [`Verdict`].
///
/// It is implemented for every `Fn(&Tag, &Outcome<T, E>) -> Verdict`, by
/// [`ack_on_success`](crate::ack_on_success), and by the decisions that [`DecisionExt`](crate::DecisionExt)
/// makes from others. A decision is pure: it sends nothing to the broker, and the same tag and outcome always
/// give the same verdict. The only exception: the random numbers of a [`Backoff`](super::Backoff), which
/// [can be replaced](super::Backoff::random). So a decision can be tested as a table, without a broker and
/// without a clock.
///
/// # Examples
///
/// ```
/// use tower_sentinel::{Outcome, Panic, Verdict, settle::decision::Decision};
///
/// fn decide(_: &u64, outcome: &Outcome<(), std::io::Error>) -> Verdict {
///     match outcome {
///         Outcome::Completed(()) => Verdict::Ack,
///         Outcome::Failed(_) | Outcome::TimedOut(_) => Verdict::retry(),
///         Outcome::Panicked(_) => Verdict::Reject,
///         Outcome::Cancelled(_) => Verdict::release(),
///     }
/// }
///
/// assert_eq!(decide.decide(&7, &Outcome::Completed(())), Ok(Verdict::Ack));
/// assert_eq!(decide.decide(&7, &Outcome::Panicked(Panic::new("index 7"))), Ok(Verdict::Reject));
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a `Decision` for the tag `{Tag}` and `Outcome<{T}, {E}>`",
    label = "this cannot decide on these jobs",
    note = "a `Decision<Tag, T, E>` is a `Fn(&Tag, &Outcome<T, E>) -> Verdict`, or a ready one such as `ack_on_success()`, where `T` and `E` are the response and the error of the wrapped service",
    note = "`delivery_limit`, `backoff` and `retry_once` ask the tag, which must be `Settle`; `on_error` takes a `Fn(&E) -> Verdict`; `reject_undecodable` needs a `DecodeLayer` directly inside the sentinel, since `E` must be a `DecodeError`"
)]
pub trait Decision<Tag, T, E> {
    /// Returns the verdict on `outcome`, the outcome of the job with this tag.
    ///
    /// # Errors
    ///
    /// [`Undecided`] if the decision needs a value that the broker does not report. An unknown count is never
    /// treated as zero, since then a delivery limit would never be reached.
    fn decide(&self, tag: &Tag, outcome: &Outcome<T, E>) -> Result<Verdict, Undecided>;
}

impl<F, Tag, T, E> Decision<Tag, T, E> for F
where
    F: Fn(&Tag, &Outcome<T, E>) -> Verdict,
{
    fn decide(&self, tag: &Tag, outcome: &Outcome<T, E>) -> Result<Verdict, Undecided> {
        Ok(self(tag, outcome))
    }
}

impl<D, Tag, T, E> Decision<Tag, T, E> for Arc<D>
where
    D: Decision<Tag, T, E> + ?Sized,
{
    fn decide(&self, tag: &Tag, outcome: &Outcome<T, E>) -> Result<Verdict, Undecided> {
        (**self).decide(tag, outcome)
    }
}

/// Error of a decision that needs a value which the broker does not report.
///
/// It occurs at the first job that is to be retried. The configuration is wrong: this decision does not work
/// with this broker.
///
/// ```
/// use tower_sentinel::settle::decision::Undecided;
///
/// assert_eq!(
///     Undecided::DeliveriesUnknown.to_string(),
///     "the broker does not report how often the job was delivered"
/// );
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Undecided {
    /// [`Settle::deliveries`](crate::settle::Settle::deliveries) is `None`.
    DeliveriesUnknown,
    /// [`Settle::redelivered`](crate::settle::Settle::redelivered) is `None`.
    RedeliveredUnknown,
}

impl fmt::Display for Undecided {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Undecided::DeliveriesUnknown => {
                "the broker does not report how often the job was delivered"
            }
            Undecided::RedeliveredUnknown => {
                "the broker does not report whether the job was delivered before"
            }
        })
    }
}

impl Error for Undecided {}

/// Returns `verdict` below `limit` deliveries, and else a reject.
pub(super) fn within(
    limit: u32,
    tag: &impl Settle,
    verdict: Verdict,
) -> Result<Verdict, Undecided> {
    match tag.deliveries() {
        Some(deliveries) if deliveries < limit => Ok(verdict),
        Some(_) => Ok(Verdict::Reject),
        None => Err(Undecided::DeliveriesUnknown),
    }
}
