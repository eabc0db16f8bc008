//! [`Probe`]: the broker's own view of a subscription.

use std::{error::Error, fmt, future::Future, pin::Pin};

/// Future of a [`Subscription::probe`](crate::consumer::Subscription::probe), which borrows nothing from it.
pub type Probing = Pin<Box<dyn Future<Output = Result<Probe, ProbeError>> + Send>>;

/// Broker's own view of a subscription: the jobs that wait for it, and those that it has not settled.
///
/// An adapter makes it with the numbers that its broker reports, and leaves out the others:
///
/// ```
/// use tower_sentinel::consumer::Probe;
///
/// let probe = Probe::new().waiting(12).unsettled(3).detail("consumers", 2);
/// assert_eq!(probe.waiting, Some(12));
/// assert_eq!(probe.to_string(), "12 waiting, 3 unsettled, consumers: 2");
///
/// // A broker with leases that delivers nothing for now, and says why.
/// let probe = Probe::new().leases().hindrance("the group is paused");
/// assert_eq!(probe.hindrance.as_deref(), Some("the group is paused"));
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Probe {
    /// Number of jobs that wait for this subscription, at the broker or received and not taken, and could be taken at
    /// once; at least that many. `None` if the broker does not report it.
    pub waiting: Option<u64>,
    /// Number of jobs that the broker counts as delivered to this subscription and unsettled, without those that were
    /// [abandoned](crate::Verdict::Abandon). `None` if it does not report it.
    pub unsettled: Option<u64>,
    /// `true` if the broker takes an unsettled job back by itself, at the end of a lease. A
    /// [watchdog](crate::Consumer::watchdog) leaves it to the broker then.
    pub has_leases: bool,
    /// Reason why the broker delivers none of the jobs that wait, if it is known and a new session does not mend it.
    pub hindrance: Option<String>,
    /// Further numbers, for events.
    pub details: Vec<(&'static str, u64)>,
}

impl Probe {
    /// Creates it without a number.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the number of jobs that wait.
    #[must_use]
    pub fn waiting(mut self, jobs: u64) -> Self {
        self.waiting = Some(jobs);
        self
    }

    /// Sets the number of unsettled jobs.
    #[must_use]
    pub fn unsettled(mut self, jobs: u64) -> Self {
        self.unsettled = Some(jobs);
        self
    }

    /// States that the broker takes unsettled jobs back by itself.
    #[must_use]
    pub fn leases(mut self) -> Self {
        self.has_leases = true;
        self
    }

    /// Sets the reason why the broker delivers nothing.
    #[must_use]
    pub fn hindrance(mut self, reason: impl Into<String>) -> Self {
        self.hindrance = Some(reason.into());
        self
    }

    /// Adds a number under a name.
    #[must_use]
    pub fn detail(mut self, name: &'static str, number: u64) -> Self {
        self.details.push((name, number));
        self
    }
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.waiting {
            Some(waiting) => write!(f, "{waiting} waiting")?,
            None => f.write_str("unknown waiting")?,
        }
        if let Some(unsettled) = self.unsettled {
            write!(f, ", {unsettled} unsettled")?;
        }
        for (name, number) in &self.details {
            write!(f, ", {name}: {number}")?;
        }
        match &self.hindrance {
            Some(hindrance) => write!(f, "; {hindrance}"),
            None => Ok(()),
        }
    }
}

/// Error of a [`Subscription::probe`](crate::consumer::Subscription::probe); its source is the adapter's own error.
///
/// It is a response all the same: the broker, or the client, has refused.
#[derive(Debug)]
pub struct ProbeError {
    error: Box<dyn Error + Send + Sync>,
}

impl ProbeError {
    /// Creates it from the error of an adapter.
    pub fn new(error: impl Error + Send + Sync + 'static) -> Self {
        let error = Box::new(error);
        Self { error }
    }
}

impl fmt::Display for ProbeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the broker can't be probed")?;
        match f.alternate() {
            true => write!(f, ": {:#}", self.error),
            false => Ok(()),
        }
    }
}

impl Error for ProbeError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&*self.error)
    }
}
