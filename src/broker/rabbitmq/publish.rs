//! [`publish`]: one message, and the server's confirmation.

use lapin::{
    BasicProperties, Channel, Confirmation, options::BasicPublishOptions, types::ShortString,
};

use super::delivery_error::DeliveryError;

/// Destination of a message.
#[derive(Clone, Debug)]
pub(super) struct Target {
    pub(super) exchange: ShortString,
    pub(super) routing_key: ShortString,
}

impl Target {
    /// Returns that of the default exchange to `queue`.
    pub(super) fn of_queue(queue: ShortString) -> Self {
        Self {
            exchange: "".into(),
            routing_key: queue,
        }
    }
}

/// Publishes to `target`, and waits for the confirmation.
///
/// If it is mandatory, a queue has to take the message.
pub(super) async fn publish(
    channel: &Channel,
    target: &Target,
    mandatory: bool,
    payload: &[u8],
    properties: BasicProperties,
) -> Result<(), DeliveryError> {
    let options = BasicPublishOptions {
        mandatory,
        ..BasicPublishOptions::default()
    };
    let Target {
        exchange,
        routing_key,
    } = target.clone();
    let confirmed = async {
        let confirm = channel.basic_publish(exchange, routing_key, options, payload, properties);
        confirm.await?.await
    };
    match confirmed.await {
        Ok(Confirmation::Ack(None)) => Ok(()),
        Ok(Confirmation::Ack(Some(_)) | Confirmation::Nack(Some(_))) => {
            Err(DeliveryError::Unroutable {
                exchange: target.exchange.to_string(),
                routing_key: target.routing_key.to_string(),
            })
        }
        Ok(Confirmation::Nack(None) | Confirmation::NotRequested) => {
            Err(DeliveryError::NotConfirmed)
        }
        Err(error) => Err(DeliveryError::of_publish(target.exchange.as_str(), error)),
    }
}
