//! [`Verdict`]: the ways to settle a delivery, and [`VerdictKind`], its name.

use std::{fmt, time::Duration};

/// One of the five ways to settle a delivery.
///
/// The enum is exhaustive on purpose: an implementation of [`Settle`](crate::settle::Settle) that forgets
/// one of the five does not compile.
///
/// `Retry` and `Release` both give the job back. The difference is the attempt: `Retry` counts it,
/// `Release` does not. RabbitMQ's quorum queues count a `basic.reject` toward the delivery limit and (from
/// 4.3 on) do not count a `basic.nack`; Redis 8.8's `XNACK` has FAIL and SILENT.
///
/// Without a delay both may be delivered again at once. A worker that releases each job while a
/// dependency is down gets the same jobs back at full speed. Release with a delay, or let an
/// [`IntensityLayer`](crate::IntensityLayer) pause the worker.
///
/// ```
/// use std::time::Duration;
/// use tower_sentinel::Verdict;
///
/// assert_eq!(Verdict::retry().to_string(), "retry");
/// assert_eq!(Verdict::retry_after(Duration::from_secs(5)).to_string(), "retry after 5s");
/// assert_eq!(Verdict::release_after(Duration::from_secs(60)).to_string(), "release after 60s");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[doc(alias = "nack")]
#[doc(alias = "requeue")]
pub enum Verdict {
    /// The job is done: the broker forgets it.
    Ack,
    /// Gives the job back after a failed attempt, which counts.
    Retry {
        /// Delay before the broker delivers the job again; `None` is at once.
        after: Option<Duration>,
    },
    /// Gives the job back unprocessed, so that no attempt is counted: for a drain, a shutdown, or a
    /// dependency that is down.
    Release {
        /// Delay before the broker delivers the job again; `None` is at once.
        after: Option<Duration>,
    },
    /// Dead-letters the job, or drops it, depending on the setup of the queue.
    #[doc(alias = "dead letter")]
    Reject,
    /// Sends nothing: the job belongs to another worker now, as after a lost lease.
    Abandon,
}

impl Verdict {
    /// Returns a `Retry` at once.
    pub const fn retry() -> Self {
        Verdict::Retry { after: None }
    }

    /// Returns a `Retry` after `delay`.
    pub const fn retry_after(delay: Duration) -> Self {
        Verdict::Retry { after: Some(delay) }
    }

    /// Returns a `Release` at once.
    pub const fn release() -> Self {
        Verdict::Release { after: None }
    }

    /// Returns a `Release` after `delay`.
    pub const fn release_after(delay: Duration) -> Self {
        Verdict::Release { after: Some(delay) }
    }

    /// Returns the delay of a `Retry` or a `Release`, if it has one; a delay of zero is none.
    pub(crate) fn delay(self) -> Option<Duration> {
        match self {
            Verdict::Retry { after } | Verdict::Release { after } => {
                after.filter(|delay| !delay.is_zero())
            }
            Verdict::Ack | Verdict::Reject | Verdict::Abandon => None,
        }
    }

    /// Returns the kind of the verdict, which has no delay.
    pub const fn kind(self) -> VerdictKind {
        match self {
            Verdict::Ack => VerdictKind::Ack,
            Verdict::Retry { .. } => VerdictKind::Retry,
            Verdict::Release { .. } => VerdictKind::Release,
            Verdict::Reject => VerdictKind::Reject,
            Verdict::Abandon => VerdictKind::Abandon,
        }
    }

    /// Returns the name in snake case, as for a log field, without the delay.
    pub const fn as_str(self) -> &'static str {
        self.kind().as_str()
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Verdict::Retry { after: Some(delay) } | Verdict::Release { after: Some(delay) } => {
                write!(f, "{} after {delay:?}", self.as_str())
            }
            verdict => f.pad(verdict.as_str()),
        }
    }
}

/// The kind of a [`Verdict`], without its delay: for counts, labels and log fields.
///
/// ```
/// use std::time::Duration;
/// use tower_sentinel::{Verdict, settle::VerdictKind};
///
/// let verdict = Verdict::retry_after(Duration::from_secs(5));
/// assert_eq!(verdict.kind(), VerdictKind::Retry);
/// assert_eq!(verdict.kind().to_string(), "retry");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum VerdictKind {
    /// [`Verdict::Ack`].
    Ack,
    /// [`Verdict::Retry`].
    Retry,
    /// [`Verdict::Release`].
    Release,
    /// [`Verdict::Reject`].
    Reject,
    /// [`Verdict::Abandon`].
    Abandon,
}

impl VerdictKind {
    /// The names of all kinds, by [`index`](Self::index).
    pub(crate) const NAMES: [&str; 5] = [
        VerdictKind::Ack.as_str(),
        VerdictKind::Retry.as_str(),
        VerdictKind::Release.as_str(),
        VerdictKind::Reject.as_str(),
        VerdictKind::Abandon.as_str(),
    ];

    /// Returns the place of the kind among all of them.
    pub(crate) const fn index(self) -> u8 {
        self as u8
    }

    /// Returns the name in snake case, as for a log field.
    pub const fn as_str(self) -> &'static str {
        match self {
            VerdictKind::Ack => "ack",
            VerdictKind::Retry => "retry",
            VerdictKind::Release => "release",
            VerdictKind::Reject => "reject",
            VerdictKind::Abandon => "abandon",
        }
    }
}

impl From<Verdict> for VerdictKind {
    fn from(verdict: Verdict) -> Self {
        verdict.kind()
    }
}

impl fmt::Display for VerdictKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}
