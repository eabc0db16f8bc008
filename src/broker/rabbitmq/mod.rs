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
//! | `Reject` without | `basic.reject` without requeue: what the queue's own dead-letter exchange gets, or nobody | the same |
//! | `Abandon` | nothing: the job holds its place in the prefetch until the channel ends | the same |
//!
//! [One table](super#verdicts-and-the-servers-they-were-tested-on) has what they do to the count and to
//! the order, by version: 3.10, 4.0 and 4.3 were tested.
//!
//! What is republished is confirmed by the server before the original is acked. A crash between the
//! two leaves both, so that the job runs twice; none leaves neither. A republished job keeps its
//! properties, but for the `user-id` and the `CC` and `BCC` headers, and where it waits also for the
//! `expiration`. It comes by the default exchange from then on; [`Delivery::exchange`] and
//! [`Delivery::routing_key`] are still those of its first publish.
//!
//! `basic.ack`, `basic.nack` and `basic.reject` have no confirmation: that one of them is `Ok` says
//! that it was handed to the connection. If the connection is lost then, the job may come back.
//! Jobs that are acked at the same time share a frame (`multiple`) as far as they are the oldest of
//! their channel without an answer.
//!
//! If the *server* is killed, what comes back depends on the queue. A quorum queue logs an ack at once:
//! little more comes back than what was unanswered. A classic queue keeps acks in memory, and a kill under
//! load brings these jobs back: up to 32768 on 3.10 (`queue_index_max_journal_entries` in
//! `advanced.config`), up to 2048 on 4.0 and 4.3 (half of `classic_queue_index_v2_segment_entry_count`).
//! With smaller ones little comes back, as tests show on these three versions with 64.
//!
//! No settlement can be tried again, as lapin's acker is used up by the try: after a failed one the
//! channel is to be given up. lapin's own recovery of connections is off in what
//! [`connect`] returns. Where it is [turned on](connect_with), tags stay safe, as lapin makes the
//! ackers of the old connection unusable; but a stream may go on as if nothing had happened, since
//! lapin can drop the error with what it had received, and with 4.12.3 a connection that breaks while a
//! channel is being opened may hang for good.
//!
//! Rights, limits and the behaviour of servers are in the guide:
//! [Running on RabbitMQ](crate::_guide::rabbitmq).

mod acks;
mod connect;
mod connection;
mod deliveries;
mod delivery;
mod delivery_error;
mod delivery_limit;
mod endpoint;
mod error;
mod half_made;
mod headers;
mod kind;
mod leaving;
mod message;
mod publisher;
mod queue;
mod republished;
mod retry_queues;
mod server;
mod settlement;
mod targets;

pub use lapin;

pub use self::{
    connect::{connect, connect_with},
    connection::Connection,
    deliveries::Deliveries,
    delivery::{Delivery, DeliveryTag},
    delivery_error::{DeliveryError, Right},
    error::{ConnectError, SubscriptionError},
    kind::QueueKind,
    queue::Queue,
    settlement::Settlement,
};
