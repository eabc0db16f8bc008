//! Embedded broker with the semantics of RabbitMQ, for tests and experiments.
//!
//! It is meant for the tests of a worker. The whole stack runs in memory and on paused time, and rare events
//! of a real broker happen on demand. It has no task and no thread, and a timer only if a job is delayed or
//! has a lease. Nothing is stored.
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
//! /// The worker to be tested. It doubles numbers, one at a time, and waits 1 s before a retry.
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
//! // The worker loses its broker, and ends. Its caller would start it again.
//! broker.drop_connections();
//! worker.await.unwrap();
//! # }
//! ```
//!
//! # Semantics
//!
//! The semantics are those of a quorum queue of RabbitMQ 4.3, except where that can't do something or does
//! not promise it:
//!
//! - *Order*: first in, first out. Jobs that come back are delivered before jobs that were never delivered.
//!   Jobs that a lost channel held come first of all, in the order of their delivery.
//! - *Deliveries*: [`Settle::deliveries`](crate::settle::Settle::deliveries) is one more than the number of
//!   charged deliveries. A `Retry` charges one (`basic.reject`), a `Release` none (`basic.nack`). Every end
//!   of a channel charges one for each job that it held: RabbitMQ returns the jobs of a consumer that is down
//!   as failed (`rabbit_fifo`, `return_all`). The only delivery limit is that of a
//!   [decision](crate::DecisionExt::delivery_limit).
//! - *The redelivered flag* is set after each return, also after one that is not charged.
//! - *Prefetch* counts for each consumer, like `basic.qos` with `global` unset. A job is delivered when the
//!   stream is polled, so no job waits in a buffer of the client.
//! - *Channels*: each subscription has one, and a tag is valid only on its own channel. A second settlement
//!   is a typed error for this delivery; RabbitMQ would close the channel.
//! - *Delays* (of a `Retry` or a `Release`) are exact, and each settlement has its own.
//! - *Dead letters* keep the [`Reason`](crate::settle::Reason), the headers and the id of the message. A job
//!   is published to the dead-letter queue and removed from its queue in one step.
//! - *Leases* ([`QueueBuilder::lease`]) come from JetStream, Redis and SQS, not from RabbitMQ. A job that is
//!   held for longer is taken back, with a delivery charged.
//!
//! # Faults
//!
//! | switch | simulated event |
//! | --- | --- |
//! | [`Connection::drop_now`] | a socket that breaks: unsettled jobs go back, and the stream ends with an error |
//! | [`Broker::drop_connections`] | a restart of the broker |
//! | [`Broker::refuse_connections`] | a broker that is down when a worker starts or reconnects |
//! | dropping a [`Deliveries`] | the end of the worker's process |
//! | [`Queue::fail_settlements`] | a settlement that fails: it can be repeated, or it used its tag up |
//! | [`Queue::delay_settlements`] | a slow broker: settlements time out, or the connection is lost meanwhile |

mod channel;
mod connection;
mod dead_letter_queue;
mod death;
mod deliveries;
mod delivery;
mod entry;
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
    dead_letter_queue::{DeadLetterPass, DeadLetterQueue},
    death::{DeadLetter, Death},
    deliveries::Deliveries,
    delivery::{Delivery, DeliveryTag, Settlement},
    error::{ConnectError, DeliveryError, SubscriptionError},
    faults::SettleFault,
    jobs::Counts,
    queue::{Queue, QueueBuilder},
};

/// Handle to an embedded broker; clones are handles to the same broker.
///
/// `P` is the type of the published payloads. It should be cheap to clone, such as `Bytes`, an `Arc`, a
/// `&'static str` or a number: it is cloned for each delivery, under the broker's lock.
pub struct Broker<P> {
    server: Arc<Server<P>>,
}

impl<P> Broker<P> {
    /// Creates a broker without queues.
    pub fn new() -> Self {
        let server = Arc::new(Server::new());
        Self { server }
    }

    /// Returns a builder that declares a queue.
    pub fn queue<'a>(&'a self, name: &'a str) -> QueueBuilder<'a, P> {
        QueueBuilder::new(&self.server, name)
    }

    /// Opens a connection.
    ///
    /// # Errors
    ///
    /// [`ConnectError::Refused`] after [`refuse_connections`](Self::refuse_connections).
    pub fn connect(&self) -> Result<Connection<P>, ConnectError> {
        Connection::open(&self.server)
    }

    /// Drops every connection now, like a broker that is killed and restarted at once.
    pub fn drop_connections(&self) {
        let step = self.server.lock().sever(None);
        step.finish();
    }

    /// Makes the next `n` connections fail; replaces the number of an earlier call.
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
