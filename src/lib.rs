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
//! # Overview
//!
//! - [`Job`] says what the tag of a request is, and its time limit.
//! - [`SentinelLayer`] is the middleware: its builder, how a job is stopped, and what a time limit
//!   can promise. [`Sentinel`] states the contract.
//! - [`Outcome`] is what became of a job, [`Report`] what the policy gets, [`AckPolicy`] the policy.
//! - [`SentinelError`] is what no outcome can carry.
//! - [`cancelled`] and [`Cancellation`] are for use inside a job.
//!
//! # Where the limits belong
//!
//! tower's concurrency limit goes *outside* the sentinel, so that its permit is held until the
//! answer is given; inside, unanswered jobs would exceed the prefetch. tower's timeout is not
//! needed: outside the sentinel it would drop the response future, which is a cancelled job, and
//! inside it would be a failure of the job, as an `Err`.
//!
//! # Features
//!
//! None yet.

mod abandoned;
mod builder;
mod cancel;
mod error;
mod home;
mod hooks;
mod isolate;
mod job;
mod outcome;
mod policy;
mod sentinel;
mod settle;
mod subscription;
mod supervision;

pub use self::{
    builder::ServiceBuilderExt,
    cancel::{CancelReason, Cancellation, cancelled},
    error::SentinelError,
    hooks::{CallerSpan, EventOnly, Hooks, MakeSpan, OnUnsettled},
    job::{ByJob, Job, Tagging, TimeLimit},
    outcome::{Cancelled, Failure, Outcome, OutcomeKind, Panic, TimedOut},
    policy::{AckPolicy, Report},
    sentinel::{ResponseFuture, Sentinel, SentinelLayer},
    settle::{Capabilities, Lease, Reason, Settle, Settled, Unsettled, Verdict},
    subscription::Subscription,
    supervision::OnDrop,
};

/// The README's code is compiled and run, as the tests that it promises.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
