//! Tower middleware that supervises queue jobs: a job may do anything it likes, and its broker still
//! gets exactly one answer.
//!
//! A broker gives a worker at most *prefetch* unsettled jobs. If a settlement gets lost, because a job
//! panics, hangs, or is dropped, one of those places is taken for ever. Once all are taken, the connection
//! looks alive and the worker gets no work. A [`SentinelLayer`] wraps the service that does the work, and
//! runs each call on its own task. It turns everything that happens there into one typed [`Outcome`], and
//! passes that with the job's tag to an [`AckPolicy`]: a service that settles the delivery.
//!
//! ```
//! use std::{io, time::Duration};
//! use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
//! use tower_sentinel::{Job, Outcome, Report, SentinelLayer};
//!
//! # struct Channel;
//! # impl Channel {
//! #     async fn ack(&self, _: u64) -> io::Result<&'static str> { Ok("acked") }
//! #     async fn nack(&self, _: u64) -> io::Result<&'static str> { Ok("nacked") }
//! # }
//! struct Delivery { tag: u64, body: String }
//!
//! impl Job for Delivery {
//!     type Tag = u64;
//!     fn tag(&self) -> u64 { self.tag }
//! }
//!
//! async fn process(job: Delivery) -> Result<u32, std::num::ParseIntError> {
//!     job.body.parse()
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() {
//! let policy = service_fn(|Report { tag, outcome, .. }: Report<u64, u32, _>| async move {
//!     match outcome {
//!         Outcome::Completed(_) => Channel.ack(tag).await,
//!         Outcome::Failed(_) | Outcome::Panicked(_) => Channel.nack(tag).await,
//!         Outcome::TimedOut(_) | Outcome::Cancelled(_) => Channel.nack(tag).await,
//!     }
//! });
//! let mut handler = ServiceBuilder::new()
//!     .concurrency_limit(64) // the prefetch gate: its permit covers the run and the settlement
//!     .layer(SentinelLayer::new(policy).timeout(Duration::from_secs(30)))
//!     .service_fn(process);
//!
//! let job = Delivery { tag: 1, body: "not a number".into() };
//! assert_eq!(handler.ready().await.unwrap().call(job).await.unwrap(), "nacked");
//! # }
//! ```
//!
//! A [`Consumer`] makes that stack itself, from a handler and a layer, with a limit and a shutdown token that
//! fit the broker's subscription:
//!
//! ```
//! use std::time::Duration;
//! use tower::service_fn;
//! use tower_sentinel::{Consumer, DecisionExt, SentinelLayer, SettlePolicy, ack_on_success};
//! use tower_sentinel::broker::memory::{Broker, Delivery}; // stands for RabbitMQ, NATS or Redis
//!
//! async fn process(job: Delivery<&str>) -> Result<u32, std::num::ParseIntError> {
//!     job.payload().parse()
//! }
//!
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let queue = Broker::new().queue("jobs").dead_letter("dead").declare();
//! ["7", "not a number"].into_iter().for_each(|job| queue.publish(job));
//!
//! let decision = ack_on_success()
//!     .backoff(Duration::from_secs(1)..=Duration::from_secs(60))
//!     .delivery_limit(5);
//! let emptied = queue.clone();
//! let summary = Consumer::new(queue.subscribe(64)?, service_fn(process))
//!     .sentinel(SentinelLayer::new(SettlePolicy::new(decision)))
//!     .with_graceful_shutdown(async move { emptied.emptied().await }) // or `ctrl_c`
//!     .run()
//!     .await?;
//! assert_eq!((summary.called, queue.dead_letters().len()), (6, 1));
//! # Ok(())
//! # }
//! ```
//!
//! # Overview
//!
//! The [guide](crate::_guide) begins with a first worker, and has a page for each further topic: [layer
//! order](crate::_guide::layer_order), [retries and dead letters](crate::_guide::retry),
//! [shutdown](crate::_guide::shutdown), [time limits](crate::_guide::time_limits), [your own
//! adapter](crate::_guide::own_broker), [tests](crate::_guide::testing).
//!
//! | module | contents |
//! | --- | --- |
//! | [`sentinel`] | [`SentinelLayer`], its builder, and the contract of its service |
//! | [`outcome`] | [`Outcome`]: a value, an error, a panic, an elapsed limit or a cancellation |
//! | [`policy`] | [`AckPolicy`]: the service that settles, and the [`Report`] that it gets |
//! | [`settle`] | [`SettlePolicy`], a ready policy for tags that can [`Settle`](settle::Settle), and its [decisions](settle::decision) |
//! | [`consumer`] | [`Consumer`]: drives a [`Subscription`](consumer::Subscription) into a service, drains, reconnects |
//! | [`broker`] | RabbitMQ, NATS JetStream and Redis Streams behind features, and an embedded broker for tests |
//! | [`keep_alive`] | [`KeepAliveLayer`]: asks the broker for more time while a job runs |
//! | [`decode`] | [`DecodeLayer`]: decodes a job's bytes for its handler |
//! | [`intensity`] | [`IntensityLayer`]: pauses a worker while most of its jobs fail |
//! | [`cancel`] | [`cancelled`], [`spawn_blocking`], [`time_left`](cancel::time_left): for use inside a job |
//! | [`telemetry`], [`panic_hook`] | metrics, and the place where a job panicked; spans are at [`ProcessSpan`](settle::ProcessSpan) |
//!
//! # Features
//!
//! None is on by default.
//!
//! - `conformance`: `conformance`, the scenarios that each broker adapter must pass, for a test of your own
//!   adapter.
//! - `json`: `DecodeLayer::json`, with `serde` and `serde_json`.
//! - `metrics`: counts and measures for the `metrics` facade; see `describe_metrics`.
//! - `nats`: `broker::nats`, the pull consumers of JetStream, by async-nats.
//! - `process`: `process`, jobs in processes of their own, on unix.
//! - `rabbitmq`: `broker::rabbitmq`, classic and quorum queues, by lapin.
//! - `redis`: `broker::redis`, the consumer groups of Redis Streams, by redis.
//! - `rustls`, `native-tls`: TLS for each of these brokers; with both it is rustls.
//! - `nkeys`: credentials files and NKeys for NATS; `websockets`: its addresses `ws://` and `wss://`.
//!
//! rustls takes its cryptography from one *provider* for the process. This crate turns on ring. If another
//! crate of the program also turns on aws-lc-rs, rustls can't choose. RabbitMQ's client then installs ring,
//! if no provider is installed yet; those of NATS and Redis panic when they connect by TLS. So install one
//! provider at the start of the program, and all of them use it:
//! `rustls::crypto::ring::default_provider().install_default()`.

#![cfg_attr(docsrs, feature(doc_cfg))]

#[cfg(any(doc, doctest))]
pub mod _guide;
mod backoff;
pub mod broker;
pub mod cancel;
#[cfg(feature = "conformance")]
pub mod conformance;
pub mod consumer;
pub mod decode;
pub mod intensity;
mod job;
pub mod keep_alive;
pub mod outcome;
pub mod panic_hook;
pub mod policy;
#[cfg(feature = "process")]
pub mod process;
#[cfg(test)]
mod race;
pub mod sentinel;
pub mod settle;
pub mod telemetry;
mod time;
mod unready;
mod waiters;

pub use self::{
    cancel::{cancelled, spawn_blocking},
    consumer::Consumer,
    decode::DecodeLayer,
    intensity::IntensityLayer,
    job::{Job, TimeLimit},
    keep_alive::KeepAliveLayer,
    outcome::{Outcome, Panic},
    policy::{AckPolicy, Report},
    sentinel::{SentinelError, SentinelLayer, ServiceBuilderExt},
    settle::{
        SettlePolicy, Verdict,
        decision::{DecisionExt, ack_on_success},
    },
};

/// The code of the README, compiled and run as the tests that it promises.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
