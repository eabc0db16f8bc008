//! The last requests on a channel before it ends.

use std::{collections::VecDeque, time::Duration};

use futures_util::{FutureExt, StreamExt};
use lapin::{
    Channel, Consumer,
    message::Delivery as Received,
    options::{BasicCancelOptions, BasicNackOptions},
    types::ShortString,
};
use tokio::time::{Instant, sleep_until};

use super::message::Link;

/// Time for a quorum queue to carry out acks that its server has received.
const CARRIED_OUT: Duration = Duration::from_millis(100);

/// Lets a quorum queue carry out the acks that were sent, before the channel is closed.
///
/// The server holds acks back while some dozens wait for the queue's log, and forgets them with the channel.
/// Before it cancels a consumer, it passes them on. If the consumer was cancelled before the last ack, no
/// request has this effect: it can only wait.
pub(super) async fn flush(channel: &Channel, consumer: Option<ShortString>, link: &Link) {
    match consumer {
        Some(tag) => {
            // An error means that the channel is closed.
            drop(
                channel
                    .basic_cancel(tag, BasicCancelOptions::default())
                    .await,
            );
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
    let cancel = channel.basic_cancel(consumer.tag(), BasicCancelOptions::default());
    if cancel.await.is_err() {
        // The channel is closed, and all its jobs go back.
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
