//! An embedded broker with the semantics of RabbitMQ: for tests, and to try things out.
//!
//! It is meant for the tests of a worker: the whole stack runs in memory and on paused time, and what
//! a real broker does rarely is done on demand. It has no task and no thread of its own, and no timer
//! unless a job is delayed or has a lease. Nothing is stored.
//!
//! # A test of a worker
//!
//! ```
//! use std::time::Duration;
//! use futures_util::StreamExt;
//! use tower::{Service, ServiceBuilder, ServiceExt};
//! use tower_sentinel::{
//!     DecisionExt, SentinelLayer, SettlePolicy, ack_on_success, outcome::OutcomeKind,
//! };
//! use tower_sentinel::broker::memory::{Broker, Delivery, Queue};
//!
//! /// The worker to be tested: it doubles numbers, one at a time, and waits 1 s before it retries.
//! async fn work(queue: Queue<&'static str>) {
//!     let mut jobs = queue.subscribe(1).unwrap();
//!     let second = Duration::from_secs(1);
//!     let decision = ack_on_success().delivery_limit(3).backoff(second..=second);
//!     let mut worker = ServiceBuilder::new()
//!         .layer(jobs.gate())
//!         .layer(SentinelLayer::new(SettlePolicy::new(decision)))
//!         .service_fn(|job: Delivery<&'static str>| async move {
//!             job.payload().parse::<u32>().map(|number| 2 * number)
//!         });
//!     while let Some(Ok(job)) = jobs.next().await {
//!         let settled = worker.ready().await.unwrap().call(job).await;
//!         settled.unwrap();
//!     }
//! }
//!
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() {
//! let broker = Broker::new();
//! let queue = broker.queue("numbers").dead_letter("numbers.dead").declare();
//! queue.publish("21");
//! queue.publish("not a number");
//!
//! let worker = tokio::spawn(work(queue.clone()));
//! queue.emptied().await;
//!
//! let counts = queue.counts();
//! assert_eq!((counts.acked, counts.dead), (1, 1));
//! let letters = queue.dead_letters();
//! assert_eq!(letters[0].payload, "not a number");
//! assert_eq!(letters[0].death.reason.kind, OutcomeKind::Failed);
//! assert_eq!(letters[0].death.deliveries, 3);
//!
//! // What does the worker do when it loses its broker? It ends, and its caller starts it anew.
//! broker.drop_connections();
//! worker.await.unwrap();
//! # }
//! ```
//!
//! # Semantics
//!
//! They are those of a quorum queue of RabbitMQ 4.3, but for what it can't do or does not promise:
//!
//! - *Order*: first in, first out. What comes back comes before what was never delivered, and what a
//!   lost channel held comes first of all, in the order of its delivery.
//! - *Deliveries*: [`Settle::deliveries`](crate::settle::Settle::deliveries) is one more than the deliveries
//!   that were charged. A `Retry` charges one (`basic.reject`), a `Release` none (`basic.nack`), and
//!   the end of a channel charges one for each job that it held, however it ended: RabbitMQ returns
//!   what a consumer that is down held as failed (`rabbit_fifo`, `return_all`). There is no delivery
//!   limit but that of a [decision](crate::DecisionExt::delivery_limit).
//! - *The redelivered flag* is set after each return, also one for free.
//! - *Prefetch* counts for each consumer, as `basic.qos` with `global` unset. A job is delivered when
//!   the stream is polled, so none waits in a buffer of the client.
//! - *Channels*: each subscription has one, and a tag is valid on its own only. A second answer is a
//!   typed error for this delivery; RabbitMQ closes the channel.
//! - *Delays* (of a `Retry` or a `Release`) are exact, and are the answer's own.
//! - *Dead letters* keep the [`Reason`](crate::settle::Reason), the headers and the message's id. Publishing to a dead-letter queue and removing the
//!   job are one step.
//! - *Leases* ([`QueueBuilder::lease`]) are not RabbitMQ's but those of JetStream, Redis and SQS: a
//!   job that is held for longer is taken back, with a delivery charged.
//!
//! # Faults
//!
//! | switch | what it stands for |
//! | --- | --- |
//! | [`Connection::drop_now`] | a socket that breaks: the unanswered go back, the stream ends with an error |
//! | [`Broker::drop_connections`] | the broker's restart |
//! | [`Broker::refuse_connections`] | a broker that is down when a worker starts or reconnects |
//! | dropping a [`Deliveries`] | the end of the worker's process |
//! | [`Queue::fail_settlements`] | an answer that can be repeated, or one that used its tag up |
//! | [`Queue::delay_settlements`] | a slow broker: settlements time out, or the connection is lost meanwhile |

mod channel;
mod connection;
mod death;
mod deliveries;
mod delivery;
mod error;
mod faults;
mod jobs;
mod properties;
mod queue;
mod settling;
mod state;
mod step;

use std::{fmt, sync::Arc};

use self::state::Server;
pub use self::{
    connection::Connection,
    death::{DeadLetter, Death},
    deliveries::Deliveries,
    delivery::{Delivery, DeliveryTag, Settlement},
    error::{ConnectError, DeliveryError, SubscriptionError},
    faults::SettleFault,
    jobs::Counts,
    queue::{Queue, QueueBuilder},
};

/// An embedded broker; clones are handles of the same broker.
///
/// `P` is what is published: anything that is cheap to clone, since it is cloned for each
/// delivery, under the broker's lock. `Bytes`, an `Arc`, a `&'static str` and a number are.
pub struct Broker<P> {
    server: Arc<Server<P>>,
}

impl<P> Broker<P> {
    /// Creates a broker without queues.
    pub fn new() -> Self {
        let server = Arc::new(Server::new());
        Self { server }
    }

    /// Starts to declare a queue.
    pub fn queue<'a>(&'a self, name: &'a str) -> QueueBuilder<'a, P> {
        QueueBuilder::new(&self.server, name)
    }

    /// Connects.
    ///
    /// # Errors
    ///
    /// [`ConnectError::Refused`] if the test [asked for it](Self::refuse_connections).
    pub fn connect(&self) -> Result<Connection<P>, ConnectError> {
        Connection::open(&self.server)
    }

    /// Drops every connection now, as a broker that is killed and restarted at once.
    pub fn drop_connections(&self) {
        let step = self.server.lock().sever(None);
        step.finish();
    }

    /// Makes the next `n` connections fail, instead of those that were to fail before.
    pub fn refuse_connections(&self, n: u32) {
        self.server.lock().refusals = n;
    }
}

impl<P> Default for Broker<P> {
    fn default() -> Self {
        Self::new()
    }
}

impl<P> Clone for Broker<P> {
    fn clone(&self) -> Self {
        let server = Arc::clone(&self.server);
        Self { server }
    }
}

impl<P> fmt::Debug for Broker<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.server.lock();
        let queues = state.queues.iter().map(|queue| &queue.config.name);
        f.debug_struct("Broker")
            .field("queues", &queues.collect::<Vec<_>>())
            .finish_non_exhaustive()
    }
}
