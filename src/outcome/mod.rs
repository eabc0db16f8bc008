//! [`Outcome`] of a job, and the three ways in which a job can fail to return.

use std::{any::Any, convert::Infallible, error::Error, fmt, mem::needs_drop};

mod detail;
mod panic;
mod remains;
mod stop;

pub(crate) use self::{
    detail::Detail,
    panic::{Quiet, Run, catch, catch_dyn, drop_quietly, guard, guard_dyn, print},
    remains::{Elsewhere, Remains},
    stop::Stop,
};
pub use self::{
    panic::Panic,
    stop::{CancelReason, Cancelled, TimedOut},
};

/// One of the five ways in which a job ends.
///
/// The enum is exhaustive on purpose: a policy that forgets one of the five does not compile.
///
/// # Examples
///
/// ```
/// use tower_sentinel::Outcome;
///
/// fn acks(outcome: &Outcome<(), std::io::Error>) -> bool {
///     match outcome {
///         Outcome::Completed(()) => true,
///         Outcome::Failed(_) | Outcome::TimedOut(_) | Outcome::Cancelled(_) => false,
///         // A job that panics will panic again: do not give it back.
///         Outcome::Panicked(_) => true,
///     }
/// }
///
/// assert!(acks(&Outcome::Completed(())));
/// assert!(!acks(&Outcome::Failed(std::io::ErrorKind::TimedOut.into())));
/// ```
#[derive(Debug)]
pub enum Outcome<T, E> {
    /// The job returned a value.
    Completed(T),
    /// The job returned an error.
    Failed(E),
    /// The job panicked, in the service's `call` or in the future that it returned.
    Panicked(Panic),
    /// The job passed its time limit.
    TimedOut(TimedOut),
    /// The job was stopped for a reason other than its time limit.
    Cancelled(Cancelled),
}

impl<T, E> Outcome<T, E> {
    /// Returns the kind of this outcome.
    pub fn kind(&self) -> OutcomeKind {
        match self {
            Outcome::Completed(_) => OutcomeKind::Completed,
            Outcome::Failed(_) => OutcomeKind::Failed,
            Outcome::Panicked(_) => OutcomeKind::Panicked,
            Outcome::TimedOut(_) => OutcomeKind::TimedOut,
            Outcome::Cancelled(_) => OutcomeKind::Cancelled,
        }
    }

    /// Returns whether the job returned a value.
    pub fn is_completed(&self) -> bool {
        matches!(self, Outcome::Completed(_))
    }

    /// Returns whether the job returned an error.
    pub fn is_failed(&self) -> bool {
        matches!(self, Outcome::Failed(_))
    }

    /// Returns whether the job panicked.
    pub fn is_panicked(&self) -> bool {
        matches!(self, Outcome::Panicked(_))
    }

    /// Returns whether the job passed its time limit.
    pub fn is_timed_out(&self) -> bool {
        matches!(self, Outcome::TimedOut(_))
    }

    /// Returns whether the job was cancelled.
    pub fn is_cancelled(&self) -> bool {
        matches!(self, Outcome::Cancelled(_))
    }

    /// Returns whether the job had stopped running when the policy was called.
    ///
    /// `false` for a job that timed out or was cancelled, and still blocks its thread.
    pub fn is_stopped(&self) -> bool {
        match self {
            Outcome::Completed(_) | Outcome::Failed(_) | Outcome::Panicked(_) => true,
            Outcome::TimedOut(timed_out) => timed_out.stopped(),
            Outcome::Cancelled(cancelled) => cancelled.stopped(),
        }
    }

    /// Creates the outcome of a job that has not returned.
    pub(crate) fn unreturned(failure: Failure<Infallible>) -> Self {
        match failure {
            Failure::Failed(never) => match never {},
            Failure::Panicked(panic) => Outcome::Panicked(panic),
            Failure::TimedOut(timed_out) => Outcome::TimedOut(timed_out),
            Failure::Cancelled(cancelled) => Outcome::Cancelled(cancelled),
        }
    }

    /// Returns the reason of the cancellation, if the job was cancelled.
    pub(crate) fn cancel_reason(&self) -> Option<CancelReason> {
        match self {
            Outcome::Cancelled(cancelled) => Some(cancelled.reason()),
            Outcome::Completed(_)
            | Outcome::Failed(_)
            | Outcome::Panicked(_)
            | Outcome::TimedOut(_) => None,
        }
    }

    /// Returns whether dropping this runs a destructor of the job.
    pub(crate) fn has_destructor(&self) -> bool {
        match self {
            Outcome::Completed(_) => needs_drop::<T>(),
            Outcome::Failed(_) => needs_drop::<E>(),
            Outcome::Panicked(_) => true,
            Outcome::TimedOut(timed_out) => timed_out.panic().is_some(),
            Outcome::Cancelled(cancelled) => cancelled.panic().is_some(),
        }
    }

    /// Converts the outcome into a `Result`, for `?` and for code that wants an [`Error`].
    ///
    /// ```
    /// use tower_sentinel::{Outcome, Panic};
    ///
    /// let outcome: Outcome<(), std::io::Error> = Outcome::Panicked(Panic::new("index 7"));
    /// assert_eq!(outcome.into_result().unwrap_err().to_string(), "the job panicked: index 7");
    /// ```
    ///
    /// # Errors
    ///
    /// Every outcome but [`Completed`](Outcome::Completed) is a [`Failure`].
    pub fn into_result(self) -> Result<T, Failure<E>> {
        match self {
            Outcome::Completed(value) => Ok(value),
            Outcome::Failed(error) => Err(Failure::Failed(error)),
            Outcome::Panicked(panic) => Err(Failure::Panicked(panic)),
            Outcome::TimedOut(timed_out) => Err(Failure::TimedOut(timed_out)),
            Outcome::Cancelled(cancelled) => Err(Failure::Cancelled(cancelled)),
        }
    }
}

impl<T, E> From<Result<T, E>> for Outcome<T, E> {
    fn from(result: Result<T, E>) -> Self {
        match result {
            Ok(value) => Outcome::Completed(value),
            Err(error) => Outcome::Failed(error),
        }
    }
}

/// Kind of an [`Outcome`], without its content, for counters and log fields.
///
/// ```
/// use tower_sentinel::{Outcome, outcome::OutcomeKind};
///
/// let outcome = Outcome::<_, ()>::Completed(42);
/// assert_eq!(outcome.kind(), OutcomeKind::Completed);
/// assert_eq!(outcome.kind().as_str(), "completed");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum OutcomeKind {
    /// See [`Outcome::Completed`].
    Completed,
    /// See [`Outcome::Failed`].
    Failed,
    /// See [`Outcome::Panicked`].
    Panicked,
    /// See [`Outcome::TimedOut`].
    TimedOut,
    /// See [`Outcome::Cancelled`].
    Cancelled,
}

impl OutcomeKind {
    /// Returns the name in snake case, as for a log field.
    pub fn as_str(self) -> &'static str {
        match self {
            OutcomeKind::Completed => "completed",
            OutcomeKind::Failed => "failed",
            OutcomeKind::Panicked => "panicked",
            OutcomeKind::TimedOut => "timed_out",
            OutcomeKind::Cancelled => "cancelled",
        }
    }
}

impl fmt::Display for OutcomeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// An [`Outcome`] that is not [`Completed`](Outcome::Completed), as an error.
#[derive(Debug)]
pub enum Failure<E> {
    /// See [`Outcome::Failed`].
    Failed(E),
    /// See [`Outcome::Panicked`].
    Panicked(Panic),
    /// See [`Outcome::TimedOut`].
    TimedOut(TimedOut),
    /// See [`Outcome::Cancelled`].
    Cancelled(Cancelled),
}

impl<E: fmt::Display> fmt::Display for Failure<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Failed(error) => write!(f, "the job failed: {error}"),
            Failure::Panicked(panic) => write!(f, "the job panicked: {}", panic.message()),
            Failure::TimedOut(timed_out) => timed_out.fmt(f),
            Failure::Cancelled(cancelled) => cancelled.fmt(f),
        }
    }
}

impl<E: fmt::Debug + fmt::Display + 'static> Error for Failure<E> {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Failure::Failed(error) => boxed_source(error),
            Failure::Panicked(_) => None,
            Failure::TimedOut(timed_out) => timed_out.source(),
            Failure::Cancelled(cancelled) => cancelled.source(),
        }
    }
}

/// Returns the error inside a `BoxError`, and `None` for any other error.
///
/// `E: Error` is not required, since `BoxError` does not implement `Error` itself. The inner error is
/// always part of the `Display` of its wrapper.
pub(crate) fn boxed_source<E: 'static>(error: &E) -> Option<&(dyn Error + 'static)> {
    let error: &dyn Any = error;
    let boxed = error.downcast_ref::<Box<dyn Error + Send + Sync>>()?;
    Some(&**boxed)
}
