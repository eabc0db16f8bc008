//! [`SentinelError`]: what no outcome can carry.

use std::{error::Error, fmt, time::Duration};

use crate::outcome::{Panic, boxed_source};

/// An error of the sentinel itself: what no [`Outcome`](crate::Outcome) can carry.
///
/// `E` is the error of the inner service and `P` that of the policy. The error of a *job* is not
/// here: it went to the policy, as [`Outcome::Failed`](crate::Outcome::Failed).
///
/// It implements [`Error`] for every `E` and `P` that can be printed, `tower::BoxError` included,
/// so a sentinel goes under `tower::timeout`, `buffer` or `BoxCloneService` as it is. Its
/// `Display` contains the inner error; its `source()` is the panic, or what a `BoxError` holds.
///
/// # Examples
///
/// ```
/// use std::{error::Error, io};
/// use tower_sentinel::{Panic, SentinelError};
///
/// type PublishError = SentinelError<io::Error, io::Error>;
///
/// let error = PublishError::Policy(io::Error::other("channel closed"));
/// assert_eq!(error.to_string(), "the policy failed: channel closed");
///
/// let error = PublishError::PolicyPanicked(Panic::new("no channel"));
/// assert_eq!(error.source().unwrap().to_string(), "panicked: no channel");
/// ```
#[derive(Debug)]
#[non_exhaustive]
pub enum SentinelError<E, P> {
    /// The inner service answered `poll_ready` with an error. No job was taken.
    Unready(E),
    /// The inner service panicked in `poll_ready`. No job was taken; discard the service.
    UnreadyPanicked(Panic),
    /// The [`runtime`](crate::SentinelLayer::runtime) of the jobs has ended, so none would run. No job
    /// was taken; discard the service, and make one with a runtime that lives.
    RuntimeGone,
    /// The policy failed, in `poll_ready` or in its future: the broker may have no answer.
    Policy(P),
    /// The policy panicked: the broker may have no answer.
    PolicyPanicked(Panic),
    /// The policy did not settle within this
    /// [`settle_timeout`](crate::SentinelLayer::settle_timeout): the broker may have no answer.
    PolicyTimedOut(Duration),
}

const RUNTIME_GONE: &str = "the runtime of the jobs has ended: give the layer one that lives";

impl<E, P> SentinelError<E, P> {
    /// Returns what can be said of the error without bounds on `E` and `P`.
    pub(crate) fn brief(&self) -> &str {
        match self {
            SentinelError::Unready(_) => "the service is not ready",
            SentinelError::RuntimeGone => RUNTIME_GONE,
            SentinelError::Policy(_) => "the policy failed",
            SentinelError::PolicyTimedOut(_) => "the policy did not settle in time",
            SentinelError::UnreadyPanicked(panic) | SentinelError::PolicyPanicked(panic) => {
                panic.message()
            }
        }
    }
}

impl<E: fmt::Display, P: fmt::Display> fmt::Display for SentinelError<E, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SentinelError::Unready(error) => write!(f, "the service is not ready: {error:#}"),
            SentinelError::UnreadyPanicked(panic) => write!(
                f,
                "the service panicked while it was asked for readiness: {}",
                panic.message()
            ),
            SentinelError::RuntimeGone => f.write_str(RUNTIME_GONE),
            SentinelError::Policy(error) => write!(f, "the policy failed: {error:#}"),
            SentinelError::PolicyPanicked(panic) => {
                write!(f, "the policy panicked: {}", panic.message())
            }
            SentinelError::PolicyTimedOut(limit) => {
                write!(f, "the policy did not settle within {limit:?}")
            }
        }
    }
}

impl<E, P> Error for SentinelError<E, P>
where
    E: fmt::Debug + fmt::Display + 'static,
    P: fmt::Debug + fmt::Display + 'static,
{
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            SentinelError::Unready(error) => boxed_source(error),
            SentinelError::Policy(error) => boxed_source(error),
            SentinelError::UnreadyPanicked(panic) | SentinelError::PolicyPanicked(panic) => {
                Some(panic)
            }
            SentinelError::PolicyTimedOut(_) | SentinelError::RuntimeGone => None,
        }
    }
}
