//! [`Cause`] of a stop, and the [`Ladder`] by which a job is stopped.

use std::time::Duration;

use crate::{
    cancel::{Request, Stopping},
    outcome::{CancelReason, Outcome, Stop},
};

/// The durations of the ladder by which a job is stopped.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ladder {
    /// From telling the job to aborting it.
    pub(crate) grace: Duration,
    /// From aborting the job to giving up on its end.
    pub(crate) stop_wait: Duration,
}

/// The cause of a job's stop.
#[derive(Clone, Copy)]
pub(super) enum Cause {
    TimeLimit(Duration),
    Cancelled(CancelReason),
    /// Cancelled by a guard that is dropped as a panic unwinds. If that panic ends the job, it
    /// came first.
    Unwinding(CancelReason),
}

impl From<Request> for Cause {
    fn from(request: Request) -> Self {
        match request.unwinding {
            true => Cause::Unwinding(request.reason),
            false => Cause::Cancelled(request.reason),
        }
    }
}

impl Cause {
    pub(super) fn stopping(self) -> Stopping {
        match self {
            Cause::TimeLimit(_) => Stopping::TimeLimit,
            Cause::Cancelled(_) => Stopping::Cancelled,
            Cause::Unwinding(_) => Stopping::Unwinding,
        }
    }

    pub(super) fn into_outcome<T, E>(self, stop: Stop) -> Outcome<T, E> {
        match self {
            Cause::TimeLimit(limit) => Outcome::TimedOut(stop.into_timed_out(limit)),
            Cause::Cancelled(reason) | Cause::Unwinding(reason) => {
                Outcome::Cancelled(stop.into_cancelled(reason))
            }
        }
    }
}
