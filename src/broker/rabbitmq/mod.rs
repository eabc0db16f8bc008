//! RabbitMQ, by [`lapin`]: classic and quorum queues.
//!
//! ```no_run
//! use futures_util::StreamExt;
//! use tower::{Service, ServiceBuilder, ServiceExt};
//! use tower_sentinel::{SentinelLayer, SettlePolicy, ack_on_success};
//! use tower_sentinel::broker::rabbitmq::{Delivery, Queue, self};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let connection = rabbitmq::connect("amqp://guest:guest@127.0.0.1:5672/%2f").await?;
//! let mut jobs = Queue::quorum("orders")
//!     .prefetch(64) // both `basic.qos` and the gate
//!     .dead_letter("orders.dead")
//!     .delivery_limit(None) // declared with `x-delivery-limit: -1`
//!     .subscribe(&connection)
//!     .await?;
//! let mut handler = ServiceBuilder::new()
//!     .layer(jobs.gate())
//!     .layer(SentinelLayer::new(SettlePolicy::new(ack_on_success())))
//!     .service_fn(|job: Delivery| async move { std::str::from_utf8(job.as_ref()).map(str::len) });
//! while let Some(job) = jobs.next().await {
//!     let settling = handler.ready().await?.call(job?);
//!     tokio::spawn(settling);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # Verdicts
//!
//! | | quorum queue | classic queue |
//! | --- | --- | --- |
//! | `Ack` | `basic.ack` | `basic.ack` |
//! | `Retry` | `basic.reject` with requeue; near the [limit](Queue::delivery_limit) republished to the end of the queue, then acked | republished to the end of the queue, then acked |
//! | `Retry` after a delay | republished to a retry queue, then acked; `basic.reject` if the [queue delays](Queue::delayed_retry) | republished to a retry queue, then acked |
//! | `Release` | `basic.nack` with requeue; before 4.3 near the limit republished to the end of the queue, then acked | `basic.nack` with requeue |
//! | `Release` after a delay | republished to a retry queue, then acked | the same |
//! | `Reject`, with a [dead letter](Queue::dead_letter) | republished there with its reason, then acked | the same |
//! | `Reject` without | `basic.reject` without requeue: the job goes to the queue's own dead-letter exchange, or is dropped | the same |
//! | `Reject` of a [suspect](Queue::suspects) that was not run | republished to the suspects, then acked | the same |
//! | `Abandon` | nothing: the job holds its place in the prefetch until the channel ends | the same |
//!
//! With a queue of [suspects](Queue::suspects) a requeue is a republish to the end of the queue, except a `Release` on
//! a quorum queue from 4.3 on.
//!
//! [One table](super#verdicts-and-the-tested-servers) shows their effects on the count and on
//! the order, by version: 3.10, 4.0 and 4.3 were tested.
//!
//! The server confirms each republished job before the original is acked. If the process crashes between the
//! two, both remain, and the job runs twice; a job is never lost by it. A republished job keeps its
//! properties, except the `user-id` and the `CC` and `BCC` headers, and while it waits also without the
//! `expiration`. It comes by the default exchange from then on; [`Delivery::exchange`] and
//! [`Delivery::routing_key`] are still those of its first publish.
//!
//! `basic.ack`, `basic.nack` and `basic.reject` have no confirmation: `Ok` means that the frame was handed to
//! the connection. If the connection is lost then, the job may come back. Jobs that are acked at the same
//! time share a frame (`multiple`), as far as they are the oldest unsettled ones of their channel.
//!
//! If the *server* is killed, the jobs that come back depend on the queue. A quorum queue logs an ack at
//! once: few jobs come back except the unsettled ones. A classic queue keeps acks in memory, and a kill under
//! load brings these jobs back: up to 32768 on 3.10 (`queue_index_max_journal_entries` in `advanced.config`),
//! up to 2048 on 4.0 and 4.3 (half of `classic_queue_index_v2_segment_entry_count`). With smaller values few
//! jobs come back, as tests show on these three versions with 64.
//!
//! No settlement can be tried again, since the attempt uses lapin's acker up: after a failed one, give the
//! channel up. lapin's own recovery of connections is off in a connection from [`connect`]. If it is [turned
//! on](connect_with), tags stay safe, as lapin makes the ackers of the old connection unusable. But a stream
//! may then go on as if nothing had happened, since lapin can drop the error together with the jobs that it
//! had received. And with 4.12.3 a connection that breaks while a channel is being opened may hang for good, and
//! a subscription that is dropped while lapin recovers its channel leaves its consumer behind: the jobs that
//! it receives wait until the connection ends.
//!
//! Rights, limits and the behaviour of servers are in the guide:
//! [Running on RabbitMQ](crate::_guide::rabbitmq).

mod acks;
mod channels;
mod connect;
mod connection;
mod connector;
mod dead_letter_error;
mod dead_letter_queue;
mod death;
mod declaration;
mod deliveries;
mod delivery;
mod delivery_error;
mod delivery_limit;
mod endpoint;
mod error;
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing;
mod half_made;
mod headers;
mod kind;
mod leaving;
mod message;
mod moves;
mod opening;
mod probe;
mod publish;
mod publisher;
mod queue;
mod reopened;
mod republished;
mod retry_queues;
mod server;
mod settlement;
mod suspects;
mod targets;

pub use lapin;

pub use self::{
    connect::{connect, connect_with},
    connection::Connection,
    connector::{Connector, ConnectorError},
    dead_letter_error::DeadLetterError,
    dead_letter_queue::{DeadLetterKey, DeadLetterPass, DeadLetterQueue},
    deliveries::Deliveries,
    delivery::{Delivery, DeliveryTag},
    delivery_error::{DeliveryError, Right},
    error::{ConnectError, SubscriptionError},
    kind::QueueKind,
    queue::Queue,
    settlement::Settlement,
};
