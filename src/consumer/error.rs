//! [`ConsumerError`]: the cause of a consumer's end, and its summary until then.

use std::{convert::Infallible, error::Error, fmt, time::Duration};

use super::{
    Summary,
    stall::{Stall, StallKind},
};
use crate::outcome::{Detail, Panic, boxed_source, drop_quietly, print};

/// Error of a [`Consumer`](crate::Consumer) that ended without a request, with the summary of its work.
///
/// `T` is the error of the stream, `E` that of the service and `C` that of connecting. When it is returned,
/// all running calls have been drained and the channel is closed.
///
/// ```
/// # use std::convert::Infallible;
/// # use tower::service_fn;
/// # use tower_sentinel::{SentinelLayer, SettlePolicy, ack_on_success, broker::memory::{Broker, Delivery}};
/// # async fn process(_: Delivery<u32>) -> Result<(), Infallible> { Ok(()) }
/// use tower_sentinel::{Consumer, consumer::EndCause};
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() {
/// # let broker = Broker::new();
/// # let queue = broker.queue("jobs").declare();
/// # let layer = SentinelLayer::new(SettlePolicy::new(ack_on_success()));
/// let deliveries = queue.subscribe(64).unwrap();
/// broker.drop_connections();
/// let error = Consumer::new(deliveries, service_fn(process)).sentinel(layer).await.unwrap_err();
/// assert!(error.cause().is_transient());
/// assert_eq!(error.summary().called, 0);
///
/// let (cause, summary) = error.into_parts();
/// assert!(matches!(cause, EndCause::Stream(_)));
/// assert_eq!(summary.unanswered, 0);
/// # }
/// ```
#[derive(Debug)]
pub struct ConsumerError<T, E, C = Infallible> {
    cause: EndCause<T, E, C>,
    // Boxed, since a `Result` with it is moved several times.
    summary: Box<Summary>,
}

impl<T, E, C> ConsumerError<T, E, C> {
    pub(super) fn new(cause: EndCause<T, E, C>, summary: Summary) -> Self {
        let summary = Box::new(summary);
        Self { cause, summary }
    }

    /// Returns the cause of the consumer's end.
    pub fn cause(&self) -> &EndCause<T, E, C> {
        &self.cause
    }

    /// Returns the summary of the consumer's work until then.
    pub fn summary(&self) -> &Summary {
        &self.summary
    }

    /// Returns the cause and the summary.
    pub fn into_parts(self) -> (EndCause<T, E, C>, Summary) {
        (self.cause, *self.summary)
    }
}

impl<T: fmt::Display, E: fmt::Display, C: fmt::Display> fmt::Display for ConsumerError<T, E, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (what, detail) = self.cause.describe();
        f.write_str("the consumer ended: ")?;
        detail.print_after(what, f)
    }
}

impl<T, E, C> Error for ConsumerError<T, E, C>
where
    T: fmt::Debug + fmt::Display + 'static,
    E: fmt::Debug + fmt::Display + 'static,
    C: fmt::Debug + fmt::Display + 'static,
{
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match &self.cause {
            EndCause::Stream(error) => boxed_source(error),
            EndCause::Unready(error)
            | EndCause::Failed(error)
            | EndCause::Unanswered(error)
            | EndCause::Misconfigured(error) => boxed_source(error),
            EndCause::Connect(error) => boxed_source(error),
            EndCause::StreamPanicked(panic)
            | EndCause::UnreadyPanicked(panic)
            | EndCause::CallPanicked(panic)
            | EndCause::ConnectPanicked(panic)
            | EndCause::MakeServicePanicked(panic) => Some(panic),
            EndCause::StreamEnded
            | EndCause::Stalled(_)
            | EndCause::ConnectTimedOut(_)
            | EndCause::RuntimeGone => None,
        }
    }
}

/// Cause of a consumer's end that was not requested.
#[derive(Debug)]
#[non_exhaustive]
pub enum EndCause<T, E, C = Infallible> {
    /// The stream ended, or its channel was closed, without an error.
    StreamEnded,
    /// The stream, or its channel, ended with this error.
    Stream(T),
    /// The stream panicked.
    StreamPanicked(Panic),
    /// The [watchdog](crate::Consumer::watchdog) found that the session makes no progress: the channel was given up.
    // Boxed, since it is the largest.
    Stalled(Box<Stall>),
    /// The service returned an error from `poll_ready`. No job was taken.
    Unready(E),
    /// The service panicked in `poll_ready`. No job was taken.
    UnreadyPanicked(Panic),
    /// A call failed without an effect on other calls, and the consumer is set to
    /// [stop](crate::consumer::AfterError::Stop) then.
    Failed(E),
    /// A call failed and its delivery may be unsettled: the channel was given up.
    Unanswered(E),
    /// A call failed, its delivery may be unsettled, and a new channel would not help. The channel was given
    /// up.
    Misconfigured(E),
    /// The service panicked in a call: the channel was given up.
    CallPanicked(Panic),
    /// The last attempt to connect failed.
    Connect(C),
    /// The last attempt to connect took longer than the
    /// [`connect_timeout`](crate::consumer::ReconnectingConsumer::connect_timeout).
    ConnectTimedOut(Duration),
    /// The last attempt to connect panicked.
    ConnectPanicked(Panic),
    /// The last attempt to make a service panicked.
    MakeServicePanicked(Panic),
    /// The runtime ended.
    RuntimeGone,
}

impl<T, E, C> EndCause<T, E, C> {
    /// Returns whether a new stream and a fresh service may help.
    pub fn is_transient(&self) -> bool {
        !matches!(self, EndCause::Misconfigured(_) | EndCause::RuntimeGone)
    }

    /// Returns whether a delivery may be unsettled that nobody can settle any more.
    pub fn is_unanswered(&self) -> bool {
        matches!(
            self,
            EndCause::Unanswered(_)
                | EndCause::Misconfigured(_)
                | EndCause::CallPanicked(_)
                | EndCause::Stalled(_)
        )
    }
}

impl<T, E, C> EndCause<T, E, C> {
    /// Returns one of two causes to report: the first, unless a reconnect would only meet the other one
    /// again.
    pub(super) fn or_graver(self, other: Option<Self>) -> Self {
        match other {
            Some(other) if self.is_transient() && !other.is_transient() => {
                drop_quietly(self);
                other
            }
            other => {
                drop_quietly(other);
                self
            }
        }
    }

    /// Returns one of two causes to report, if there are any; see [`or_graver`](Self::or_graver).
    pub(super) fn graver(cause: Option<Self>, other: Option<Self>) -> Option<Self> {
        match cause {
            Some(cause) => Some(cause.or_graver(other)),
            None => other,
        }
    }

    /// Returns whether the broker does not respond, so that no delivery can be settled.
    pub(super) fn is_silent(&self) -> bool {
        matches!(self, EndCause::Stalled(stall) if stall.kind == StallKind::Silent)
    }

    /// Returns whether the stream is over.
    pub(super) fn is_of_the_stream(&self) -> bool {
        matches!(
            self,
            EndCause::StreamEnded | EndCause::Stream(_) | EndCause::StreamPanicked(_)
        )
    }
}

impl<T: fmt::Display, E: fmt::Display, C: fmt::Display> EndCause<T, E, C> {
    /// Returns the text for an event, even if the `Display` of the error panics.
    pub(super) fn print(&self) -> String {
        print("error", self)
    }

    /// Returns what has happened, and its detail.
    fn describe(&self) -> (&'static str, Detail<'_>) {
        let what = match self {
            EndCause::StreamEnded => "the stream ended",
            EndCause::Stream(_) => "the stream failed",
            EndCause::StreamPanicked(_) => "the stream panicked",
            EndCause::Stalled(_) => "the consumer is stalled",
            EndCause::Unready(_) => "the service is not ready",
            EndCause::UnreadyPanicked(_) => "the service panicked while it was asked for readiness",
            EndCause::Failed(_) => "a call failed",
            EndCause::Unanswered(_) => "a job may be unsettled",
            EndCause::Misconfigured(_) => "a job can't be settled as configured",
            EndCause::CallPanicked(_) => "the service panicked in a call",
            EndCause::Connect(_) => "can't connect",
            EndCause::ConnectTimedOut(_) => "no connection within",
            EndCause::ConnectPanicked(_) => "connecting panicked",
            EndCause::MakeServicePanicked(_) => "making a service panicked",
            EndCause::RuntimeGone => "the runtime ended",
        };
        let detail = match self {
            EndCause::Stream(error) => Detail::Error(error),
            EndCause::Unready(error)
            | EndCause::Failed(error)
            | EndCause::Unanswered(error)
            | EndCause::Misconfigured(error) => Detail::Error(error),
            EndCause::Connect(error) => Detail::Error(error),
            EndCause::Stalled(stall) => Detail::Error(stall),
            EndCause::StreamPanicked(panic)
            | EndCause::UnreadyPanicked(panic)
            | EndCause::CallPanicked(panic)
            | EndCause::ConnectPanicked(panic)
            | EndCause::MakeServicePanicked(panic) => Detail::Panic(panic),
            EndCause::ConnectTimedOut(limit) => Detail::Limit(*limit),
            EndCause::StreamEnded | EndCause::RuntimeGone => Detail::None,
        };
        (what, detail)
    }
}

impl<T: fmt::Display, E: fmt::Display, C: fmt::Display> fmt::Display for EndCause<T, E, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (what, detail) = self.describe();
        detail.print_after(what, f)
    }
}
