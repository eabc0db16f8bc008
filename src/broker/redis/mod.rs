//! Redis Streams, by [`redis`]: the entries of a consumer group as jobs.
//!
//! A [`ConsumerGroup`] builds [`Deliveries`]: a [`Subscription`](crate::consumer::Subscription) whose jobs
//! are [`Delivery`]s and whose tags are [`DeliveryTag`]s. It needs Redis 6.2 or later.
//!
//! ```no_run
//! use futures_util::StreamExt;
//! use tower::{Service, ServiceBuilder, ServiceExt};
//! use tower_sentinel::{DecisionExt, SentinelLayer, SettlePolicy, ack_on_success};
//! use tower_sentinel::broker::redis::{ConsumerGroup, Delivery};
//!
//! async fn process(job: Delivery) -> Result<u32, std::num::ParseIntError> {
//!     String::from_utf8_lossy(job.as_ref()).parse()
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let group = ConsumerGroup::new("jobs", "workers").prefetch(64);
//! let mut deliveries = group.connect("redis://127.0.0.1:6379").await?;
//! let mut handler = ServiceBuilder::new()
//!     .layer(deliveries.gate()) // the same number
//!     .layer(SentinelLayer::new(SettlePolicy::new(ack_on_success().delivery_limit(5))))
//!     .service_fn(process);
//! loop {
//!     handler.ready().await?; // a place first, then a job for it
//!     let Some(job) = deliveries.next().await else { break };
//!     tokio::spawn(handler.call(job?));
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # Verdicts
//!
//! | verdict | effect |
//! | --- | --- |
//! | `Ack` | `XACK`; with [`delete_settled`](ConsumerGroup::delete_settled) also `XDEL` ([newer servers](crate::_guide::redis#servers) do some of this by other commands) |
//! | `Retry` | the entry is *parked* until it is due; the next delivery counts one more |
//! | `Release` | the entry is parked until it is due; the next delivery counts the same |
//! | `Reject` | a copy goes to the dead letters, then as for `Ack`; dropped with [`no_dead_letter`](ConsumerGroup::no_dead_letter) |
//! | `Reject` of a [suspect](ConsumerGroup::suspects) that was not run | a copy goes to the suspects, then as for `Ack` |
//! | `Abandon` | nothing |
//!
//! Each, except an early ack, is one Lua script, so it is done as a whole or not at all. (The exception is a
//! dead letter of more than 3 000 fields, which a script can't write: it is added by its own command, within
//! the lease, and then the entry is acked; a failure between the two leaves both.) The script first checks
//! whether this delivery is still the entry's last: whether the entry is pending for this consumer with this
//! count. If not, nothing is done and the error is [`DeliveryError::Lost`]. It does not matter who has the
//! entry now: another consumer, or this one once more. Such a settlement is
//! [moot](crate::settle::Unsettled::moot): the server waits for none, and the subscription goes on.
//!
//! An ack that comes early leaves this check out. It is early if more than a [`response_timeout`] is left
//! before the end of the [`min_idle`], counted from the request for the entry. As all consumers of the group
//! have the same `min_idle`, none has taken the entry by the time of the server's reply. If somebody claims
//! entries before that, by hand or with another library, the consumer that had an entry may still ack it, as
//! its job was done. Every ack checks the entry if the `response_timeout` is as long as the `min_idle`, if
//! entries are deleted, and if a keep-alive has found that the entry is lost.
//!
//! Acks that come at the same time share a command, up to 64 of them. None waits for another to come: only
//! acks that are ready at once are shared. Each gets its own result, except early ones of which only some
//! were pending ([`DeliveryError::SomeLost`]). A command that fails, for example since the connection is
//! lost, fails for each of its acks. Once begun, an ack is sent, and frees its place, even if its future is
//! dropped.
//!
//! [`response_timeout`]: ConsumerGroup::response_timeout
//! [`min_idle`]: ConsumerGroup::min_idle
//!
//! # Several servers
//!
//! [`ConsumerGroup::connector`] takes the addresses of a primary and its replicas or of a cluster, and
//! [`ConsumerGroup::connector_sentinel`] those of sentinels. Each returns a [`Connector`] for
//! [`Consumer::reconnecting`](crate::Consumer::reconnecting), which finds the server that may be written to.
//!
//! Rights, limits and the behaviour of servers are in the guide:
//! [Running on Redis and Valkey](crate::_guide::redis).

mod acks;
mod channel;
mod connect;
mod connect_error;
mod connector;
mod counts;
mod dead_letter;
mod dead_letter_queue;
mod deliveries;
mod delivery;
mod error;
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing;
mod group;
mod keys;
mod link;
mod probe;
mod reader;
mod replicas;
mod reply;
mod requests;
mod scripts;
mod sentinel;
mod standing;
mod subscribe;

pub use ::redis;

pub use self::{
    connect_error::ConnectError,
    connector::Connector,
    dead_letter_queue::{DeadLetterKey, DeadLetterPass, DeadLetterQueue},
    deliveries::Deliveries,
    delivery::{Delivery, DeliveryTag, Settlement},
    error::{DeliveryError, SubscriptionError},
    group::ConsumerGroup,
};
