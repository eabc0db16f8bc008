//! Probe of a subscription.

use std::sync::Arc;

use lapin::{
    Channel, Connection,
    options::{BasicQosOptions, QueueDeclareOptions},
    types::{FieldTable, ShortString},
};

use crate::consumer::Probe;

/// Asks for the number of ready jobs, and lets the channel of the consumer respond; `received` jobs wait here.
pub(super) async fn probe(
    connection: Arc<Connection>,
    channel: Channel,
    queue: ShortString,
    prefetch: u16,
    received: u64,
) -> lapin::Result<Probe> {
    // Its own channel, since a refusal closes it.
    let own = connection.create_channel().await?;
    let options = QueueDeclareOptions {
        passive: true,
        ..QueueDeclareOptions::default()
    };
    let declared = own
        .queue_declare(queue, options, FieldTable::default())
        .await?;
    let (ready, consumers) = (declared.message_count(), declared.consumer_count());
    own.close(200, "probed".into()).await?;
    // A consumer keeps the prefetch that it began with, so this changes nothing.
    channel
        .basic_qos(prefetch, BasicQosOptions::default())
        .await?;
    Ok(Probe::new()
        .waiting(u64::from(ready) + received)
        .detail("consumers", consumers.into()))
}
