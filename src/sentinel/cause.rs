//! [`Cause`] of a stop, and the [`Ladder`] of steps that stop a job.

use std::time::Duration;

use crate::{
    cancel::{Request, Stopping},
    outcome::{CancelReason, Failure, Stop},
};

/// Durations of the ladder of steps that stop a job.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ladder {
    /// Time from telling the job to stop until it is aborted.
    pub(crate) grace: Duration,
    /// Time from the abort until the sentinel no longer waits for the job to end.
    pub(crate) stop_wait: Duration,
}

/// Cause of a job's stop.
#[derive(Clone, Copy)]
pub(super) enum Cause {
    TimeLimit(Duration),
    Cancelled(CancelReason),
    /// Cancelled by a guard that is dropped while a panic unwinds. If that panic ends the job, the panic came
    /// first.
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

    pub(super) fn into_outcome<E>(self, stop: Stop) -> Failure<E> {
        match self {
            Cause::TimeLimit(limit) => Failure::TimedOut(stop.into_timed_out(limit)),
            Cause::Cancelled(reason) | Cause::Unwinding(reason) => {
                Failure::Cancelled(stop.into_cancelled(reason))
            }
        }
    }
}
