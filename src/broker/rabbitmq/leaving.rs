//! The last requests on a channel before it ends.

use std::{collections::VecDeque, future::Future, time::Duration};

use futures_util::{FutureExt, StreamExt};
use lapin::{
    Channel, Consumer,
    message::Delivery as Received,
    options::{BasicCancelOptions, BasicNackOptions},
    types::ShortString,
};
use tokio::time::{Instant, sleep_until, timeout};

use super::message::Link;

/// Time for a quorum queue to carry out acks that its server has received.
const CARRIED_OUT: Duration = Duration::from_millis(100);

/// Time that each request waits for the server, such as for the leader of a queue.
const LIMIT: Duration = Duration::from_secs(5);

/// Returns whether the server has carried out a `request`: not if the channel is closed, or it is silent.
async fn is_done(request: impl Future<Output = lapin::Result<()>>) -> bool {
    timeout(LIMIT, request).await.is_ok_and(|done| done.is_ok())
}

/// Closes a channel, and returns whether it was open and is closed now. A late close is carried out, too.
pub(super) async fn close(channel: &Channel) -> bool {
    is_done(channel.close(200, "OK".into())).await
}

/// Cancels a consumer, and returns whether it was there and is cancelled now.
pub(super) async fn cancel(channel: &Channel, consumer: ShortString) -> bool {
    is_done(channel.basic_cancel(consumer, BasicCancelOptions::default())).await
}

/// Lets a quorum queue carry out the acks that were sent, before the channel is closed.
///
/// The server holds acks back while some dozens wait for the queue's log, and forgets them with the channel.
/// Before it cancels a consumer, it passes them on. If the consumer was cancelled before the last ack, no
/// request has this effect: it can only wait.
pub(super) async fn flush(channel: &Channel, consumer: Option<ShortString>, link: &Link) {
    match consumer {
        Some(tag) => {
            cancel(channel, tag).await;
        }
        None if channel.status().connected() => {
            if let Some(last) = link.acks.last_sent() {
                sleep_until(last + CARRIED_OUT).await;
            }
        }
        None => {}
    }
}

/// Cancels a consumer, and gives back the jobs that it had received.
pub(super) async fn stop(
    channel: Channel,
    mut consumer: Consumer,
    received: VecDeque<(Received, Instant)>,
) {
    let mut received: Vec<_> = received.into_iter().map(|(received, _)| received).collect();
    if !cancel(&channel, consumer.tag()).await {
        // All its jobs go back when the channel is closed.
        return;
    }
    // Not before the cancel, since these jobs would be delivered here again. lapin ends its stream with the
    // confirmation of the cancel; the close gives back any job that is missing there by then.
    while let Some(Some(Ok(late))) = consumer.next().now_or_never() {
        received.push(late);
    }
    for received in received {
        let options = BasicNackOptions {
            requeue: true,
            multiple: false,
        };
        if received.acker.nack(options).await.is_err() {
            return;
        }
    }
}
