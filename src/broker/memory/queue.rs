//! [`Queue`]: where jobs are published, counted and found dead.

use std::{fmt, future::poll_fn, sync::Arc, task::Poll, time::Duration};

use super::{
    Broker, ConnectError, Connection, Deliveries,
    properties::Headers,
    state::{Config, Server},
};
use crate::settle::{Capabilities, Reason};

/// A queue of a [`Broker`]; clones are handles of the same queue.
pub struct Queue<P> {
    pub(super) inner: Arc<Inner<P>>,
}

pub(super) struct Inner<P> {
    pub(super) index: usize,
    pub(super) config: Config,
    pub(super) server: Arc<Server<P>>,
}

impl<P> Inner<P> {
    pub(super) fn capabilities(&self) -> Capabilities {
        let mut capabilities = Capabilities::none().free_release().delay();
        if self.config.dead_letter.is_some() {
            capabilities = capabilities.dead_letter();
        }
        if self.config.lease.is_some() {
            capabilities = capabilities.keep_alive();
        }
        capabilities
    }
}

impl<P> Queue<P> {
    /// Returns the name.
    pub fn name(&self) -> &str {
        &self.inner.config.name
    }

    /// Puts a job at the end of the queue.
    pub fn publish(&self, payload: P) {
        self.push(payload, None);
    }

    /// Puts a job with headers at the end of the queue.
    ///
    /// Of those called `traceparent` and `tracestate` its [spans](crate::settle::ProcessSpan) can be linked
    /// to the trace of the sender.
    ///
    /// ```
    /// use futures_util::StreamExt;
    /// use tower_sentinel::{Job, broker::memory::Broker, settle::Settle};
    ///
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() {
    /// let queue = Broker::new().queue("orders").declare();
    /// let traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    /// queue.publish_with_headers("order 7", [("traceparent", traceparent), ("tenant", "acme")]);
    ///
    /// let job = queue.subscribe(1).unwrap().next().await.unwrap().unwrap();
    /// assert_eq!(job.header("tenant"), Some("acme"));
    /// assert_eq!(job.tag().messaging().unwrap().traceparent.unwrap(), traceparent);
    /// # }
    /// ```
    pub fn publish_with_headers<K, V>(&self, payload: P, headers: impl IntoIterator<Item = (K, V)>)
    where
        K: Into<String>,
        V: Into<String>,
    {
        let headers = headers.into_iter();
        let headers = headers.map(|(name, value)| (name.into(), value.into()));
        let headers: Headers = headers.collect();
        self.push(payload, (!headers.is_empty()).then_some(headers));
    }

    fn push(&self, payload: P, headers: Option<Headers>) {
        let Inner { server, index, .. } = &*self.inner;
        let step = server.lock().publish(*index, payload, headers);
        step.finish();
    }

    /// Subscribes over a new connection of its own.
    ///
    /// # Errors
    ///
    /// [`ConnectError::Refused`] if the test [asked for it](Broker::refuse_connections).
    ///
    /// # Panics
    ///
    /// Panics if `prefetch` is 0.
    #[track_caller]
    pub fn subscribe(&self, prefetch: usize) -> Result<Deliveries<P>, ConnectError> {
        let connection = Connection::open(&self.inner.server)?;
        connection.subscribe(self, prefetch)
    }

    /// Counts the jobs, by where they are now.
    pub fn counts(&self) -> Counts {
        let Inner { server, index, .. } = &*self.inner;
        let mut state = server.lock();
        let wakers = state.pass_time(*index);
        let counts = state.queues[*index].jobs.counts();
        drop(state);
        wakers.wake();
        counts
    }

    /// Returns what was dead-lettered from this queue and still lies in its dead-letter queue, in
    /// the order in which it was rejected.
    pub fn dead_letters(&self) -> Vec<DeadLetter<P>>
    where
        P: Clone,
    {
        let Inner { server, config, .. } = &*self.inner;
        let state = server.lock();
        let queue = config.dead_letter.map(|index| &state.queues[index]);
        queue.map_or_else(Vec::new, |queue| queue.jobs.dead_letters(&config.name))
    }

    /// Waits until the queue is empty: every job is acked, dead or dropped.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: it changes nothing.
    ///
    /// ```
    /// use futures_util::StreamExt;
    /// use tower_sentinel::{Job, Verdict, broker::memory::Broker, settle::{Reason, Settle}};
    ///
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() {
    /// let queue = Broker::new().queue("orders").declare();
    /// queue.publish("order 7");
    ///
    /// let mut jobs = queue.subscribe(10).unwrap();
    /// tokio::spawn(async move {
    ///     while let Some(Ok(job)) = jobs.next().await {
    ///         let reason = Reason::completed(std::time::Duration::ZERO);
    ///         job.tag().settle(Verdict::Ack, reason).await.unwrap();
    ///     }
    /// });
    /// queue.emptied().await;
    /// assert_eq!(queue.counts().acked, 1);
    /// # }
    /// ```
    pub async fn emptied(&self) {
        let Inner { server, index, .. } = &*self.inner;
        poll_fn(|cx| {
            let queue = &mut server.lock().queues[*index];
            if queue.jobs.is_empty() {
                return Poll::Ready(());
            }
            if !queue.emptied.iter().any(|it| it.will_wake(cx.waker())) {
                queue.emptied.push(cx.waker().clone());
            }
            Poll::Pending
        })
        .await;
    }

    /// Makes the next `n` settlements fail, instead of those that were to fail so before.
    ///
    /// They are not carried out: the broker still waits for an answer. An
    /// [`Abandon`](crate::Verdict::Abandon) sends nothing, and does not count. Those with
    /// [`SettleFault::Again`] come first.
    pub fn fail_settlements(&self, n: u32, fault: SettleFault) {
        let Inner { server, index, .. } = &*self.inner;
        let faults = &mut server.lock().queues[*index].faults;
        match fault {
            SettleFault::Again => faults.again = n,
            SettleFault::Last => faults.last = n,
        }
    }

    /// Makes every settlement from now on wait for `delay` before it is carried out; zero by
    /// default.
    ///
    /// A settlement that is dropped meanwhile is not carried out, and one whose channel is closed
    /// meanwhile fails at once.
    pub fn delay_settlements(&self, delay: Duration) {
        let Inner { server, index, .. } = &*self.inner;
        server.lock().queues[*index].faults.delay = delay;
    }
}

impl<P> Clone for Queue<P> {
    fn clone(&self) -> Self {
        let inner = Arc::clone(&self.inner);
        Self { inner }
    }
}

impl<P> fmt::Debug for Queue<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue")
            .field("name", &self.name())
            .field("counts", &self.counts())
            .finish()
    }
}

/// How a settlement fails on demand; see [`Queue::fail_settlements`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SettleFault {
    /// The tag comes back and may be settled again.
    Again,
    /// The tag is used up, as RabbitMQ's acker is: only the end of its channel frees the job.
    Last,
}

/// How many jobs of a queue are where; what was published is the sum of all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counts {
    /// Waits for a consumer.
    pub ready: usize,
    /// Given back with a delay that is not over.
    pub delayed: usize,
    /// Delivered, and not answered.
    pub unacked: usize,
    /// Acked, ever.
    pub acked: u64,
    /// Rejected into the dead-letter queue, ever.
    pub dead: u64,
    /// Rejected where there is no dead-letter queue, ever.
    pub dropped: u64,
}

/// What lies in a dead-letter queue.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct DeadLetter<P> {
    /// The job.
    pub payload: P,
    /// How it came here.
    pub death: Arc<Death>,
}

/// How a job came into a dead-letter queue: AMQP's `x-death` header.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Death {
    /// The queue that it was in.
    pub queue: Arc<str>,
    /// The outcome that it was rejected for.
    pub reason: Reason,
    /// How often it was delivered there, without what was given back for free.
    pub deliveries: u32,
    pub(super) number: u64,
}

/// How a queue is to be; made by [`Broker::queue`].
#[must_use = "a queue is there once it is declared"]
pub struct QueueBuilder<'a, P> {
    broker: &'a Broker<P>,
    name: &'a str,
    dead_letter: Option<&'a str>,
    lease: Option<Duration>,
}

impl<'a, P> QueueBuilder<'a, P> {
    pub(super) fn new(broker: &'a Broker<P>, name: &'a str) -> Self {
        Self {
            broker,
            name,
            dead_letter: None,
            lease: None,
        }
    }

    /// Sets the queue that takes what is rejected, which is declared if it isn't yet; by default
    /// what is rejected is dropped.
    pub fn dead_letter(mut self, name: &'a str) -> Self {
        self.dead_letter = Some(name);
        self
    }

    /// Sets how long a consumer may hold a job before the queue takes it back; for ever by default.
    ///
    /// This is JetStream's ack wait and SQS's visibility timeout, and as with these the delivery
    /// is charged. [`Settle::keep_alive`](crate::settle::Settle::keep_alive) lets the time start anew.
    pub fn lease(mut self, lease: Duration) -> Self {
        self.lease = Some(lease);
        self
    }

    /// Declares the queue, and returns it; the one that is there if it was declared before.
    ///
    /// # Panics
    ///
    /// Panics if it was declared with other settings, which AMQP answers with
    /// `PRECONDITION_FAILED`.
    #[track_caller]
    pub fn declare(self) -> Queue<P> {
        let Broker { server } = self.broker;
        let mut state = server.lock();
        let mut declare = |name: &str, dead_letter, lease| {
            let name = Arc::from(name);
            let config = Config {
                name,
                dead_letter,
                lease,
            };
            state
                .find(&config.name)
                .unwrap_or_else(|| state.declare(config))
        };
        let dead_letter = self.dead_letter.map(|name| declare(name, None, None));
        let index = declare(self.name, dead_letter, self.lease);
        let config = state.queues[index].config.clone();
        drop(state);
        assert!(
            (config.dead_letter, config.lease) == (dead_letter, self.lease),
            "the queue {:?} is declared with other settings",
            self.name,
        );
        let server = Arc::clone(server);
        let inner = Arc::new(Inner {
            index,
            config,
            server,
        });
        Queue { inner }
    }
}

impl<P> fmt::Debug for QueueBuilder<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QueueBuilder")
            .field("name", &self.name)
            .field("dead_letter", &self.dead_letter)
            .field("lease", &self.lease)
            .finish_non_exhaustive()
    }
}
