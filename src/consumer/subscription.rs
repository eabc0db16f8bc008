//! [`Subscription`], a stream of jobs that can be watched and given up.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use futures_util::Stream;

use super::probe::Probing;

/// Stream of jobs from a broker, together with the channel that their tags belong to.
///
/// It has three methods beside those of a stream:
///
/// - [`poll_closed`](Self::poll_closed): a [`Consumer`](crate::Consumer) does not poll the stream while its
///   service is unready, so a connection that dies meanwhile would go unnoticed.
/// - [`poll_close`](Self::poll_close): a lost settlement can only be repaired by giving up its channel. The
///   broker then redelivers the unsettled jobs.
/// - [`poll_stop`](Self::poll_stop): before the close, running jobs finish. Jobs that the broker delivers
///   meanwhile would lie idle.
///
/// The stream yields an error once, as its last item, when the connection, the channel or the subscription
/// ends for another reason than `poll_close`. An error is one of transport; a job that cannot be decoded is a
/// job.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a `Subscription`",
    label = "not the subscription of a broker",
    note = "a `Stream` alone does not report whether its connection is alive, and can't be given up: implement `tower_sentinel::consumer::Subscription` for a type around it"
)]
///
/// # Examples
///
/// A client that hands out its messages by a channel of tokio, and whose connection can be asked:
///
/// ```
/// # struct Connection;
/// # impl Connection {
/// #     fn is_open(&self) -> bool { true }
/// #     fn close(&self) {}
/// #     async fn waiting(&self) -> std::io::Result<u64> { Ok(3) }
/// # }
/// use std::{io, pin::Pin, sync::Arc, task::{Context, Poll, ready}};
/// use futures_util::Stream;
/// use tokio::sync::mpsc;
/// use tower_sentinel::consumer::{Probe, ProbeError, Probing, Subscription};
///
/// struct Messages { connection: Arc<Connection>, received: mpsc::Receiver<String> }
///
/// impl Stream for Messages {
///     type Item = io::Result<String>;
///
///     fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
///         self.received.poll_recv(cx).map(|message| message.map(Ok))
///     }
/// }
///
/// impl Subscription for Messages {
///     type Job = String;
///     type Error = io::Error;
///
///     fn prefetch(&self) -> Option<usize> { Some(64) }
///
///     fn is_gone(&self) -> bool { !self.connection.is_open() }
///
///     fn poll_closed(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
///         // This client wakes nobody then: the stream's end must do.
///         Poll::Pending
///     }
///
///     fn probe(&self) -> Option<Probing> {
///         let connection = Arc::clone(&self.connection);
///         Some(Box::pin(async move {
///             let waiting = connection.waiting().await.map_err(ProbeError::new)?;
///             Ok(Probe::new().waiting(waiting))
///         }))
///     }
///
///     fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
///         self.connection.close();
///         self.received.close();
///         while ready!(self.received.poll_recv(cx)).is_some() {} // the broker takes these back
///         Poll::Ready(())
///     }
/// }
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// # let (sender, received) = mpsc::channel(64);
/// let messages = Messages { connection: Arc::new(Connection), received };
/// assert_eq!(messages.probe().unwrap().await.unwrap().waiting, Some(3));
/// # let mut messages = Box::pin(messages);
/// # sender.try_send("a message".to_owned()).unwrap();
/// # std::future::poll_fn(|cx| messages.as_mut().poll_close(cx)).await;
/// # }
/// ```
pub trait Subscription:
    Stream<Item = Result<<Self as Subscription>::Job, <Self as Subscription>::Error>>
{
    /// The delivered job.
    type Job;

    /// Error with which the stream ended.
    type Error;

    /// Waits until the channel is closed, by either side, and returns the error if the close was not
    /// requested.
    ///
    /// Jobs that were received and not yet taken from the stream are then void.
    fn poll_closed(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>>;

    /// Asks the broker for no more jobs; ready when none will come, and at once by default.
    ///
    /// The channel stays open and its tags stay valid: jobs that were taken from the stream can still be
    /// settled. Jobs that were received and not taken are released, or are void. The stream yields no more
    /// jobs, and may end.
    ///
    /// A [`Consumer`](crate::Consumer) polls this while it drains, unless the stream has ended. After that it
    /// polls neither the stream nor [`poll_closed`](Self::poll_closed). It does not wait until this is ready:
    /// when the drain is over, it goes on with [`poll_close`](Self::poll_close). Once this is ready, it is
    /// not polled again.
    ///
    /// ```
    /// # use std::{convert::Infallible, pin::Pin, task::{Context, Poll}};
    /// # use futures_util::{Stream, StreamExt};
    /// use tower_sentinel::consumer::Subscription;
    ///
    /// /// Numbers, for as long as they are asked for.
    /// struct Numbers {
    ///     last: u64,
    ///     is_stopped: bool,
    /// }
    ///
    /// impl Stream for Numbers {
    ///     type Item = Result<u64, Infallible>;
    ///
    ///     fn poll_next(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
    ///         self.last += 1;
    ///         Poll::Ready((!self.is_stopped).then_some(Ok(self.last)))
    ///     }
    /// }
    ///
    /// impl Subscription for Numbers {
    ///     type Job = u64;
    ///     type Error = Infallible;
    ///
    ///     fn poll_stop(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
    ///         self.is_stopped = true;
    ///         Poll::Ready(())
    ///     }
    /// #   fn poll_closed(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
    /// #       Poll::Pending
    /// #   }
    /// #   fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
    /// #       Poll::Ready(())
    /// #   }
    /// }
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() {
    /// let mut numbers = Numbers { last: 0, is_stopped: false };
    /// assert_eq!(numbers.next().await, Some(Ok(1)));
    /// std::future::poll_fn(|cx| Pin::new(&mut numbers).poll_stop(cx)).await;
    /// assert_eq!(numbers.next().await, None);
    /// # }
    /// ```
    fn poll_stop(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let _ = cx;
        Poll::Ready(())
    }

    /// Returns the number of jobs that may be unsettled at a time, if there is a limit; `None` by default.
    ///
    /// A consumer with [its own sentinel](crate::Consumer::sentinel) has at most that many calls in flight.
    /// It asks once, at the beginning of a session.
    fn prefetch(&self) -> Option<usize> {
        None
    }

    /// Returns whether the channel is gone, so that no tag of it can be settled any more; `false` by default.
    ///
    /// A stream may end while its tags can still be settled, for example if RabbitMQ's server cancels it. And
    /// a channel may be lost while its stream is not polled. If the channel is gone, a
    /// [`Consumer`](crate::Consumer) stops running jobs at once instead of letting them finish, and a
    /// [`ReconnectingConsumer`](crate::consumer::ReconnectingConsumer) connects again at once. Both ask when
    /// a session ends and while it drains.
    fn is_gone(&self) -> bool {
        false
    }

    /// Asks the broker for its own view of this subscription; `None` by default, if that is not supported.
    ///
    /// A connection may be half-open, a broker may hang, and a settlement may be lost on its way: all of it looks idle from
    /// here. So a [watchdog](crate::Consumer::watchdog) probes the broker, over the connection that settles jobs. The
    /// future borrows nothing, so it runs beside the stream.
    ///
    /// # Errors
    ///
    /// If the broker refuses, or the subscription is closed. A broker that is silent is no error: the future does not
    /// resolve then, and whoever awaits it sets a limit.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: a probe changes nothing.
    fn probe(&self) -> Option<Probing> {
        None
    }

    /// Gives up the channel; ready when it is closed or lost.
    ///
    /// The broker takes back every unsettled job of this channel. The tags of this channel are stale from now
    /// on, and the stream ends.
    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()>;
}
