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
/// redelivers what was not answered: hence [`poll_close`](Self::poll_close).
///
/// As a stream it yields an error once, as its last item, when the connection, the channel or the
/// subscription ends for another reason than `poll_close`. An error is one of transport; a job
/// that cannot be decoded is a job.
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

    /// Gives up the channel; ready when it is closed or lost.
    ///
    /// The broker takes back every job of this channel that was not answered. Tags of this
    /// channel are stale from now on, and the stream ends.
    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()>;
}
