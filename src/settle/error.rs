//! [`SettleError`]: why a delivery is not settled.

use std::{error::Error, fmt, time::Duration};

use crate::settle::{decision::Undecided, verdict::Verdict};

/// Why a [`SettlePolicy`](crate::SettlePolicy) did not settle a delivery; `E` is the error of its
/// tag.
///
/// ```
/// use std::{io, time::Duration};
/// use tower_sentinel::{Verdict, settle::SettleError};
///
/// let limit = Duration::from_secs(5);
/// let error = SettleError::<io::Error>::TimedOut { verdict: Verdict::Ack, limit };
/// assert_eq!(error.to_string(), "the broker was not told \"ack\" within 5s");
/// assert!(error.must_give_up_channel());
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum SettleError<E> {
    /// There is no verdict: the broker doesn't tell what the decision depends on. Nothing was
    /// sent.
    Undecided(Undecided),
    /// The broker can't carry the verdict out; see
    /// [`Capabilities::can`](crate::settle::Capabilities::can). Nothing was sent.
    Unsupported {
        /// What the decision was.
        verdict: Verdict,
    },
    /// A try passed the [`try_timeout`](crate::SettlePolicy::try_timeout): the broker may or may
    /// not have the answer.
    TimedOut {
        /// What the broker was to be told.
        verdict: Verdict,
        /// The limit of the try.
        limit: Duration,
    },
    /// The last try failed, and the tag can't be settled again, or was too often.
    Failed {
        /// What the broker was to be told.
        verdict: Verdict,
        /// How many tries there were.
        tries: u32,
        /// Why the last one failed.
        error: E,
    },
    /// The broker waits for no settlement of the delivery any more, as after the end of its lease:
    /// [`Unsettled::moot`](crate::settle::Unsettled::moot). The job may run once more.
    Moot {
        /// What the broker was to be told.
        verdict: Verdict,
        /// Why the try failed.
        error: E,
    },
    /// A try failed as each one will until somebody mends the configuration:
    /// [`Unsettled::misconfigured`](crate::settle::Unsettled::misconfigured).
    Misconfigured {
        /// What the broker was to be told.
        verdict: Verdict,
        /// Why the try failed.
        error: E,
    },
}

impl<E> SettleError<E> {
    /// Returns whether the broker may have no answer, so that the delivery's channel must be given
    /// up.
    ///
    /// The tag is used up. As long as its channel lives, the broker waits for an answer that
    /// nobody can give any more, and one place of the prefetch is lost. When the channel is
    /// closed, the broker takes back what was not answered on it and delivers it again.
    ///
    /// It is `true` for every error but [`Moot`](Self::Moot) and that of an
    /// [`Abandon`](Verdict::Abandon), for which the broker waits for no answer. After a failed
    /// [`Ack`](Verdict::Ack) the job will run again though it had completed, since nobody knows
    /// whether the broker got it. After [`Undecided`](Self::Undecided),
    /// [`Unsupported`](Self::Unsupported) and [`Misconfigured`](Self::Misconfigured) it comes back
    /// to the same configuration: stop, rather than reconnect.
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
                write!(f, "the broker was not told \"{verdict}\" within {limit:?}")
            }
            SettleError::Failed {
                verdict,
                tries,
                error,
            } => {
                let noun = if *tries == 1 { "try" } else { "tries" };
                write!(
                    f,
                    "the broker was not told \"{verdict}\" in {tries} {noun}: {error:#}"
                )
            }
            SettleError::Moot { verdict, error } => {
                write!(
                    f,
                    "the broker waits for no \"{verdict}\" any more: {error:#}"
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
