//! NATS JetStream: the messages of a pull consumer as jobs, on the [`async_nats`] crate.
//!
//! A [`Pull`] says how a pull consumer is read and becomes [`Deliveries`]: a
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
//! | verdict | what is sent | confirmation lost |
//! | --- | --- | --- |
//! | `Ack` | `+ACK` | may be tried again |
//! | `Retry` | `-NAK`, with the delay if there is one; counts | used up |
//! | `Retry` with a delay and [schedules](#delayed-retries) | the schedule, and when the stream keeps it `+ACK`; counts | may be tried again |
//! | `Release` | `-NAK`, with the delay if there is one; counts, so it is not free | used up |
//! | `Release` with a delay and schedules | as the `Retry`, but does not count | may be tried again |
//! | `Reject` | the dead letter, and when its stream keeps it `+TERM` | may be tried again |
//! | `Abandon` | nothing: the job comes back after the ack wait | |
//!
//! Each is a request that waits for the server's confirmation. It is the client's `double_ack` with
//! the one inbox that all requests of a client share, instead of a subscription for each. The
//! server (2.9, 2.10 and 2.15, as tested) confirms every kind of ack in the same words, whether or not it changed
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
//! this process ([`DeliveryError::LeaseLost`], which is [moot](crate::settle::Unsettled::moot)), nor queued while there is no connection, nor sent
//! again when it may have arrived. The sentinel's [default limit](crate::SentinelLayer::timeout) leaves a
//! third of the `ack_wait` for the settlement. Where another limit is set, let the `ack_wait` be longer than
//! it and the settlement, or keep the job alive.
//!
//! # Deliveries
//!
//! [`deliveries`](crate::settle::Settle::deliveries) is the server's count, and what a schedule carries on. It
//! goes up by a NAK of either kind, by an ack wait that passes, and by a message that was on its way
//! to a connection that broke.
//!
//! After a consumer's own `max_deliver` the server delivers a job no more, in silence: it is stranded.
//! Leave that out and use [`delivery_limit`](crate::DecisionExt::delivery_limit), which rejects. A
//! consumer that has it is warned of by an event at `subscribe`, and each job that is given back after
//! its last delivery by another.
//!
//! # Delayed retries
//!
//! A NAK with a delay counts toward the consumer's `max_ack_pending` (1 000 by default) until it is
//! due, on every server: 2.9, 2.10 and 2.15, as tested. When as many jobs are delayed, the consumer
//! delivers nothing until the first is due. So there is an event when the delayed and the unsettled
//! jobs of a subscription come to three quarters of it, and another when the consumer has stalled.
//! The delay itself stays as it is: a shorter one would use the job's deliveries up. Let
//! `max_ack_pending` be the number of jobs that may fail within the longest delay.
//!
//! [`Pull::schedules`] has no such bound, and takes a server of 2.12 or later (2.15, as tested): the
//! stream keeps a copy of the message with the time of its retry, and the job is acked. Then the
//! server publishes the copy to the job's subject. So the job has another stream sequence then, and
//! comes after jobs that were published before. Its headers stay but those of NATS; its
//! `Nats-Msg-Id` is [`Delivery::message_id`]. Of the stream's limits a `max_age` that is shorter than
//! the delay drops the schedule. The time is this process's, so keep its clock near the server's. If the
//! confirmation of the ack is lost, the job may run once more beside its copy. A schedule that the
//! server refuses is a NAK with the delay, which counts, and an event.
//!
//! # Keep-alive
//!
//! `+WPI` starts the ack wait anew. JetStream does not tell when a lease is lost: it confirms the
//! `+WPI` of a delivery that it has given to somebody else. So it is this process that keeps the
//! time, from when the message was seen, and knows the lease as [`Lost`](crate::settle::Lease::Lost) when
//! the ack wait has passed without a confirmation. The server's time began earlier, by the way
//! through the network, so ask a good deal earlier than at the end. A `backoff` of the consumer takes the place of
//! its ack wait.
//!
//! # Dead letters
//!
//! JetStream has none. With [`Pull::dead_letter`] a rejected message is published to a subject of
//! another stream, with its payload, its own headers but those of NATS (`Nats-…`, which would expire it or
//! roll the stream up), and `x-outcome-kind` ([`OutcomeKind`](crate::outcome::OutcomeKind), such as `failed`),
//! `x-outcome-message` if there is one (as one line, at most 4 KiB), `x-outcome-time` (in ms since
//! the Unix epoch, by this process's clock) and `x-deliveries`. A message that has just room in the server's
//! `max_payload` may have none with these: the reject then fails
//! ([`DeliveryError::DeadLetter`]), and the message stays.
//!
//! # Messages that can't be parsed
//!
//! A server keeps the headers of a message as they were sent. The client closes its connection when it
//! can't parse them: a name with a space or that is not ASCII, a line without a colon, bytes that are
//! not UTF-8; and by a carriage return within a value it panics, which ends the subscription
//! ([`SubscriptionError::ClientClosed`]). The server delivers such a message again after each ack wait.
//!
//! So after the second connection that broke while a request was open, and at `subscribe` if something
//! was redelivered, the subscription looks for them: in the first and the last 500 messages of what was
//! delivered since the first that is not acked, by the API of the stream (`$JS.API.STREAM.MSG.GET`),
//! in at most 20 s and 32 MiB, and requests nothing meanwhile. What it finds becomes a dead letter of the payload and the reason, without
//! headers and without a run; without a [subject](Pull::dead_letter) for it, it is set aside for an hour by a
//! NAK. An event at level `ERROR` names its sequence. A worker by another client, that could parse such a
//! message, should not share the consumer.
//!
//! Five connections in a row that bring nothing before they break are an error
//! ([`SubscriptionError::Breaking`]).
//!
//! # Consumers that are paused, or removed
//!
//! A consumer that is paused (2.11 or later) delivers nothing and lives: an event says so, and another
//! when it delivers again.
//!
//! A consumer with an `inactive_threshold`, as each ephemeral one has, is removed when nobody
//! requests. While all places are taken nothing is; so the subscription sends requests that nothing can
//! come of, three in each threshold. It does so while it is polled. After a stop the consumer may be
//! removed, and what runs then can't be settled: let the threshold be longer than a drain.
//!
//! # TLS
//!
//! [`connect`] with `tls://` says nothing before the connection is encrypted. With `nats://` it is
//! encrypted if the server says so. The client is always built with rustls and ring, whatever features
//! are on (`native-tls` changes nothing), and trusts the authorities of the system, or in their place
//! those that it is given:
//!
//! ```no_run
//! use tower_sentinel::broker::nats::{async_nats::ConnectOptions, connect_with};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let options = ConnectOptions::new()
//!     .add_root_certificates("authority.pem".into())
//!     // The certificate of this worker, if the server asks for one (`verify: true`).
//!     .add_client_certificate("worker.pem".into(), "worker.key".into());
//! let client = connect_with(options, "tls://me:secret@nats.internal:4222").await?;
//! # Ok(())
//! # }
//! ```
//!
//! `ws://` and `wss://` need the feature `websockets`: without it the client would speak in plain text
//! to such an address, so it is refused ([`ConnectError::NoWebSockets`]).
//!
//! # Secrets
//!
//! The client connects again by itself, with the credentials that it has. Those that are renewed come
//! from a function, which it asks at each connect:
//!
//! ```no_run
//! use tower_sentinel::broker::nats::async_nats::{Auth, AuthError, ConnectOptions};
//! use tower_sentinel::broker::nats::connect_with;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let options = ConnectOptions::with_auth_callback(|_nonce| async {
//!     let mut auth = Auth::new();
//!     auth.username = Some("me".into());
//!     auth.password = Some(std::fs::read_to_string("/run/secrets/nats").map_err(AuthError::new)?);
//!     Ok(auth)
//! });
//! let client = connect_with(options, "tls://nats.internal:4222").await?;
//! # Ok(())
//! # }
//! ```
//!
//! Files of credentials (`ConnectOptions::credentials_file`) need the feature `nkeys`. They are read
//! once.
//!
//! No error and no event of this crate has a user, a password or a payload in it; and [`connect`] keeps
//! the credentials out of the client's events, where they would be part of the address. At TRACE the
//! client prints payloads.
//!
//! # Servers, and the client's features
//!
//! Tested with nats-server 2.9.10, 2.10.27 and 2.15.1; priority groups, pauses and schedules with the
//! last, as the others have none. `async-nats` is taken without its default features, with
//! `jetstream`, `nuid`, `ring` and `server_2_10` to `server_2_12`, which add fields to configurations
//! that older servers drop in silence. Off are `server_2_14`, `nkeys` (credentials files), `websockets`,
//! `kv`, `object-store` and `service`: name what you need in your own manifest.
//!
//! A server confirms an ack before it writes it to its disk. One that is killed may deliver what was acked
//! in the last moments before once more, and a work-queue stream may still show messages that
//! its consumer has settled.

mod breaks;
mod channel;
mod connect;
mod dead_letter;
mod delays;
mod deliveries;
mod delivery;
mod delivery_error;
mod error;
mod fetched;
mod liveness;
mod place;
mod priority;
mod pull;
mod requests;
mod schedule;
mod settings;
mod subscribe;
mod tag;
mod unreadable;

pub use ::async_nats;

pub use self::{
    connect::{connect, connect_with},
    deliveries::Deliveries,
    delivery::Delivery,
    delivery_error::DeliveryError,
    error::{ConnectError, NoPriority, NoSchedules, SubscriptionError},
    pull::Pull,
    tag::{DeliveryTag, Settlement},
};
