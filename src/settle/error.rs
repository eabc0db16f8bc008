//! [`SettleError`]: the error of a settlement.

use std::{error::Error, fmt, time::Duration};

use crate::settle::{decision::Undecided, verdict::Verdict};

/// Error of a [`SettlePolicy`](crate::SettlePolicy) that did not settle a delivery.
///
/// `E` is the error of the delivery's tag.
///
/// ```
/// use std::{io, time::Duration};
/// use tower_sentinel::{Verdict, settle::SettleError};
///
/// let limit = Duration::from_secs(5);
/// let error = SettleError::<io::Error>::TimedOut { verdict: Verdict::Ack, limit };
/// assert_eq!(error.to_string(), "the delivery was not settled with \"ack\" within 5s");
/// assert!(error.must_give_up_channel());
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum SettleError<E> {
    /// There is no verdict: the broker doesn't report a value that the decision needs. Nothing was sent.
    Undecided(Undecided),
    /// The broker can't carry the verdict out; see
    /// [`Capabilities::can`](crate::settle::Capabilities::can). Nothing was sent.
    Unsupported {
        /// The verdict of the decision.
        verdict: Verdict,
    },
    /// A try passed the [`try_timeout`](crate::SettlePolicy::try_timeout): the settlement may or may not
    /// have reached the broker.
    TimedOut {
        /// The verdict to settle with.
        verdict: Verdict,
        /// The limit of the try.
        limit: Duration,
    },
    /// The last try failed: the tag can't be settled again, or the
    /// [`retry_budget`](crate::SettlePolicy::retry_budget) is used up.
    Failed {
        /// The verdict to settle with.
        verdict: Verdict,
        /// The number of tries.
        tries: u32,
        /// The error of the last try.
        error: E,
    },
    /// The broker does not wait for a settlement of the delivery any more, as after the end of its lease;
    /// see [`Unsettled::moot`](crate::settle::Unsettled::moot). The job may run once more.
    Moot {
        /// The verdict to settle with.
        verdict: Verdict,
        /// The error of the try.
        error: E,
    },
    /// A try failed, and each one will until somebody mends the configuration; see
    /// [`Unsettled::misconfigured`](crate::settle::Unsettled::misconfigured).
    Misconfigured {
        /// The verdict to settle with.
        verdict: Verdict,
        /// The error of the try.
        error: E,
    },
}

impl<E> SettleError<E> {
    /// Returns whether the broker may still wait for a settlement, so that the delivery's channel must be
    /// given up.
    ///
    /// The tag is used up. As long as its channel lives, the broker waits for a settlement that nobody can
    /// send any more, and one place of the prefetch is lost. When the channel is closed, the broker takes
    /// the unsettled deliveries of that channel back and delivers them again.
    ///
    /// It is `true` for every error but two: [`Moot`](Self::Moot), and an error of an
    /// [`Abandon`](Verdict::Abandon) that was tried ([`TimedOut`](Self::TimedOut), [`Failed`](Self::Failed)).
    /// In both cases the broker does not wait. After a failed [`Ack`](Verdict::Ack) the job may run again
    /// though it has completed, since nobody knows whether the ack arrived. After
    /// [`Undecided`](Self::Undecided), [`Unsupported`](Self::Unsupported) and
    /// [`Misconfigured`](Self::Misconfigured) the job comes back to the same configuration: stop the worker
    /// instead of reconnecting.
    pub fn must_give_up_channel(&self) -> bool {
        match self {
            SettleError::Undecided(_)
            | SettleError::Unsupported { .. }
            | SettleError::Misconfigured { .. } => true,
            SettleError::Moot { .. } => false,
            SettleError::TimedOut { verdict, .. } | SettleError::Failed { verdict, .. } => {
                *verdict != Verdict::Abandon
            }
        }
    }
}

impl<E: fmt::Display> fmt::Display for SettleError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SettleError::Undecided(undecided) => write!(f, "there is no verdict: {undecided}"),
            SettleError::Unsupported { verdict } => {
                write!(f, "the broker can't carry out \"{verdict}\"")
            }
            SettleError::TimedOut { verdict, limit } => {
                write!(
                    f,
                    "the delivery was not settled with \"{verdict}\" within {limit:?}"
                )
            }
            SettleError::Failed {
                verdict,
                tries,
                error,
            } => {
                let noun = if *tries == 1 { "try" } else { "tries" };
                write!(
                    f,
                    "the delivery was not settled with \"{verdict}\" in {tries} {noun}: {error:#}"
                )
            }
            SettleError::Moot { verdict, error } => {
                write!(
                    f,
                    "the broker does not wait for \"{verdict}\" any more: {error:#}"
                )
            }
            SettleError::Misconfigured { verdict, error } => {
                write!(f, "\"{verdict}\" fails as configured: {error:#}")
            }
        }
    }
}

impl<E: Error + 'static> Error for SettleError<E> {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            SettleError::Undecided(undecided) => Some(undecided),
            SettleError::Failed { error, .. }
            | SettleError::Moot { error, .. }
            | SettleError::Misconfigured { error, .. } => Some(error),
            SettleError::Unsupported { .. } | SettleError::TimedOut { .. } => None,
        }
    }
}
