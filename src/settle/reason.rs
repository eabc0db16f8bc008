//! [`Reason`] of a verdict, and [`Settled`], the response of a policy.

use std::{fmt, time::Duration};

use crate::{
    outcome::{CancelReason, Outcome, OutcomeKind},
    settle::{events::End, verdict::Verdict},
};

/// Reason for a verdict, which a broker can keep with a dead letter.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Reason {
    /// The kind of the job's outcome.
    pub kind: OutcomeKind,
    /// The error, the panic's message, or the reason why the job was stopped; `None` for a completed job.
    pub message: Option<String>,
    /// The reason of the cancellation; `None` for a job that was not [cancelled](OutcomeKind::Cancelled).
    pub cancelled: Option<CancelReason>,
    /// The time from the sentinel's `call` to the outcome.
    pub elapsed: Duration,
}

impl Reason {
    /// Creates the reason of a completed job.
    pub fn completed(elapsed: Duration) -> Self {
        Self {
            kind: OutcomeKind::Completed,
            message: None,
            cancelled: None,
            elapsed,
        }
    }

    /// Returns the reason that belongs to `outcome`.
    ///
    /// ```
    /// use std::time::Duration;
    /// use tower_sentinel::{Outcome, Panic, settle::Reason};
    ///
    /// let outcome = Outcome::<(), std::io::Error>::Panicked(Panic::new("index 7"));
    /// let reason = Reason::of(&outcome, Duration::ZERO);
    /// assert_eq!(reason.message.as_deref(), Some("index 7"));
    /// ```
    pub fn of<T, E: fmt::Display>(outcome: &Outcome<T, E>, elapsed: Duration) -> Self {
        let message = match outcome {
            Outcome::Failed(error) => Some(error.to_string()),
            _ => End::of(outcome).message(),
        };
        Self {
            kind: outcome.kind(),
            message,
            cancelled: outcome.cancel_reason(),
            elapsed,
        }
    }

    /// Returns whether the job is a [suspect](crate::settle::Settle::is_suspect) that was not run: a `Reject`
    /// moves it to the queue of the suspects, and not to the dead letters.
    pub fn is_suspect(&self) -> bool {
        self.cancelled == Some(CancelReason::Suspect)
    }
}

/// Response of a [`SettlePolicy`](crate::SettlePolicy): a job that was settled, and its verdict.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Settled {
    /// The kind of the job's outcome.
    pub kind: OutcomeKind,
    /// The reason of the cancellation; `None` for a job that was not [cancelled](OutcomeKind::Cancelled).
    pub cancelled: Option<CancelReason>,
    /// The verdict that the delivery was settled with.
    pub verdict: Verdict,
    /// `true` if the broker counts this as an attempt: a `Retry`, or a `Release` that is not free.
    pub charged: bool,
    /// `true` if the job had stopped running when it was settled.
    pub stopped: bool,
    /// The tag, as its `Debug` prints it, of a job that was still running.
    pub tag: Option<Box<str>>,
    /// The time from the sentinel's `call` to the outcome.
    pub elapsed: Duration,
}
