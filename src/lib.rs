//! Tower middleware that supervises queue jobs: a job may do anything it likes, and its broker
//! still gets exactly one answer.
//!
//! A broker hands a worker at most *prefetch* unanswered jobs. Each answer that gets lost, because
//! a job panics, hangs, or is dropped, takes one of those places for ever; when all are taken the
//! connection looks alive and the worker gets no work. A [`SentinelLayer`] wraps the service that
//! does the work, runs each call on a task of its own, turns whatever happens there into one typed
//! [`Outcome`], and passes it with the job's tag to an [`AckPolicy`]: a service that answers the
//! broker.
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
//!     .concurrency_limit(64) // the prefetch gate: its permit covers the run and the answer
//!     .layer(SentinelLayer::new(policy).timeout(Duration::from_secs(30)))
//!     .service_fn(process);
//!
//! let job = Delivery { tag: 1, body: "not a number".into() };
//! assert_eq!(handler.ready().await.unwrap().call(job).await.unwrap(), "nacked");
//! # }
//! ```
//!
//! A [`Consumer`] makes that stack itself, from a handler and a layer, with a limit and a shutdown
//! token that fit the broker's subscription:
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
//! - [`Job`] says what the tag of a request is, and its time limit.
//! - [`SentinelLayer`] is the middleware: its builder, how a job is stopped, and what a time limit
//!   can promise. [`Sentinel`](crate::sentinel::Sentinel) states the contract.
//! - [`Outcome`] is what became of a job, [`Report`] what the policy gets, [`AckPolicy`] the policy.
//! - [`SettlePolicy`] is a ready policy for tags that can [`Settle`](crate::settle::Settle): a [`Decision`](crate::settle::decision::Decision) says with which
//!   [`Verdict`].
//! - [`Consumer`] drives a [`Subscription`](crate::consumer::Subscription) into the service, drains at the end and returns a
//!   [`Summary`](crate::consumer::Summary); [`Consumer::reconnecting`] begins anew when a connection is lost. [`Escalate`](crate::consumer::Escalate) is
//!   how an error says that the broker may have no answer.
//! - [`KeepAliveLayer`] asks the broker for more time while a job runs.
//! - [`DecodeLayer`] decodes a job's bytes for its handler.
//! - [`IntensityLayer`] pauses a worker while most of its jobs fail.
//! - [`broker`] has what reads jobs from a broker and settles them there: RabbitMQ, NATS JetStream and
//!   Redis Streams behind features, and [`broker::memory`], an embedded one for tests of a worker.
//! - [`SentinelError`] is what no outcome can carry.
//! - [`ProcessSpan`](crate::settle::ProcessSpan) says what traces tell of a job.
//! - [`panic_hook`] tells where a job panicked, if you install it.
//! - [`cancelled`] and [`Cancellation`](crate::cancel::Cancellation) are for use inside a job, and [`spawn_blocking`] for what blocks
//!   its thread there.
//!
//! # Which side of what
//!
//! *Outside* of the sentinel is the side of the consumer, *inside* that of the handler. Each row is
//! a test in `tests/it/layers/layer_order.rs`, or for the last of them in `tests/it/layers/tower_http.rs`.
//!
//! | middleware | outside | inside |
//! | --- | --- | --- |
//! | `concurrency_limit` | **here**: a permit is held until the broker has its answer, so the limit is the prefetch; [`Consumer::sentinel`] keeps that number, and the `gate()` of a broker's builder or subscription is one of it | the permit is free when the job ends; unanswered jobs exceed it |
//! | `timeout` | drops the response future: the job is `Cancelled(CallerDropped)`; a [`Consumer`] hears of `Elapsed` and not of an answer that fails then, so [`on_unsettled`](SentinelLayer::on_unsettled) has to give up the channel | drops the work: the job has `Failed`; [`SentinelLayer::timeout`] says `TimedOut`, and whether it stopped |
//! | `retry` | sees a failed *answer* only, and runs the job again for it | repeats the work under one tag, one limit and one answer |
//! | `retry` on the policy | | repeats the answer and not the work |
//! | `buffer` | a job that waits there has no limit, and no answer if it is dropped | a job's limit counts while it waits |
//! | `load_shed`, `filter` | the job that it turns away has no answer | the job that it turns away has `Failed` |
//! | [`IntensityLayer`] | sees no failure: what failed is answered for | **directly here**: it pauses while most jobs fail; with a `timeout` between, it does not see what that drops |
//! | [`KeepAliveLayer`] | a lost lease ends the keep-alive and not the job, which is acked beside its next delivery | **here**, directly: a lost lease cancels the job, and it is `Abandon`ed |
//! | [`KeepAliveLayer`] within a `retry` or a `buffer` | | a job that waits there is not kept alive |
//! | [`DecodeLayer`] | what can't be decoded has no answer | **here**: what can't be decoded has `Failed`, and `reject_undecodable` rejects it |
//! | [`KeepAliveLayer`] within a [`DecodeLayer`] | | compiles by [`with_job`](DecodeLayer::with_job) only, as there is no tag otherwise |
//! | a handler that spawns | | the task outlives its job and takes effect after the answer; the sentinel spawns already |
//! | a handler that catches panics | | a panic looks like any error: `Failed` |
//! | another sentinel, with [`OnDrop::Detach`](crate::sentinel::OnDrop::Detach) and a policy that forwards | holds the gate though callers drop | |
//! | `steer` | over a sentinel for each handler | over handlers of one sentinel; it has to be `Clone` |
//! | `rate_limit`, `balance` | **here**: bounds, or spreads, what is taken | they are not `Clone`, and a sentinel's service is |
//! | tower-http's `trace`, `set_request_id` | **here**: they see the answer, and the id can be the tag | they see the job alone |
//! | tower-http's `catch_panic` | has nothing to catch | a panic looks like a response: `Completed` |
//! | tower-http's `timeout` | drops the response future | is a response with status 408: `Completed` |
//!
//! # Features
//!
//! None is on by default.
//!
//! - `conformance`: `conformance`, the scenarios that each broker adapter must pass, for the test of your own.
//! - `json`: `DecodeLayer::json`, with `serde` and `serde_json`.
//! - `metrics`: counts and measures for the `metrics` facade; see `describe_metrics`.
//! - `nats`: `broker::nats`, the pull consumers of JetStream, by async-nats.
//! - `rabbitmq`: `broker::rabbitmq`, classic and quorum queues, by lapin.
//! - `redis`: `broker::redis`, the consumer groups of Redis Streams, by redis.
//! - `rustls`, `native-tls`: TLS for each of these brokers; with both it is rustls.
//! - `nkeys`: credentials files and NKeys for NATS; `websockets`: its addresses `ws://` and `wss://`.
//!
//! rustls takes its cryptography from one *provider* for the process. This crate turns on ring. Where
//! another crate of the program turns on aws-lc-rs too, rustls can't choose: RabbitMQ's client installs
//! ring if nobody has installed one, and those of NATS and Redis panic as they connect by TLS. So install
//! one at the start of the program, which all of them use then:
//! `rustls::crypto::ring::default_provider().install_default()`.

#![cfg_attr(docsrs, feature(doc_cfg))]

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
pub mod sentinel;
pub mod settle;
pub mod telemetry;
mod time;

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

/// The README's code is compiled and run, as the tests that it promises.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
