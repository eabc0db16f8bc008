//! Redis Streams: the entries of a consumer group as jobs, on the [`redis`] crate.
//!
//! A [`ConsumerGroup`] connects and becomes [`Deliveries`]: a [`Subscription`](crate::consumer::Subscription)
//! whose jobs are [`Delivery`]s and whose tags are [`DeliveryTag`]s. Redis 6.2 or later.
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
//! | verdict | what is done |
//! | --- | --- |
//! | `Ack` | `XACK`; with [`delete_settled`](ConsumerGroup::delete_settled) also `XDEL` ([newer servers](#servers) do some of this by other commands) |
//! | `Retry` | the entry is *parked* until it is due; the next delivery counts one more |
//! | `Release` | the entry is parked until it is due; the next delivery counts the same |
//! | `Reject` | a copy goes to the dead letters, then as for `Ack`; dropped with [`no_dead_letter`](ConsumerGroup::no_dead_letter) |
//! | `Abandon` | nothing |
//!
//! Each but an early ack is one Lua script, so it is done as a whole or not at all (but for a dead
//! letter of more than 3 000 fields, which a script can't write: it is added by a command of its own,
//! within the lease, and then the entry is acked; a failure between the two leaves both). It begins with
//! the question whether this delivery is still the entry's last: whether the entry is pending for this
//! consumer with this count. If not, nothing is done and the error is [`DeliveryError::Lost`]. It is
//! all the same who has the entry now: another consumer, or this one once more. Such a settlement is
//! [moot](crate::settle::Unsettled::moot): the server waits for none, and the subscription goes on.
//!
//! That question is left out for an ack that comes early: more than a [`response_timeout`] before the
//! end of the [`min_idle`], counted from when the server was asked for the entry. As all consumers of
//! the group have the same `min_idle`, none has taken the entry by the time that the server answers.
//! Somebody who claims entries before that, by hand or with another library, may find that one was
//! acked by the consumer which had it, as its job was done. Every ack asks if the `response_timeout` is
//! as long as the `min_idle`, if entries are deleted, and if a keep-alive has told that the entry is
//! lost.
//!
//! Acks that come at the same time share a command, up to 64 of them. None waits for another to
//! come: what is shared is what is ready at once. Each is answered for itself, but for early ones of
//! which only some were pending ([`DeliveryError::SomeLost`]). A command that fails, as when the
//! connection is lost, fails for each of its acks. An ack that was begun goes out, and frees its
//! place, even if its future is dropped.
//!
//! [`response_timeout`]: ConsumerGroup::response_timeout
//! [`min_idle`]: ConsumerGroup::min_idle
//!
//! # Parked entries
//!
//! A parked entry is acked in the group, and its id and count wait in a sorted set until it is due.
//! Its body stays where it is, in the stream. Each consumer looks for entries that are due every
//! [`poll_interval`](ConsumerGroup::poll_interval) and takes as many as it has places for, by a
//! script that puts them back into the pending list as its own (`XCLAIM … RETRYCOUNT … FORCE`). No
//! single mover is needed. The clock is the server's.
//!
//! So an entry keeps its id, its body is not copied, and other groups of the stream don't see it
//! again, as they would if it were added anew. It has its price: whoever trims the stream
//! (`XADD … MAXLEN`, `XTRIM`) trims parked entries too, as it does pending ones. An entry whose
//! body is gone can't be given back, which is [`DeliveryError::Gone`]; if it goes while it is
//! parked, it is forgotten.
//!
//! Why not leave it pending, with an idle time that makes `XAUTOCLAIM` take it at once? Because a
//! delay can't be said so (an idle time below zero is none), and `XAUTOCLAIM` always counts one up.
//!
//! # Entries that nobody answers
//!
//! An entry that was neither answered nor kept alive for [`min_idle`](ConsumerGroup::min_idle) is
//! reclaimed (`XAUTOCLAIM`) by a consumer that has a place free: half of that time later at the
//! latest, and never more than 30 s later. Its count goes up. Only for these entries `XPENDING` is
//! asked; what is new has a count of 1.
//!
//! This is also what becomes of entries whose consumer was killed or lost its connection. A
//! subscription that is [closed](Deliveries#closing) gives back what it has at once. A consumer's
//! name that is left behind in the group is deleted once it had no entry and no activity for an hour
//! and for ten times `min_idle`.
//!
//! # Connections
//!
//! A subscription has two: one reads, and one settles. The one that settles is pinged every second, and
//! the one that reads in each second in which no place is free. So a server that closes idle
//! connections (`timeout`, in whole seconds) closes neither while long jobs run.
//!
//! # Rights
//!
//! With access control (ACL) a user needs these commands and keys, here for the group `workers` of `jobs`:
//!
//! ```text
//! ACL SETUSER alice on >password ~jobs ~{jobs}:* +ping +time +xreadgroup +xack +xpending +xrange
//!     +xclaim +xautoclaim +xadd +xinfo|consumers +xgroup|create +xgroup|delconsumer
//!     +zadd +zrange +zrem +evalsha +script|load
//! ```
//!
//! A stream of dead letters with a name of its own is one key more; without dead letters `+xadd` is not
//! needed. [`delete_settled`](ConsumerGroup::delete_settled) needs `+xdel`.
//! [`connect`](ConsumerGroup::connect) tries each command so that it changes nothing, and names what is
//! missing ([`ConnectError::Forbidden`]).
//!
//! # Keys
//!
//! | key | what |
//! | --- | --- |
//! | `jobs` | the stream |
//! | `{jobs}:workers:delayed` | sorted set of parked entries: `id:count` by the time in ms at which it is due |
//! | `{jobs}:workers:dead` | stream of dead letters, if [`dead_letter`](ConsumerGroup::dead_letter) names no other |
//!
//! [`key_prefix`](ConsumerGroup::key_prefix) puts something in front of those that are made:
//! `acme:{jobs}:workers:delayed`.
//!
//! The braces put all of them into one hash slot of a cluster. Where the stream's own name has a
//! hash tag, it is the prefix as it is: `{acme}:jobs:workers:delayed`. A name with a lone `}` can't be
//! kept in one slot.
//!
//! A dead letter has all fields of the entry, and besides: `x-outcome-kind`
//! ([`OutcomeKind`](crate::outcome::OutcomeKind), such as `failed`), `x-outcome-message` if there is one,
//! `x-outcome-time` (of the server, in ms since the Unix epoch), `x-deliveries`, and `x-entry-id`.
//! Fields of these names that the entry had before, as a dead letter that was put back, are replaced.
//!
//! # Durability
//!
//! A settlement is as durable as the server is told to make it. With `appendfsync always` what was
//! answered survives a kill; with `everysec` up to a second of answers is lost, and those jobs run
//! again. A replica that takes over may lack answers too.
//!
//! # Servers
//!
//! Tested with Redis 7.0 and 8.0 and Valkey 8.1 and 9.1; besides, with Redis 8.2 and 8.6 what newer
//! commands change. Each of these is used where the server has it and the user may run it, which
//! `connect` finds out by trying:
//!
//! | command | from | what changes |
//! | --- | --- | --- |
//! | `XACKDEL` | Redis 8.2 | [`delete_settled`](ConsumerGroup::delete_settled) deletes an entry when *all* groups have acked it, and not at once |
//! | `XREADGROUP … CLAIM` | Redis 8.4 | an entry that nobody answers comes back when its `min_idle` is over, and not up to half of it later |
//! | `XNACK` | Redis 8.8 | `Release` (`SILENT`) and `Retry` (`FAIL`) without a delay leave the entry pending, and are not parked |
//!
//! No server with `XNACK` could be had: what is sent of it was tested against a fake, and what it does is
//! as read in the documentation of Redis. `FATAL` is not used, as no verdict leaves an entry pending for
//! nobody; an entry that somebody else marked so has a count of [`u32::MAX`] or more, as far as
//! [`delivery_limit`](crate::DecisionExt::delivery_limit) is concerned, and is settled like any other.
//!
//! Entries that are parked count as acked: other groups delete them with `delete_settled`.
//!
//! # TLS
//!
//! [`ConsumerGroup::connect`] with `rediss://` encrypts. It needs the feature `rustls` (with ring, and
//! the authorities of the system) or `native-tls`; with both it is rustls. Without either it is refused
//! ([`ConnectError::NoTls`]). The certificate must be for the host of the address. An authority of
//! one's own, in the place of those of the system, and a certificate of one's own need `rustls`:
//!
#![cfg_attr(feature = "rustls", doc = "```no_run")]
#![cfg_attr(not(feature = "rustls"), doc = "```ignore")]
//! use tower_sentinel::broker::redis::ConsumerGroup;
//! use tower_sentinel::broker::redis::redis::{Client, ClientTlsConfig, TlsCertificates};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let certificates = TlsCertificates {
//!     root_cert: Some(std::fs::read("authority.pem")?),
//!     // The certificate of this worker, for which the server asks by default.
//!     client_tls: Some(ClientTlsConfig {
//!         client_cert: std::fs::read("worker.pem")?,
//!         client_key: std::fs::read("worker.key")?,
//!     }),
//! };
//! let client = Client::build_with_tls("rediss://me:secret@redis.internal:6379", certificates)?;
//! let deliveries = ConsumerGroup::new("jobs", "workers").connect_with(&client).await?;
//! # Ok(())
//! # }
//! ```
//!
//! With both features, a certificate of one's own needs the authority to be given, too.
//!
//! # Secrets
//!
//! A password that is changed ends no connection: let the function that
//! [`Consumer::reconnecting`](crate::Consumer::reconnecting) connects with read it each time. A user
//! that is deleted loses its connections, and a subscription ends with them.
//!
//! No error and no event has a user, a password or a payload in it.

mod acks;
mod channel;
mod connect;
mod dead_letter;
mod deliveries;
mod delivery;
mod error;
mod group;
mod keys;
mod link;
mod probe;
mod reader;
mod reply;
mod scripts;

pub use ::redis;

pub use self::{
    deliveries::Deliveries,
    delivery::{Delivery, DeliveryTag},
    error::{ConnectError, DeliveryError, SubscriptionError},
    group::ConsumerGroup,
};
