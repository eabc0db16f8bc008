//! [`Settle`], the handle to one delivery, and the [`Verdict`]s that settle it.

use std::{error::Error, fmt, future::Future, time::SystemTime};

mod attempts;
mod capabilities;
pub mod decision;
mod error;
pub(crate) mod events;
pub(crate) mod policy;
mod reason;
mod spans;
mod verdict;

pub use self::{
    attempts::SettleFuture,
    capabilities::Capabilities,
    error::SettleError,
    policy::SettlePolicy,
    reason::{Reason, Settled},
    spans::{ProcessSpan, process_span},
    verdict::{Verdict, VerdictKind},
};
pub use crate::telemetry::messaging::Messaging;

#[doc(alias = "ack")]
#[doc(alias = "acknowledge")]
#[doc(alias = "nack")]
/// Handle to one delivery that can be acked, retried, released or rejected.
///
/// A broker's client implements it for the tag that it hands out with a delivery. [`settle`](Settle::settle)
/// uses the tag up. Clones of a tag are handles to the same delivery: all settlements but the first are
/// refused locally.
///
/// # Contract
///
/// - A verdict that the broker cannot do natively is emulated as the implementation documents, or
///   refused with a typed error. It is never replaced by another verdict in silence. The
///   [`capabilities`](Settle::capabilities) say which verdicts can be carried out.
/// - A settlement that may be tried again gives the tag back, in [`Unsettled::tag`]. If no tag comes
///   back, or the future is dropped half-way, the channel must be given up, so that the broker
///   redelivers the unsettled jobs. The exception is a failure that is [`moot`](Unsettled::moot).
/// - Nothing is sent for a tag of an earlier connection: that is an error.
/// - Dropping a tag sends nothing and settles nothing.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a tag that can be settled",
    label = "this tag cannot settle a delivery",
    note = "implement `tower_sentinel::settle::Settle` for `{Self}`, or use the jobs of a broker, whose tags do"
)]
///
/// # Examples
///
/// The tag of a broker that counts deliveries and has leases, and whose client does all that can fail:
///
/// ```
/// # struct Client;
/// # impl Client {
/// #     async fn answer(&self, _: u64, _: &str) -> std::io::Result<()> { Ok(()) }
/// #     async fn extend(&self, _: u64) -> std::io::Result<bool> { Ok(true) }
/// # }
/// use std::{future::Future, io, pin::Pin, sync::Arc, time::{Duration, SystemTime}};
/// use tower_sentinel::{
///     Verdict,
///     settle::{Capabilities, Lease, Messaging, Reason, Settle, Unsettled},
/// };
///
/// #[derive(Clone)]
/// struct Tag { client: Arc<Client>, number: u64, deliveries: u32, published: SystemTime }
///
/// impl Settle for Tag {
///     type Error = io::Error;
///     type Future = Pin<Box<dyn Future<Output = Result<(), Unsettled<Self, io::Error>>> + Send>>;
///
///     fn settle(self, verdict: Verdict, _: Reason) -> Self::Future {
///         Box::pin(async move {
///             let answered = self.client.answer(self.number, verdict.as_str()).await;
///             answered.map_err(|error| Unsettled::again(self, error))
///         })
///     }
///
///     async fn keep_alive(&self) -> io::Result<Lease> {
///         match self.client.extend(self.number).await? {
///             true => Ok(Lease::Held),
///             false => Ok(Lease::Lost),
///         }
///     }
///
///     fn deliveries(&self) -> Option<u32> { Some(self.deliveries) }
///     fn redelivered(&self) -> Option<bool> { Some(self.deliveries > 1) }
///     fn is_suspect(&self) -> bool { false } // the broker has no queue for them
///     fn capabilities(&self) -> Capabilities { Capabilities::none().delay().dead_letter().keep_alive() }
///     fn messaging(&self) -> Option<Messaging<'_>> { Some(Messaging::new("acme", "orders")) }
///     fn published_at(&self) -> Option<SystemTime> { Some(self.published) }
/// }
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// let tag = Tag { client: Arc::new(Client), number: 7, deliveries: 2, published: SystemTime::now() };
/// assert_eq!(tag.redelivered(), Some(true));
/// assert_eq!(tag.keep_alive().await.unwrap(), Lease::Held);
/// assert!(tag.settle(Verdict::Ack, Reason::completed(Duration::from_secs(1))).await.is_ok());
/// # }
/// ```
pub trait Settle: Sized {
    /// The error of a settlement or a keep-alive.
    type Error: Error + Send + Sync + 'static;

    /// The future of a settlement.
    type Future: Future<Output = Result<(), Unsettled<Self, Self::Error>>> + Send;

    /// Settles the delivery with `verdict`.
    ///
    /// `reason` is for records that the broker keeps, such as the headers of a dead letter.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: if the future is dropped, the settlement may or may not have reached the broker.
    fn settle(self, verdict: Verdict, reason: Reason) -> Self::Future;

    /// Asks the broker for more time before it redelivers the job.
    ///
    /// Only called where [`Capabilities::has_keep_alive`].
    fn keep_alive(&self) -> impl Future<Output = Result<Lease, Self::Error>> + Send;

    /// Returns how often the job was delivered, this time included, if the broker reports it.
    fn deliveries(&self) -> Option<u32>;

    /// Returns whether the job was delivered before, if the broker reports it.
    ///
    /// The default derives it from the count. That is wrong after a release that counts no attempt, so
    /// implement it if the broker reports a redelivery.
    fn redelivered(&self) -> Option<bool> {
        self.deliveries().map(|deliveries| deliveries > 1)
    }

    /// Returns whether the job may have taken its worker down: it was delivered before, no outcome of that
    /// delivery is known, and there is a queue for such suspects; `false` by default.
    ///
    /// [`SentinelLayer::delivery_limit`](crate::SentinelLayer::delivery_limit) does not run a suspect. Its
    /// [`Reject`](Verdict::Reject), with a reason that [says so](Reason::is_suspect), moves it to the queue
    /// of the suspects, where it counts from one again. Each of them is [delivered
    /// alone](crate::_guide::isolation#which-job-killed-the-worker) there.
    fn is_suspect(&self) -> bool {
        false
    }

    /// Returns the capabilities of the broker for this delivery.
    fn capabilities(&self) -> Capabilities;

    /// Returns the description of the delivery for traces and metrics; `None` by default.
    ///
    /// Only called where a span or an event that uses it is enabled, and, with the feature `metrics`, for the
    /// labels of a [policy's](crate::SettlePolicy) metrics: there for the first settlement alone.
    fn messaging(&self) -> Option<Messaging<'_>> {
        None
    }

    /// Returns the time at which the message was published, if it is known; `None` by default.
    ///
    /// It is the time of the first publish, also for a job that was published anew for its next try, as far as
    /// the implementation documents. Only called for the [span](ProcessSpan) of a job, where that is enabled.
    fn published_at(&self) -> Option<SystemTime> {
        None
    }
}

/// Result of a keep-alive: the job still belongs to the worker that asked, or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lease {
    /// The job is still this worker's: the broker goes on waiting.
    Held,
    /// The broker gave the job to another worker, or will: this worker must not settle it any more.
    Lost,
}

/// A settlement that failed.
///
/// It has four forms, one for each next step:
///
/// - [`again`](Self::again): try again;
/// - [`last`](Self::last): give up the channel;
/// - [`moot`](Self::moot): do nothing;
/// - [`misconfigured`](Self::misconfigured): stop the worker.
///
/// ```
/// use std::io::{Error, ErrorKind};
/// use tower_sentinel::settle::Unsettled;
///
/// let lost: Unsettled<u64, _> = Unsettled::last(Error::from(ErrorKind::BrokenPipe));
/// assert!(lost.tag.is_none());
///
/// let refused = Unsettled::<u64, _>::misconfigured(Error::from(ErrorKind::PermissionDenied));
/// assert!(refused.is_misconfigured() && !refused.is_moot());
///
/// // A tag around another passes on what that one says.
/// let late = Unsettled::again(7, Error::from(ErrorKind::TimedOut)).map_tag(|tag| ("orders", tag));
/// assert_eq!(late.tag, Some(("orders", 7)));
/// ```
#[derive(Clone, Debug)]
pub struct Unsettled<Tag, E> {
    /// The tag, if it may be settled again.
    ///
    /// `None` if the try used it up: RabbitMQ's acker is gone before the ack is sent.
    pub tag: Option<Tag>,
    /// The cause of the failure.
    pub error: E,
    reach: Reach,
}

/// Scope of a failed settlement, beyond its delivery.
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

    /// Creates a failure that used the tag up.
    ///
    /// The broker may wait for a settlement until the channel is given up.
    pub fn last(error: E) -> Self {
        Self::new(None, error, Reach::Channel)
    }

    /// Creates a failure that costs nothing: the broker does not wait for a settlement of this delivery
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
    /// missing permission.
    ///
    /// The channel must be given up, and a new channel does not help.
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

    /// Returns the same failure with its tag wrapped, for a tag that wraps another.
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
