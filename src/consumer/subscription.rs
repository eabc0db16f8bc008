//! [`Subscription`]: a stream of jobs that can be watched and given up.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use futures_util::Stream;

/// A stream of jobs from a broker, together with the channel that their tags belong to.
///
/// A [`Consumer`](crate::Consumer) does not poll its stream while its service is unready, so a
/// connection that dies meanwhile would go unnoticed: hence [`poll_closed`](Self::poll_closed).
/// And an answer that got lost can only be mended by giving up its channel, upon which the broker
/// redelivers what was not answered: hence [`poll_close`](Self::poll_close). Before that it lets what
/// runs finish, and what the broker delivers meanwhile would lie idle: hence
/// [`poll_stop`](Self::poll_stop).
///
/// As a stream it yields an error once, as its last item, when the connection, the channel or the
/// subscription ends for another reason than `poll_close`. An error is one of transport; a job
/// that cannot be decoded is a job.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a `Subscription`",
    label = "not the subscription of a broker",
    note = "a `Stream` alone does not tell whether its connection lives, and can't be given up: implement `tower_sentinel::consumer::Subscription` for a type around it"
)]
pub trait Subscription:
    Stream<Item = Result<<Self as Subscription>::Job, <Self as Subscription>::Error>>
{
    /// What is delivered.
    type Job;

    /// Why the stream ended.
    type Error;

    /// Waits until the channel is closed, by whichever side, and tells why if it was not asked to.
    ///
    /// Jobs that were received and not yet taken from the stream are void then.
    fn poll_closed(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>>;

    /// Asks the broker for no more jobs; ready when none will come, and at once by default.
    ///
    /// The channel stays open and its tags stay valid: what was taken from the stream can still be
    /// answered. Jobs that were received and not taken are given back, or are void. The stream yields
    /// no more jobs, and may end.
    ///
    /// A [`Consumer`](crate::Consumer) polls this while it drains, unless the stream has ended, and
    /// polls neither the stream nor [`poll_closed`](Self::poll_closed) after that. It does not wait for
    /// it: when the drain is over it goes on with [`poll_close`](Self::poll_close), ready or not. Once
    /// it is ready it is not polled again.
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

    /// Returns how many jobs may be unanswered at a time, if there is a bound; `None` by default.
    ///
    /// So many calls are in flight at once where a consumer has a
    /// [sentinel of its own](crate::Consumer::sentinel), which asks once, at the begin of a session.
    fn prefetch(&self) -> Option<usize> {
        None
    }

    /// Returns whether the channel is gone: no tag of it can be settled any more; `false` by default.
    ///
    /// A stream may end while its tags can still be settled, as after a cancel by RabbitMQ's server,
    /// and a channel may go while its stream is not polled. A
    /// [`Consumer`](crate::Consumer) stops what runs at once where the channel is gone, instead of letting
    /// it finish, and a [`ReconnectingConsumer`](crate::consumer::ReconnectingConsumer) connects anew at once. Both
    /// ask when a session ends and while it drains.
    fn is_gone(&self) -> bool {
        false
    }

    /// Gives up the channel; ready when it is closed or lost.
    ///
    /// The broker takes back every job of this channel that was not answered. Tags of this
    /// channel are stale from now on, and the stream ends.
    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()>;
}
