//! Why a job was stopped, and how it went down.

use std::{error::Error, fmt, time::Duration};

use super::Panic;

/// A job passed its time limit.
///
/// "Timed out" is not "stopped": see [`stopped`](TimedOut::stopped).
#[derive(Debug)]
pub struct TimedOut {
    limit: Duration,
    stop: Stop,
}

impl TimedOut {
    /// Creates the outcome of a job that passed `limit`, and of which `stopped` says whether it
    /// was gone when the policy was called.
    ///
    /// For tests of a policy.
    pub fn new(limit: Duration, stopped: bool) -> Self {
        let stop = Stop::new(stopped);
        Self { limit, stop }
    }

    /// Returns the limit that was passed, counted from the sentinel's `call`.
    pub fn limit(&self) -> Duration {
        self.limit
    }

    /// Returns whether the job was really gone when the policy was called.
    ///
    /// `false` means that it was still running after the layer's
    /// [`stop_wait`](crate::SentinelLayer::stop_wait), because it blocks its thread, as an abort acts
    /// at an `.await` only, or that of a [`spawn_blocking`](crate::spawn_blocking). Whatever it does
    /// from now on happens beside the next delivery of the same job.
    pub fn stopped(&self) -> bool {
        self.stop.stopped
    }

    /// Returns whether the service was called.
    ///
    /// `false` means that no thread of the runtime was free for the job within its limit. It was not
    /// called since, and never will be: [`stopped`](Self::stopped) is `true`, and the job can be given
    /// back without an attempt that counts.
    ///
    /// ```
    /// use std::time::Duration;
    /// use tower_sentinel::outcome::TimedOut;
    ///
    /// let timed_out = TimedOut::new(Duration::from_secs(30), true);
    /// assert!(timed_out.started());
    /// assert!(!timed_out.never_started().started());
    /// ```
    pub fn started(&self) -> bool {
        self.stop.started
    }

    /// Makes it the outcome of a job that never started.
    ///
    /// For tests of a policy.
    pub fn never_started(mut self) -> Self {
        self.stop.started = false;
        self
    }

    /// Returns the panic with which the job went down, if it panicked after it was told to stop:
    /// in its grace or in a destructor.
    pub fn panic(&self) -> Option<&Panic> {
        self.stop.panic.as_ref()
    }
}

impl fmt::Display for TimedOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the job passed its time limit of {:?}", self.limit)?;
        self.stop.fmt(f)
    }
}

impl Error for TimedOut {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.stop.source()
    }
}

/// A job was stopped for another reason than its time limit.
#[derive(Debug)]
pub struct Cancelled {
    reason: CancelReason,
    stop: Stop,
}

impl Cancelled {
    /// Creates the outcome of a job that was cancelled for `reason`, and of which `stopped` says
    /// whether it was gone when the policy was called.
    ///
    /// For tests of a policy.
    pub fn new(reason: CancelReason, stopped: bool) -> Self {
        let stop = Stop::new(stopped);
        Self { reason, stop }
    }

    /// Returns why the job was cancelled.
    pub fn reason(&self) -> CancelReason {
        self.reason
    }

    /// Returns whether the job was really gone when the policy was called; see
    /// [`TimedOut::stopped`].
    pub fn stopped(&self) -> bool {
        self.stop.stopped
    }

    /// Returns whether the service was called; see [`TimedOut::started`].
    pub fn started(&self) -> bool {
        self.stop.started
    }

    /// Makes it the outcome of a job that never started.
    ///
    /// For tests of a policy.
    pub fn never_started(mut self) -> Self {
        self.stop.started = false;
        self
    }

    /// Returns the panic with which the job went down, if it panicked after it was told to stop:
    /// in its grace or in a destructor.
    pub fn panic(&self) -> Option<&Panic> {
        self.stop.panic.as_ref()
    }
}

impl fmt::Display for Cancelled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the job was cancelled: {}", self.reason)?;
        self.stop.fmt(f)
    }
}

impl Error for Cancelled {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.stop.source()
    }
}

/// How a job that was told to stop went down.
#[derive(Debug)]
pub(crate) struct Stop {
    pub(crate) started: bool,
    pub(crate) stopped: bool,
    pub(crate) panic: Option<Panic>,
}

impl Stop {
    fn new(stopped: bool) -> Self {
        Self {
            started: true,
            stopped,
            panic: None,
        }
    }

    pub(crate) fn into_timed_out(self, limit: Duration) -> TimedOut {
        TimedOut { limit, stop: self }
    }

    pub(crate) fn into_cancelled(self, reason: CancelReason) -> Cancelled {
        Cancelled { reason, stop: self }
    }

    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.panic.as_ref().map(|panic| panic as _)
    }
}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.started, self.stopped) {
            (false, _) => f.write_str("; it never started"),
            (true, true) => Ok(()),
            (true, false) => f.write_str("; it is still running"),
        }
    }
}

/// Why a job was [`Cancelled`](crate::outcome::Cancelled).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CancelReason {
    /// The caller dropped the response future, under [`OnDrop::Abort`](crate::sentinel::OnDrop::Abort).
    CallerDropped,
    /// The token given to [`SentinelLayer::shutdown`](crate::SentinelLayer::shutdown) was
    /// cancelled.
    Shutdown,
    /// The broker gave the job to somebody else.
    LeaseLost,
    /// The runtime that the job ran on, or was to run on, has ended.
    RuntimeGone,
    /// The job was delivered more often than
    /// [`SentinelLayer::delivery_limit`](crate::SentinelLayer::delivery_limit) allows, and was not
    /// run. Reject it: given back, it is not run the next time either.
    DeliveryLimit,
    /// [`Cancellation::cancel`](crate::cancel::Cancellation::cancel) was called for no other reason.
    Requested,
}

impl CancelReason {
    /// Returns the name of the reason in snake case, as for a log field.
    ///
    /// ```
    /// assert_eq!(tower_sentinel::outcome::CancelReason::LeaseLost.as_str(), "lease_lost");
    /// ```
    pub fn as_str(self) -> &'static str {
        match self {
            CancelReason::CallerDropped => "caller_dropped",
            CancelReason::Shutdown => "shutdown",
            CancelReason::LeaseLost => "lease_lost",
            CancelReason::RuntimeGone => "runtime_gone",
            CancelReason::DeliveryLimit => "delivery_limit",
            CancelReason::Requested => "requested",
        }
    }
}

impl fmt::Display for CancelReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            CancelReason::CallerDropped => "the caller dropped the response future",
            CancelReason::Shutdown => "shutdown",
            CancelReason::LeaseLost => "the lease on the job was lost",
            CancelReason::RuntimeGone => "the runtime of the job is gone",
            CancelReason::DeliveryLimit => "delivered too often without an outcome",
            CancelReason::Requested => "requested",
        })
    }
}
