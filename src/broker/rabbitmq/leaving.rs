//! What is sent to a channel before it ends.

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

/// How long a quorum queue may take to carry out acks that its server has received.
const CARRIED_OUT: Duration = Duration::from_millis(100);

/// Lets a quorum queue carry out what it was sent, before the channel is closed.
///
/// The server holds acks back while some dozens wait for the queue's log, and forgets them with the
/// channel. To cancel a consumer it hands them over first. Where that was done before the last ack,
/// there is nothing to ask: only time helps.
pub(super) async fn flush(channel: &Channel, consumer: Option<ShortString>, link: &Link) {
    match consumer {
        Some(tag) => {
            // An error says that the channel is closed.
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

/// Cancels a consumer, and gives back what it had received.
pub(super) async fn stop(
    channel: Channel,
    mut consumer: Consumer,
    received: VecDeque<(Received, Instant)>,
) {
    let mut received: Vec<_> = received.into_iter().map(|(received, _)| received).collect();
    let cancel = channel.basic_cancel(consumer.tag(), BasicCancelOptions::default());
    if cancel.await.is_err() {
        // The channel is closed, and all that it had goes back.
        return;
    }
    // Not before, since what is given back would be delivered here again. lapin ends its stream with
    // the answer to the cancel; what is missing there by then, the close gives back.
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
