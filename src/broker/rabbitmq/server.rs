//! Requests that find out the type of a queue and the behaviour of a server.

use lapin::{
    Connection,
    options::{BasicConsumeOptions, QueueDeclareOptions},
    types::{AMQPValue, FieldTable, ShortString},
};

use super::error::server_text;

/// An argument of quorum queues that came with 4.3.
const NEW_ARGUMENT: &str = "x-consumer-disconnected-timeout";

/// An argument of consumers that only streams know.
const STREAM_ARGUMENT: &str = "x-stream-offset";

/// Returns whether `queue` is certainly a classic one.
///
/// AMQP does not report the type of a queue. So this asks for an invalid consumer: quorum and classic queues
/// don't know the argument, and name their type in the refusal; a stream refuses its value. The server checks
/// the argument first, so nothing is delivered, and it takes no right that the subscription does not take. A
/// server cuts its text off after 255 bytes: with a long name the type is not known.
pub(super) async fn is_classic(
    connection: &Connection,
    queue: &ShortString,
) -> lapin::Result<bool> {
    let mut arguments = FieldTable::default();
    arguments.insert(STREAM_ARGUMENT.into(), AMQPValue::Boolean(false));
    let channel = connection.create_channel().await?;
    let options = BasicConsumeOptions::default();
    let asked = channel.basic_consume(queue.clone(), "".into(), options, arguments);
    match asked.await {
        Err(error) if error.is_amqp_soft_error() => {
            Ok(server_text(&error).ends_with(" of queue type rabbit_classic_queue"))
        }
        Err(error) => Err(error),
        // Its channel is closed when it is dropped, and its deliveries go back.
        Ok(_) => Ok(false),
    }
}

/// Returns whether quorum queues count no `basic.nack`, as from 4.3 on.
///
/// lapin does not pass on the version. So this declares a queue that no server accepts: an exclusive quorum
/// queue. A server that knows the argument refuses its value, and an older one the exclusiveness. In both
/// cases no queue is declared. Its name is like that of a retry queue, which the user has to be able to
/// configure. If the right is missing, it returns `false`.
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
    // Invariant: `Queue::subscribe` has checked a longer name.
    let name = ShortString::from(format!("{queue}.retry.quorum.0"));
    let channel = connection.create_channel().await?;
    match channel.queue_declare(name, options, arguments).await {
        Err(error) if error.is_amqp_soft_error() => Ok(error.to_string().contains(NEW_ARGUMENT)),
        Err(error) => Err(error),
        Ok(_) => Ok(false),
    }
}
