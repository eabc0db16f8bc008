//! [`Capabilities`]: the verdicts that a broker can carry out.

use crate::settle::verdict::Verdict;

/// Capabilities of a broker for one delivery: the verdicts that it can carry out, and how.
///
/// ```
/// use tower_sentinel::{Verdict, settle::Capabilities};
/// use std::time::Duration;
///
/// let classic_queue = Capabilities::none().free_release();
/// assert!(classic_queue.release_is_free());
/// assert!(!classic_queue.can(Verdict::retry_after(Duration::from_secs(1))));
/// assert!(classic_queue.delay().can(Verdict::retry_after(Duration::from_secs(1))));
///
/// let stream = Capabilities::none().delay().free_delayed_release().dead_letter().keep_alive();
/// assert!(stream.has_delay() && stream.has_dead_letter() && stream.has_keep_alive());
/// assert!(!stream.charges(Verdict::release_after(Duration::from_secs(1))));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    free_release: bool,
    free_delayed_release: bool,
    delay: bool,
    dead_letter: bool,
    keep_alive: bool,
}

impl Capabilities {
    /// Returns the capabilities of a broker that can only ack, retry and release without a delay, and
    /// reject.
    pub fn none() -> Self {
        Self::default()
    }

    /// Adds that a [`Verdict::Release`] counts no attempt, with or without a delay.
    pub fn free_release(mut self) -> Self {
        self.free_release = true;
        self.free_delayed_release()
    }

    /// Adds that a [`Verdict::Release`] with a delay counts no attempt.
    pub fn free_delayed_release(mut self) -> Self {
        self.free_delayed_release = true;
        self
    }

    /// Adds that a [`Verdict::Retry`] and a [`Verdict::Release`] can be delayed.
    pub fn delay(mut self) -> Self {
        self.delay = true;
        self
    }

    /// Adds that a [`Verdict::Reject`] is kept as a dead letter.
    pub fn dead_letter(mut self) -> Self {
        self.dead_letter = true;
        self
    }

    /// Adds that a job can be [kept alive](crate::settle::Settle::keep_alive).
    pub fn keep_alive(mut self) -> Self {
        self.keep_alive = true;
        self
    }

    /// Returns whether a [`Verdict::Release`] counts no attempt, with or without a delay.
    pub fn release_is_free(self) -> bool {
        self.free_release
    }

    /// Returns whether `verdict` is counted as an attempt: a `Retry`, or a `Release` that is not
    /// free.
    ///
    /// ```
    /// use tower_sentinel::{Verdict, settle::Capabilities};
    /// use std::time::Duration;
    ///
    /// let old_quorum_queue = Capabilities::none().delay().free_delayed_release();
    /// assert!(old_quorum_queue.charges(Verdict::release()));
    /// assert!(!old_quorum_queue.charges(Verdict::release_after(Duration::from_secs(60))));
    /// ```
    pub fn charges(self, verdict: Verdict) -> bool {
        match verdict {
            Verdict::Retry { .. } => true,
            Verdict::Release { .. } if verdict.delay().is_some() => !self.free_delayed_release,
            Verdict::Release { .. } => !self.free_release,
            Verdict::Ack | Verdict::Reject | Verdict::Abandon => false,
        }
    }

    /// Returns whether a [`Verdict::Retry`] and a [`Verdict::Release`] can be delayed.
    pub fn has_delay(self) -> bool {
        self.delay
    }

    /// Returns whether a [`Verdict::Reject`] is kept as a dead letter; it is dropped otherwise.
    pub fn has_dead_letter(self) -> bool {
        self.dead_letter
    }

    /// Returns whether a job can be [kept alive](crate::settle::Settle::keep_alive).
    pub fn has_keep_alive(self) -> bool {
        self.keep_alive
    }

    /// Returns whether `verdict` can be carried out, natively or as documented.
    pub fn can(self, verdict: Verdict) -> bool {
        match verdict {
            Verdict::Retry { after: Some(_) } | Verdict::Release { after: Some(_) } => self.delay,
            Verdict::Ack
            | Verdict::Retry { after: None }
            | Verdict::Release { after: None }
            | Verdict::Reject
            | Verdict::Abandon => true,
        }
    }
}
