//! What handlers that are written by hand share, since it does not depend on their types.

use std::time::Duration;

use lapin::{
    Connection, ConnectionProperties, Consumer,
    options::{BasicAckOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions},
    types::FieldTable,
};

pub use lapin::message::Delivery;

#[derive(Clone, Copy, Debug)]
pub enum Answer {
    Ack,
    Retry,
    Reject,
}

pub async fn subscribe(queue: &str, prefetch: u16) -> Result<Consumer, crate::BoxError> {
    let properties = ConnectionProperties::default();
    let connection = Connection::connect("amqp://127.0.0.1:5672/%2f", properties).await?;
    let channel = connection.create_channel().await?;
    channel
        .basic_qos(prefetch, BasicQosOptions::default())
        .await?;
    let options = BasicConsumeOptions::default();
    let arguments = FieldTable::default();
    Ok(channel
        .basic_consume(queue.into(), "by-hand".into(), options, arguments)
        .await?)
}

/// Settles a delivery, in three tries.
pub async fn settle(delivery: &Delivery, answer: Answer) {
    for tries in 1..=3 {
        let settled = match answer {
            Answer::Ack => delivery.ack(BasicAckOptions::default()).await,
            Answer::Retry => {
                delivery
                    .nack(BasicNackOptions {
                        requeue: true,
                        ..BasicNackOptions::default()
                    })
                    .await
            }
            Answer::Reject => delivery.nack(BasicNackOptions::default()).await,
        };
        match settled {
            Ok(_) => return,
            Err(error) => tracing::warn!(%error, ?answer, tries, "settlement failed"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
