//! [`Queue`], to publish jobs, to count them and to read the dead letters.

use std::{fmt, future::poll_fn, sync::Arc, task::Poll, time::Duration};

use super::{
    connection::Connection,
    death::DeadLetter,
    deliveries::Deliveries,
    error::ConnectError,
    faults::SettleFault,
    jobs::Counts,
    properties::Headers,
    state::{Config, Declared, Server},
};
use crate::waiters::Waiter;

/// Handle to a queue of a [`Broker`](super::Broker); clones are handles to the same queue.
pub struct Queue<P> {
    pub(super) inner: Arc<Declared<P>>,
}

impl<P> Queue<P> {
    /// Returns the name of the queue.
    pub fn name(&self) -> &str {
        &self.inner.config.name
    }

    /// Puts a job at the end of the queue.
    pub fn publish(&self, payload: P) {
        self.push(payload, None);
    }

    /// Puts a job with headers at the end of the queue.
    ///
    /// With the headers `traceparent` and `tracestate`, the [spans](crate::settle::ProcessSpan) of the job
    /// can be linked to the trace of the sender.
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
        let Declared { server, index, .. } = &*self.inner;
        let step = server.lock().publish(*index, payload, headers);
        step.finish();
    }

    /// Subscribes over a new connection.
    ///
    /// # Errors
    ///
    /// [`ConnectError::Refused`] after [`refuse_connections`](super::Broker::refuse_connections).
    ///
    /// # Panics
    ///
    /// Panics if `prefetch` is 0.
    #[track_caller]
    pub fn subscribe(&self, prefetch: usize) -> Result<Deliveries<P>, ConnectError> {
        let connection = Connection::open(&self.inner.server)?;
        connection.subscribe(self, prefetch)
    }

    /// Returns the counts of the jobs by their state.
    pub fn counts(&self) -> Counts {
        let Declared { server, index, .. } = &*self.inner;
        let mut state = server.lock();
        let wakers = state.pass_time(*index);
        let counts = state.queues[*index].jobs.counts();
        drop(state);
        wakers.wake();
        counts
    }

    /// Returns the jobs of this queue that are in its dead-letter queue now, in the order of their
    /// rejection.
    pub fn dead_letters(&self) -> Vec<DeadLetter<P>>
    where
        P: Clone,
    {
        let Declared { server, config, .. } = &*self.inner;
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
        let Declared { server, index, .. } = &*self.inner;
        let waiter = Waiter::default();
        poll_fn(|cx| {
            waiter.register(cx.waker());
            let queue = &mut server.lock().queues[*index];
            if queue.jobs.is_empty() {
                return Poll::Ready(());
            }
            queue.emptied.add(&waiter);
            Poll::Pending
        })
        .await;
    }

    /// Makes the next `n` settlements fail with `fault`; replaces the number of an earlier call.
    ///
    /// They are not carried out: the job stays unsettled. An [`Abandon`](crate::Verdict::Abandon) sends
    /// nothing, and does not count. Failures with [`SettleFault::Again`] come first.
    pub fn fail_settlements(&self, n: u32, fault: SettleFault) {
        let Declared { server, index, .. } = &*self.inner;
        let faults = &mut server.lock().queues[*index].faults;
        match fault {
            SettleFault::Again => faults.again = n,
            SettleFault::Last => faults.last = n,
        }
    }

    /// Makes every later settlement wait for `delay` before it is carried out; zero by default.
    ///
    /// A settlement that is dropped during the delay is not carried out. If its channel is closed during the
    /// delay, it fails at once.
    pub fn delay_settlements(&self, delay: Duration) {
        let Declared { server, index, .. } = &*self.inner;
        server.lock().queues[*index].faults.delay = delay;
    }
}

impl<P> Connection<P> {
    /// Subscribes to `queue` over a new channel.
    ///
    /// # Errors
    ///
    /// [`ConnectError::Disconnected`] if the connection was dropped.
    ///
    /// # Panics
    ///
    /// Panics if `prefetch` is 0, or if `queue` belongs to another broker.
    #[track_caller]
    pub fn subscribe(
        &self,
        queue: &Queue<P>,
        prefetch: usize,
    ) -> Result<Deliveries<P>, ConnectError> {
        self.open_channel(&queue.inner, prefetch)
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

/// Builder of a [`Queue`]; see [`Broker::queue`](super::Broker::queue).
///
/// ```
/// use std::time::Duration;
/// use tower_sentinel::broker::memory::Broker;
///
/// let broker = Broker::new();
/// let orders = broker.queue("orders").dead_letter("orders.dead").lease(Duration::from_secs(30)).declare();
/// orders.publish("order 7");
/// assert_eq!(orders.counts().ready, 1);
/// ```
#[must_use = "a queue exists only after `declare`"]
pub struct QueueBuilder<'a, P> {
    server: &'a Arc<Server<P>>,
    name: &'a str,
    dead_letter: Option<&'a str>,
    suspects: Option<&'a str>,
    lease: Option<Duration>,
}

impl<'a, P> QueueBuilder<'a, P> {
    pub(super) fn new(server: &'a Arc<Server<P>>, name: &'a str) -> Self {
        Self {
            server,
            name,
            dead_letter: None,
            suspects: None,
            lease: None,
        }
    }

    /// Sets the queue for rejected jobs; by default they are dropped.
    ///
    /// The queue is declared if it does not exist yet.
    pub fn dead_letter(mut self, name: &'a str) -> Self {
        self.dead_letter = Some(name);
        self
    }

    /// Sets the queue for [suspects](crate::settle::Settle::is_suspect): jobs of a lost channel or lease; none
    /// by default.
    ///
    /// The queue is declared if it does not exist yet, and without dead letters then. Declare it before with
    /// those of this queue.
    ///
    /// ```
    /// use tower_sentinel::broker::memory::Broker;
    ///
    /// let broker = Broker::new();
    /// let lane = broker.queue("orders.suspects").dead_letter("orders.dead").declare();
    /// let orders = broker
    ///     .queue("orders")
    ///     .dead_letter("orders.dead")
    ///     .suspects("orders.suspects")
    ///     .declare();
    /// # orders.publish("order 7");
    /// # assert_eq!((orders.counts().ready, lane.counts().ready), (1, 0));
    /// ```
    pub fn suspects(mut self, name: &'a str) -> Self {
        self.suspects = Some(name);
        self
    }

    /// Sets the time that a consumer may hold a job before the queue takes it back; for ever by default.
    ///
    /// It is like JetStream's ack wait and SQS's visibility timeout: the delivery is charged.
    /// [`Settle::keep_alive`](crate::settle::Settle::keep_alive) restarts the time.
    pub fn lease(mut self, lease: Duration) -> Self {
        self.lease = Some(lease);
        self
    }

    /// Declares the queue, and returns a handle to it; to the existing queue if it was declared before.
    ///
    /// # Panics
    ///
    /// Panics if it was declared before with other settings, which is `PRECONDITION_FAILED` in AMQP.
    #[track_caller]
    pub fn declare(self) -> Queue<P> {
        let server = self.server;
        let mut state = server.lock();
        let mut declare = |name: &str, dead_letter, suspects, lease| {
            let name = Arc::from(name);
            let config = Config {
                name,
                dead_letter,
                suspects,
                lease,
            };
            state
                .find(&config.name)
                .unwrap_or_else(|| state.declare(config))
        };
        let mut plain = |name| declare(name, None, None, None);
        let dead_letter = self.dead_letter.map(&mut plain);
        let suspects = self.suspects.map(plain);
        let index = declare(self.name, dead_letter, suspects, self.lease);
        let config = state.queues[index].config.clone();
        drop(state);
        assert!(
            (config.dead_letter, config.suspects, config.lease)
                == (dead_letter, suspects, self.lease),
            "the queue {:?} is declared with other settings",
            self.name,
        );
        let server = Arc::clone(server);
        let inner = Arc::new(Declared {
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
            .field("suspects", &self.suspects)
            .field("lease", &self.lease)
            .finish_non_exhaustive()
    }
}
