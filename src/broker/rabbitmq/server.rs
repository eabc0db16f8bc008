//! What a server is, as far as it shows.

use lapin::{
    Connection,
    options::QueueDeclareOptions,
    types::{AMQPValue, FieldTable, ShortString},
};

/// An argument of quorum queues that came with 4.3.
const NEW_ARGUMENT: &str = "x-consumer-disconnected-timeout";

/// Asks whether quorum queues count no `basic.nack`, as from 4.3 on.
///
/// lapin does not pass on the version. So this declares a queue that no server takes: an exclusive
/// quorum queue. A server that knows the argument refuses its value, and an older one the
/// exclusiveness. Either way no queue is declared. Its name is like that of a retry queue, which the
/// user has to be able to configure. Where the right is missing, the answer is no.
pub(super) async fn counts_no_nack(connection: &Connection, queue: &str) -> lapin::Result<bool> {
    let mut arguments = FieldTable::default();
    let kind = AMQPValue::LongString("quorum".into());
    arguments.insert("x-queue-type".into(), kind);
    arguments.insert(NEW_ARGUMENT.into(), AMQPValue::LongInt(-1));
    let options = QueueDeclareOptions {
        durable: true,
        exclusive: true,
        ..QueueDeclareOptions::default()
    };
    // Invariant: `Queue::subscribe` has checked a longer one.
    let name = ShortString::from(format!("{queue}.retry.quorum.0"));
    let channel = connection.create_channel().await?;
    match channel.queue_declare(name, options, arguments).await {
        Err(error) if error.is_amqp_soft_error() => Ok(error.to_string().contains(NEW_ARGUMENT)),
        Err(error) => Err(error),
        Ok(_) => Ok(false),
    }
}
