//! [`SentinelError`]: the error of a call that is not the outcome of its job.

use std::{error::Error, fmt, time::Duration};

use crate::outcome::{Detail, Panic, boxed_source};

/// Error of the sentinel itself, which no [`Outcome`](crate::Outcome) can carry.
///
/// `E` is the error of the inner service and `P` that of the policy. The error of a *job* is not here: it
/// went to the policy, as [`Outcome::Failed`](crate::Outcome::Failed).
///
/// It implements [`Error`] for every `E` and `P` that can be printed, including `tower::BoxError`. So a
/// sentinel works under `tower::timeout`, `buffer` or `BoxCloneService`. `Display` contains the inner error.
/// `source()` is the panic, or the error inside a `BoxError`.
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
    /// The inner service returned an error from `poll_ready`. No job was taken.
    Unready(E),
    /// The inner service panicked in `poll_ready`. No job was taken; discard the service.
    UnreadyPanicked(Panic),
    /// The [`runtime`](crate::SentinelLayer::runtime) of the jobs has ended, so no job would run. No job was
    /// taken; discard the service, and make a new one with a live runtime.
    RuntimeGone,
    /// The policy failed, in `poll_ready` or in its future: the delivery may be unsettled.
    Policy(P),
    /// The policy panicked: the delivery may be unsettled.
    PolicyPanicked(Panic),
    /// The policy did not settle within this [`settle_timeout`](crate::SentinelLayer::settle_timeout): the
    /// delivery may be unsettled.
    PolicyTimedOut(Duration),
}

const RUNTIME_GONE: &str = "the runtime of the jobs has ended: give the layer one that lives";

impl<E, P> SentinelError<E, P> {
    /// Returns a short text that needs no bounds on `E` and `P`.
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
        let (what, detail) = match self {
            SentinelError::Unready(error) => ("the service is not ready", Detail::Error(error)),
            SentinelError::UnreadyPanicked(panic) => {
                let what = "the service panicked while it was asked for readiness";
                (what, Detail::Panic(panic))
            }
            SentinelError::RuntimeGone => (RUNTIME_GONE, Detail::None),
            SentinelError::Policy(error) => ("the policy failed", Detail::Error(error)),
            SentinelError::PolicyPanicked(panic) => ("the policy panicked", Detail::Panic(panic)),
            SentinelError::PolicyTimedOut(limit) => {
                ("the policy did not settle within", Detail::Limit(*limit))
            }
        };
        detail.print_after(what, f)
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
