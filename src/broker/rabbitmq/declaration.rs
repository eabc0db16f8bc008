//! [`Declaration`] of a queue and of its dead letters, by a connector.

use std::time::Duration;

use lapin::{
    Connection,
    options::QueueDeclareOptions,
    types::{AMQPValue, FieldTable, ShortString},
};
use tokio::time::timeout;

use super::{
    delivery_limit::DeliveryLimit,
    error::{SubscriptionError, server_text},
    kind::QueueKind,
    queue::{Queue, short},
};

/// Time that a declaration may take. If it takes longer, as of a quorum queue while one of its nodes is silent, the
/// server goes on with it, and the subscription finds out whether there is a queue.
const LIMIT: Duration = Duration::from_secs(2);

const DELIVERY_LIMIT: &str = "x-delivery-limit";
const DEAD_LETTER_EXCHANGE: &str = "x-dead-letter-exchange";
const DEAD_LETTER_ROUTING_KEY: &str = "x-dead-letter-routing-key";

/// No limit on any server: with -1, which means none from 4.0 on, 3.10 drops each job that comes back.
const UNLIMITED: u32 = i32::MAX as u32;

/// Arguments of a queue besides those that follow from its settings.
#[derive(Clone, Debug, Default)]
pub(super) struct Declaration {
    pub(super) arguments: FieldTable,
}

impl Declaration {
    /// Declares `queue` and those of its dead letters and suspects, and returns its delivery limit; `None` if this
    /// is not confirmed in time.
    pub(super) async fn declare(
        &self,
        connection: &Connection,
        queue: &Queue,
    ) -> Result<Option<DeliveryLimit>, SubscriptionError> {
        match timeout(LIMIT, self.declare_all(connection, queue)).await {
            Ok(declared) => declared.map(Some),
            Err(_) => Ok(None),
        }
    }

    async fn declare_all(
        &self,
        connection: &Connection,
        queue: &Queue,
    ) -> Result<DeliveryLimit, SubscriptionError> {
        if let Some(dead_letters) = queue.dead_letter_queue() {
            match declare(connection, dead_letters, of_kind(queue.kind)).await {
                // Any queue takes dead letters.
                Err(SubscriptionError::Undeclared { error, .. }) if differs_in(&error, &[""]) => {}
                declared => declared?,
            }
        }
        if queue.suspects.is_some() {
            let lane = queue.lane();
            match declare(connection, &lane.name, arguments(&lane)).await {
                // Any queue takes suspects, and its owner has declared this one before.
                Err(SubscriptionError::Undeclared { error, .. }) if differs_in(&error, &[""]) => {}
                declared => declared?,
            }
        }
        let mut arguments = arguments(queue);
        for (name, value) in &self.arguments {
            arguments.insert(name.clone(), value.clone());
        }
        let is_unlimited =
            !self.arguments.contains_key(DELIVERY_LIMIT) && limit(queue) == UNLIMITED;
        match declare(connection, &queue.name, arguments).await {
            Ok(()) if is_unlimited => Ok(DeliveryLimit::Known(None)),
            Ok(()) => Ok(queue.reading.delivery_limit),
            // Its owner has declared it before.
            Err(SubscriptionError::Undeclared { error, .. })
                if differs_in(
                    &error,
                    &[
                        DELIVERY_LIMIT,
                        DEAD_LETTER_EXCHANGE,
                        DEAD_LETTER_ROUTING_KEY,
                    ],
                ) =>
            {
                Ok(queue.reading.delivery_limit)
            }
            Err(error) => Err(error),
        }
    }
}

/// Returns whether the queue exists, and differs in one of these `arguments`.
fn differs_in(error: &lapin::Error, arguments: &[&str]) -> bool {
    let text = server_text(error);
    let differs = |argument: &&str| text.contains(&format!("inequivalent arg '{argument}"));
    arguments.iter().any(differs)
}

/// Returns the arguments that follow from the settings of `queue`.
fn arguments(queue: &Queue) -> FieldTable {
    let mut arguments = of_kind(queue.kind);
    if let Some((exchange, routing_key)) = &queue.dead_letter {
        // For the jobs that the server itself rejects: over a limit, or expired.
        set_text(&mut arguments, DEAD_LETTER_EXCHANGE, exchange);
        set_text(&mut arguments, DEAD_LETTER_ROUTING_KEY, routing_key);
    }
    if queue.kind == QueueKind::Quorum {
        let limit = AMQPValue::LongLongInt(limit(queue).into());
        arguments.insert(DELIVERY_LIMIT.into(), limit);
    }
    arguments
}

fn limit(queue: &Queue) -> u32 {
    match queue.reading.delivery_limit {
        DeliveryLimit::Known(Some(limit)) => limit,
        DeliveryLimit::Assumed | DeliveryLimit::Known(None) => UNLIMITED,
    }
}

async fn declare(
    connection: &Connection,
    queue: &str,
    arguments: FieldTable,
) -> Result<(), SubscriptionError> {
    let name: ShortString = short(queue.to_owned())?;
    let declared = async {
        // Its own channel, since a refusal closes it.
        let channel = connection.create_channel().await?;
        channel
            .queue_declare(name, QueueDeclareOptions::durable(), arguments)
            .await?;
        channel.close(200, "declared".into()).await
    };
    declared.await.map_err(|error| match error.is_io_error() {
        true => SubscriptionError::ConnectionLost(error),
        false => SubscriptionError::Undeclared {
            queue: queue.to_owned(),
            error,
        },
    })
}

fn of_kind(kind: QueueKind) -> FieldTable {
    let mut arguments = FieldTable::default();
    if kind == QueueKind::Quorum {
        set_text(&mut arguments, "x-queue-type", "quorum");
    }
    arguments
}

fn set_text(arguments: &mut FieldTable, name: &str, text: &str) {
    arguments.insert(name.into(), AMQPValue::LongString(text.into()));
}
