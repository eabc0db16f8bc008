//! [`TimedOut`] and [`Cancelled`]: jobs that were stopped.

use std::{error::Error, fmt, time::Duration};

use super::Panic;

/// Outcome of a job that passed its time limit.
///
/// The job may still be running: see [`stopped`](TimedOut::stopped).
///
/// ```
/// use std::time::Duration;
/// use tower_sentinel::outcome::TimedOut;
///
/// // As a policy's test makes it: the job blocks its thread.
/// let timed_out = TimedOut::new(Duration::from_secs(30), false);
/// assert_eq!(timed_out.limit(), Duration::from_secs(30));
/// assert!(timed_out.started() && !timed_out.stopped());
/// assert!(timed_out.panic().is_none());
/// assert_eq!(timed_out.to_string(), "the job passed its time limit of 30s; it is still running");
///
/// assert!(!TimedOut::new(Duration::from_secs(30), true).never_started().started());
/// ```
#[derive(Debug)]
pub struct TimedOut {
    limit: Duration,
    stop: Stop,
}

impl TimedOut {
    /// Creates the outcome of a job that passed `limit`, for tests of a policy.
    ///
    /// `stopped` is `true` if the job had stopped running when the policy was called.
    pub fn new(limit: Duration, stopped: bool) -> Self {
        let stop = Stop::new(stopped);
        Self { limit, stop }
    }

    /// Returns the limit that the job passed, counted from the sentinel's `call`.
    pub fn limit(&self) -> Duration {
        self.limit
    }

    /// Returns whether the job had really stopped running when the policy was called.
    ///
    /// `false` means that it was still running after the layer's
    /// [`stop_wait`](crate::SentinelLayer::stop_wait). Either it blocks its thread, since an abort acts only
    /// at an `.await`, or it blocks the thread of a [`spawn_blocking`](crate::spawn_blocking). From then on
    /// it may run at the same time as the next delivery of the same job.
    pub fn stopped(&self) -> bool {
        self.stop.stopped
    }

    /// Returns whether the service was called.
    ///
    /// `false` means that no thread of the runtime was free for the job within its limit. The service was
    /// not called, and never will be for this delivery. [`stopped`](Self::stopped) is `true`, and the job
    /// can be released, so that no attempt counts.
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

    /// Turns this into the outcome of a job that never started, for tests of a policy.
    pub fn never_started(mut self) -> Self {
        self.stop.started = false;
        self
    }

    /// Returns the panic of the job, if it panicked after the request to stop: in its grace or in a
    /// destructor.
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

/// Outcome of a job that was stopped for a reason other than its time limit.
///
/// ```
/// use tower_sentinel::outcome::{CancelReason, Cancelled};
///
/// // As a policy's test makes it.
/// let cancelled = Cancelled::new(CancelReason::Shutdown, true);
/// assert_eq!(cancelled.reason(), CancelReason::Shutdown);
/// assert!(cancelled.started() && cancelled.stopped());
/// assert!(cancelled.panic().is_none());
///
/// let cancelled = cancelled.never_started();
/// assert_eq!(cancelled.to_string(), "the job was cancelled: shutdown; it never started");
/// ```
#[derive(Debug)]
pub struct Cancelled {
    reason: CancelReason,
    stop: Stop,
}

impl Cancelled {
    /// Creates the outcome of a job that was cancelled for `reason`, for tests of a policy.
    ///
    /// `stopped` is `true` if the job had stopped running when the policy was called.
    pub fn new(reason: CancelReason, stopped: bool) -> Self {
        let stop = Stop::new(stopped);
        Self { reason, stop }
    }

    /// Returns the reason of the cancellation.
    pub fn reason(&self) -> CancelReason {
        self.reason
    }

    /// Returns whether the job had really stopped running when the policy was called; see
    /// [`TimedOut::stopped`].
    pub fn stopped(&self) -> bool {
        self.stop.stopped
    }

    /// Returns whether the service was called; see [`TimedOut::started`].
    pub fn started(&self) -> bool {
        self.stop.started
    }

    /// Turns this into the outcome of a job that never started, for tests of a policy.
    pub fn never_started(mut self) -> Self {
        self.stop.started = false;
        self
    }

    /// Returns the panic of the job, if it panicked after the request to stop: in its grace or in a
    /// destructor.
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

/// End of a job that was requested to stop.
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

/// Reason for which a job was [`Cancelled`](crate::outcome::Cancelled).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CancelReason {
    /// The caller dropped the response future, under [`OnDrop::Abort`](crate::sentinel::OnDrop::Abort).
    CallerDropped,
    /// The token given to [`SentinelLayer::shutdown`](crate::SentinelLayer::shutdown) was
    /// cancelled.
    Shutdown,
    /// The broker gave the job to another worker.
    LeaseLost,
    /// The runtime that the job ran on, or was to run on, has ended.
    RuntimeGone,
    /// The job was delivered more often than
    /// [`SentinelLayer::delivery_limit`](crate::SentinelLayer::delivery_limit) allows, and was not
    /// run. Reject it: a retry or a release does not help, since it will not be run the next time either.
    DeliveryLimit,
    /// The job is a [suspect](crate::settle::Settle::is_suspect): it was delivered before, and no outcome of
    /// that delivery is known. [`SentinelLayer::delivery_limit`](crate::SentinelLayer::delivery_limit) has
    /// not run it. Reject it: then it goes to the queue of the suspects.
    Suspect,
    /// [`Cancellation::cancel`](crate::cancel::Cancellation::cancel) was called, and no other reason applies.
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
            CancelReason::Suspect => "suspect",
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
            CancelReason::Suspect => "delivered before, and no outcome of that is known",
            CancelReason::Requested => "requested",
        })
    }
}
