//! NATS JetStream: the messages of a pull consumer as jobs, on the [`async_nats`] crate.
//!
//! A [`Pull`] says how a pull consumer is read and becomes [`Deliveries`]: a
//! [`Subscription`](crate::Subscription) whose jobs are [`Delivery`]s and whose tags are
//! [`DeliveryTag`]s.
//!
//! ```no_run
//! use tower::ServiceBuilder;
//! use tower_sentinel::{Consumer, DecisionExt, SentinelLayer, SettlePolicy, ack_on_success};
//! use tower_sentinel::broker::nats::{Delivery, Pull, async_nats::jetstream, connect};
//!
//! async fn process(job: Delivery) -> Result<u32, std::num::ParseIntError> {
//!     String::from_utf8_lossy(job.payload()).parse()
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
//! let context = jetstream::new(connect("nats://127.0.0.1:4222").await?);
//! let pull = Pull::new("jobs", "workers").prefetch(64).dead_letter("dead.jobs");
//! let deliveries = pull.subscribe(&context).await?;
//! let worker = ServiceBuilder::new()
//!     .layer(deliveries.gate()) // the same number
//!     .layer(SentinelLayer::new(SettlePolicy::new(ack_on_success().delivery_limit(5))))
//!     .service_fn(process);
//! let summary = Consumer::new(deliveries, worker).await?;
//! println!("{} jobs are settled", summary.answered);
//! # Ok(())
//! # }
//! ```
//!
//! # Verdicts
//!
//! | verdict | what is sent | confirmation lost |
//! | --- | --- | --- |
//! | `Ack` | `+ACK` | may be tried again |
//! | `Retry` | `-NAK`, with the delay if there is one; counts | used up |
//! | `Release` | `-NAK`; counts, so it is not free | used up |
//! | `Reject` | the dead letter, and when its stream keeps it `+TERM` | may be tried again |
//! | `Abandon` | nothing: the job comes back after the ack wait | |
//!
//! Each is a request that waits for the server's confirmation. It is the client's `double_ack` with
//! the one inbox that all requests of a client share, instead of a subscription for each. The
//! server (2.9, as tested) confirms every kind of ack in the same words, whether or not it changed
//! anything.
//!
//! An ack is idempotent: it names the message, and acking one that is acked is no error and changes
//! nothing. So one whose confirmation got lost is sent again, and one that comes after the ack wait
//! still counts, whoever has the job by then. The same holds for `+TERM`, and a dead letter that is
//! published twice has the same `Nats-Msg-Id`, so its stream drops the second for as long as its
//! `duplicate_window` lasts (2 min by default).
//!
//! A NAK is not: one that arrives late takes the job from the worker that has it next, and the
//! server does not refuse it. So it is not sent at all after the ack wait has passed by the clock of
//! this process ([`DeliveryError::LeaseLost`]), nor queued while there is no connection, nor sent
//! again when it may have arrived. Let the consumer's `ack_wait` be longer than the time limit of a
//! job and its settlement, or keep the job alive.
//!
//! # Deliveries
//!
//! [`deliveries`](crate::Settle::deliveries) is the server's count. It goes up by a NAK of either
//! kind, by an ack wait that passes, and by a message that was on its way to a connection that broke. A consumer's own
//! `max_deliver` makes the server stop to deliver in silence: leave it out and use
//! [`delivery_limit`](crate::DecisionExt::delivery_limit), which rejects.
//!
//! # Keep-alive
//!
//! `+WPI` starts the ack wait anew. JetStream does not tell when a lease is lost: it confirms the
//! `+WPI` of a delivery that it has given to somebody else. So it is this process that keeps the
//! time, from when the message was seen, and knows the lease as [`Lost`](crate::Lease::Lost) when
//! the ack wait has passed without a confirmation. The server's time began earlier, by the way
//! through the network, so ask a good deal earlier than at the end. A `backoff` of the consumer takes the place of
//! its ack wait.
//!
//! # Dead letters
//!
//! JetStream has none. With [`Pull::dead_letter`] a rejected message is published to a subject of
//! another stream, with its payload, its own headers but those of NATS (`Nats-…`, which would expire it or
//! roll the stream up), and `x-outcome-kind` ([`OutcomeKind`](crate::OutcomeKind), such as `failed`),
//! `x-outcome-message` if there is one (as one line, at most 4 KiB), `x-outcome-time` (in ms since
//! the Unix epoch, by this process's clock) and `x-deliveries`. A message that has just room in the server's
//! `max_payload` may have none with these: the reject then fails
//! ([`DeliveryError::DeadLetter`]), and the message stays.
//!
//! # Servers, and the client's features
//!
//! Tested with nats-server 2.9, which has all that is used here (the idle heartbeat of a pull request
//! and `Nats-Pending-Messages` came before). `async-nats` is taken without its default features,
//! with `jetstream`, `nuid` and `ring`. `server_2_10` to `server_2_14` are off: they add fields to
//! configurations that older servers don't know and drop in silence. So are `nkeys` (credentials
//! files), `websockets`, `kv`, `object-store` and `service`: name what you need in your own manifest.
//!
//! A server confirms an ack before it writes it to its disk. One that is killed may deliver what was acked
//! in the last moments before once more, and a work-queue stream may still show messages that
//! its consumer has settled.

mod channel;
mod connect;
mod dead_letter;
mod deliveries;
mod delivery;
mod error;
mod fetched;
mod liveness;
mod pull;
mod requests;

pub use ::async_nats;

pub use self::{
    connect::{connect, connect_with},
    deliveries::Deliveries,
    delivery::{Delivery, DeliveryTag, Settlement},
    error::{ConnectError, DeliveryError, SubscriptionError},
    pull::Pull,
};
