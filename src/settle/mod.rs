//! [`Settle`]: what a broker can be told of a delivery, and the [`Verdict`] that says what.

use std::{error::Error, fmt, future::Future};

mod attempts;
mod capabilities;
pub mod decision;
mod error;
pub(crate) mod events;
mod messaging;
mod policy;
mod reason;
mod spans;
mod verdict;

pub use self::{
    attempts::SettleFuture,
    capabilities::Capabilities,
    error::SettleError,
    messaging::Messaging,
    policy::SettlePolicy,
    reason::{Reason, Settled},
    spans::{ProcessSpan, process_span},
    verdict::{Verdict, VerdictKind},
};

#[doc(alias = "ack")]
#[doc(alias = "acknowledge")]
#[doc(alias = "nack")]
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
    note = "implement `tower_sentinel::settle::Settle` for `{Self}`, or use the jobs of a broker, whose tags do"
)]
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
    ///
    /// By default the count tells, which is wrong after a release that charges nothing: implement it
    /// where there is one.
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
    /// use tower_sentinel::settle::Unsettled;
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
