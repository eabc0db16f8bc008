//! NATS JetStream, by [`async_nats`]: the messages of a pull consumer as jobs.
//!
//! A [`Pull`] holds the settings of a pull consumer and builds [`Deliveries`]: a
//! [`Subscription`](crate::consumer::Subscription) whose jobs are [`Delivery`]s and whose tags are
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
//! | verdict | sent | confirmation lost |
//! | --- | --- | --- |
//! | `Ack` | `+ACK` | may be tried again |
//! | `Retry` | `-NAK`, with the delay if there is one; counts | moot: comes back, at the latest after the ack wait |
//! | `Retry` with a delay and [schedules](crate::_guide::nats#delayed-retries) | the schedule, and `+ACK` once the stream stores it; counts | may be tried again |
//! | `Release` | `-NAK`, with the delay if there is one; counts, so it is not free | moot, like the `Retry` |
//! | `Release` with a delay and schedules | like the `Retry`, but does not count | may be tried again |
//! | `Reject` | the dead letter, and `+TERM` once its stream stores it | may be tried again |
//! | `Reject` of a [suspect](Pull::suspects) that was not run | a copy for the suspects, and `+TERM` once their stream stores it | may be tried again |
//! | `Abandon` | nothing: the job comes back after the ack wait | |
//!
//! Each is a request that waits for the server's confirmation. It is like the client's `double_ack`, but uses
//! the one inbox that all requests of a client share, instead of a subscription for each. The server (2.9,
//! 2.10 and 2.15, as tested) confirms every kind of ack in the same words, whether or not it changed
//! anything.
//!
//! An ack is idempotent: it names the message, and a second ack of it is no error and changes nothing. So an
//! ack whose confirmation got lost is sent again, and one that comes after the ack wait still counts, even if
//! another worker has the job by then. The same holds for `+TERM`. A dead letter that is published twice has
//! the same `Nats-Msg-Id`, so its stream drops the second for the time of its `duplicate_window` (2 min by
//! default).
//!
//! A NAK is not idempotent: one that arrives late takes the job from the worker that has it next, and the
//! server does not refuse it. So it is not sent after the ack wait has passed by the clock of this process
//! ([`DeliveryError::LeaseLost`], which is [moot](crate::settle::Unsettled::moot)). It is not queued while
//! there is no connection, and not sent again if it may have arrived, which is moot, too. The sentinel's [default
//! limit](crate::SentinelLayer::timeout) leaves a third of the `ack_wait` for the settlement. With another
//! limit, let the `ack_wait` be longer than the limit and the settlement together, or keep the job alive.
//!
//! While a cluster elects a leader, all of them are sent again; see [clusters](crate::_guide::nats#clusters).
//!
//! Rights, limits and the behaviour of servers are in the guide:
//! [Running on NATS JetStream](crate::_guide::nats).

mod breaks;
mod channel;
mod connect;
mod connect_error;
mod connector;
mod dead_letter;
mod dead_letter_error;
mod dead_letter_queue;
mod dead_letter_requests;
mod delays;
mod deliveries;
mod delivery;
mod delivery_error;
mod error;
mod fetched;
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing;
mod liveness;
mod miss;
mod place;
mod priority;
mod probe;
mod pull;
mod repeat;
mod requests;
mod schedule;
mod settings;
mod subscribe;
mod tag;
mod unreadable;

pub use ::async_nats;

pub use self::{
    connect::{connect, connect_with},
    connect_error::{ConnectError, ConnectorError},
    connector::Connector,
    dead_letter_error::DeadLetterError,
    dead_letter_queue::{DeadLetterKey, DeadLetterPass, DeadLetterQueue},
    deliveries::Deliveries,
    delivery::Delivery,
    delivery_error::DeliveryError,
    error::{NoPriority, NoSchedules, SubscriptionError},
    pull::Pull,
    tag::{DeliveryTag, Settlement},
};
