//! [`Settle`]: what a broker can be told of a delivery, and the [`Verdict`] that says what.

use std::{error::Error, fmt, future::Future, time::Duration};

use crate::{
    outcome::{Outcome, OutcomeKind},
    telemetry::Messaging,
};

/// What to tell the broker of a delivery.
///
/// The enum is exhaustive on purpose: an implementation of [`Settle`] that forgets one of the five
/// does not compile.
///
/// `Retry` and `Release` both give the job back. They differ in whether a failed attempt is
/// charged: RabbitMQ's quorum queues count a `basic.reject` toward the delivery limit and (from
/// 4.3 on) not a `basic.nack`, and Redis 8.8's `XNACK` has FAIL and SILENT.
///
/// Without a delay either may be delivered again at once. A worker that releases each job while a
/// dependency is down goes round with its broker as fast as they can: release with a delay, or let
/// an [`IntensityLayer`](crate::IntensityLayer) pause the worker.
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
        /// How long the broker keeps the job from being delivered again; at once for `None`.
        after: Option<Duration>,
    },
    /// Gives the job back unprocessed, so that no attempt is counted: for a drain, a shutdown, a
    /// dependency that is down.
    Release {
        /// How long the broker keeps the job from being delivered again; at once for `None`.
        after: Option<Duration>,
    },
    /// Dead-letters the job, or drops it, as the queue is set up.
    #[doc(alias = "dead letter")]
    Reject,
    /// Sends nothing: the job is somebody else's now, as after a lost lease.
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

    /// Returns the delay of a `Retry` or a `Release`, if it has one: zero is none.
    pub(crate) fn delay(self) -> Option<Duration> {
        match self {
            Verdict::Retry { after } | Verdict::Release { after } => {
                after.filter(|delay| !delay.is_zero())
            }
            Verdict::Ack | Verdict::Reject | Verdict::Abandon => None,
        }
    }

    /// Returns the name in snake case, as for a log field; without the delay.
    pub fn as_str(self) -> &'static str {
        match self {
            Verdict::Ack => "ack",
            Verdict::Retry { .. } => "retry",
            Verdict::Release { .. } => "release",
            Verdict::Reject => "reject",
            Verdict::Abandon => "abandon",
        }
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

/// A tag that its broker can be answered for.
///
/// Implemented by what a broker's client hands out with a delivery. A tag is used up by
/// [`settle`](Settle::settle); clones of a tag answer for the same delivery, and all but the first
/// settlement are refused locally.
///
/// # Contract
///
/// - A verdict that the broker cannot do natively is emulated as the implementation documents, or
///   refused with a typed error; it is never turned into another one in silence. The
///   [`capabilities`](Settle::capabilities) say which.
/// - A settlement that may be tried again gives the tag back, in [`Unsettled::tag`]. Where none
///   comes back, or the future is dropped half-way, the channel is to be given up, so that the
///   broker redelivers what has no answer; unless the failure is [`moot`](Unsettled::moot).
/// - Nothing is sent for a tag of an earlier connection: that is an error.
/// - To drop a tag answers nothing.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a tag that can be settled",
    label = "no broker can be answered by this tag",
    note = "implement `tower_sentinel::Settle` for `{Self}`, or use the jobs of a broker, whose tags do"
)]
#[doc(alias = "ack")]
#[doc(alias = "acknowledge")]
#[doc(alias = "nack")]
pub trait Settle: Sized {
    /// Why a settlement, or a keep-alive, failed.
    type Error: Error + Send + Sync + 'static;

    /// The future of a settlement.
    type Future: Future<Output = Result<(), Unsettled<Self, Self::Error>>> + Send;

    /// Tells the broker `verdict`; `reason` is for what it keeps, such as a dead letter's headers.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: if the future is dropped, the broker may or may not have the answer.
    fn settle(self, verdict: Verdict, reason: Reason) -> Self::Future;

    /// Asks the broker for more time before it redelivers the job.
    ///
    /// Only asked where [`Capabilities::has_keep_alive`].
    fn keep_alive(&self) -> impl Future<Output = Result<Lease, Self::Error>> + Send;

    /// Returns how often the job was delivered, this time included, if the broker tells.
    fn deliveries(&self) -> Option<u32>;

    /// Returns whether the job was delivered before, if the broker tells.
    fn redelivered(&self) -> Option<bool> {
        self.deliveries().map(|deliveries| deliveries > 1)
    }

    /// Returns what the broker can do for this delivery.
    fn capabilities(&self) -> Capabilities;

    /// Returns what traces are to say of the delivery; nothing by default.
    ///
    /// Only asked where a span that says it is enabled.
    fn messaging(&self) -> Option<Messaging<'_>> {
        None
    }
}

/// Whether a job still belongs to the worker that asked to keep it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lease {
    /// The broker waits on.
    Held,
    /// The broker gave the job to somebody else, or will: nothing may be answered for it.
    Lost,
}

/// What a broker can do for a delivery.
///
/// ```
/// use tower_sentinel::{Capabilities, Verdict};
/// use std::time::Duration;
///
/// let classic_queue = Capabilities::none().free_release();
/// assert!(classic_queue.release_is_free());
/// assert!(!classic_queue.can(Verdict::retry_after(Duration::from_secs(1))));
/// assert!(classic_queue.delay().can(Verdict::retry_after(Duration::from_secs(1))));
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
    /// Returns the capabilities of a broker that can only ack, give back and reject.
    pub fn none() -> Self {
        Self::default()
    }

    /// Adds that a [`Verdict::Release`] charges no attempt, whether or not it has a delay.
    pub fn free_release(mut self) -> Self {
        self.free_release = true;
        self.free_delayed_release()
    }

    /// Adds that a [`Verdict::Release`] with a delay charges no attempt.
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

    /// Adds that a job can be [kept alive](Settle::keep_alive).
    pub fn keep_alive(mut self) -> Self {
        self.keep_alive = true;
        self
    }

    /// Returns whether a [`Verdict::Release`] charges no attempt, whether or not it has a delay.
    pub fn release_is_free(self) -> bool {
        self.free_release
    }

    /// Returns whether `verdict` is counted as an attempt: a `Retry`, or a `Release` that is not
    /// free.
    ///
    /// ```
    /// use tower_sentinel::{Capabilities, Verdict};
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

    /// Returns whether a job can be [kept alive](Settle::keep_alive).
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

/// Why a verdict was given: what a broker can keep with a dead letter.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Reason {
    /// Which outcome the job had.
    pub kind: OutcomeKind,
    /// The error, the panic's message or what stopped the job; none for a completed job.
    pub message: Option<String>,
    /// The time from the sentinel's `call` to the outcome.
    pub elapsed: Duration,
}

impl Reason {
    /// Creates the reason of a completed job.
    pub fn completed(elapsed: Duration) -> Self {
        Self {
            kind: OutcomeKind::Completed,
            message: None,
            elapsed,
        }
    }

    /// Returns the reason that `outcome` gives.
    ///
    /// ```
    /// use std::time::Duration;
    /// use tower_sentinel::{Outcome, Panic, Reason};
    ///
    /// let outcome = Outcome::<(), std::io::Error>::Panicked(Panic::new("index 7"));
    /// let reason = Reason::of(&outcome, Duration::ZERO);
    /// assert_eq!(reason.message.as_deref(), Some("index 7"));
    /// ```
    pub fn of<T, E: fmt::Display>(outcome: &Outcome<T, E>, elapsed: Duration) -> Self {
        let message = match outcome {
            Outcome::Completed(_) => None,
            Outcome::Failed(error) => Some(error.to_string()),
            Outcome::Panicked(panic) => Some(panic.message().to_owned()),
            Outcome::TimedOut(timed_out) => Some(timed_out.to_string()),
            Outcome::Cancelled(cancelled) => Some(cancelled.to_string()),
        };
        let kind = outcome.kind();
        Self {
            kind,
            message,
            elapsed,
        }
    }
}

/// A settlement that failed.
///
/// Its four forms say what is left to do: to try [`again`](Self::again); to give up the channel,
/// after the [`last`](Self::last) try; nothing, as it is [`moot`](Self::moot); or to stop, as the
/// worker is [`misconfigured`](Self::misconfigured).
#[derive(Clone, Debug)]
pub struct Unsettled<Tag, E> {
    /// The tag, if it may be settled again.
    ///
    /// `None` where the try used it up: RabbitMQ's acker is gone before the answer is sent.
    pub tag: Option<Tag>,
    /// Why it failed.
    pub error: E,
    reach: Reach,
}

/// How far a failed settlement reaches beyond its delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    /// The broker waits for no settlement of the delivery.
    Delivery,
    /// The broker may wait as long as the channel lives.
    Channel,
    /// A new channel meets the same failure.
    Consumer,
}

impl<Tag, E> Unsettled<Tag, E> {
    /// Creates a failure after which `tag` may be settled again.
    pub fn again(tag: Tag, error: E) -> Self {
        Self::new(Some(tag), error, Reach::Channel)
    }

    /// Creates a failure that used the tag up: the broker may wait for a settlement until the
    /// channel is given up.
    pub fn last(error: E) -> Self {
        Self::new(None, error, Reach::Channel)
    }

    /// Creates a failure that costs the broker nothing: it waits for no settlement of the delivery
    /// any more, as after the end of its lease.
    ///
    /// The job may run once more. The channel and its other jobs go on.
    ///
    /// ```
    /// use std::io;
    /// use tower_sentinel::Unsettled;
    ///
    /// let unsettled = Unsettled::<u64, _>::moot(io::Error::other("the lease is over"));
    /// assert!(unsettled.is_moot());
    /// assert!(unsettled.tag.is_none());
    /// ```
    pub fn moot(error: E) -> Self {
        Self::new(None, error, Reach::Delivery)
    }

    /// Creates a failure that each delivery meets until somebody mends the configuration, such as a
    /// missing right: the channel is to be given up, and a new one does not help.
    pub fn misconfigured(error: E) -> Self {
        Self::new(None, error, Reach::Consumer)
    }

    fn new(tag: Option<Tag>, error: E, reach: Reach) -> Self {
        Self { tag, error, reach }
    }

    /// Returns whether it is [`moot`](Self::moot).
    pub fn is_moot(&self) -> bool {
        self.reach == Reach::Delivery
    }

    /// Returns whether it is [`misconfigured`](Self::misconfigured).
    pub fn is_misconfigured(&self) -> bool {
        self.reach == Reach::Consumer
    }

    /// Returns the same failure of another tag, for a tag that wraps another.
    pub fn map_tag<T>(self, wrap: impl FnOnce(Tag) -> T) -> Unsettled<T, E> {
        Unsettled {
            tag: self.tag.map(wrap),
            error: self.error,
            reach: self.reach,
        }
    }

    pub(crate) fn reach(&self) -> Reach {
        self.reach
    }
}

impl<Tag, E: fmt::Display> fmt::Display for Unsettled<Tag, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the delivery is not settled: {}", self.error)
    }
}

impl<Tag: fmt::Debug, E: Error + 'static> Error for Unsettled<Tag, E> {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&self.error)
    }
}

/// What a [`SettlePolicy`](crate::SettlePolicy) answers: how a job was settled.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Settled {
    /// Which outcome the job had.
    pub kind: OutcomeKind,
    /// What the broker was told.
    pub verdict: Verdict,
    /// Whether the broker counts this as an attempt: a `Retry`, or a `Release` that is not free.
    pub charged: bool,
    /// Whether the job was gone when it was settled.
    pub stopped: bool,
    /// The tag, as its `Debug` prints it, of a job that was not gone.
    pub tag: Option<Box<str>>,
    /// The time from the sentinel's `call` to the outcome.
    pub elapsed: Duration,
}
