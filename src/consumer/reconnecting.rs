//! [`ReconnectingConsumer`], which runs one session after another.

use std::{
    fmt,
    future::IntoFuture,
    ops::RangeInclusive,
    sync::{Arc, Mutex},
    time::Duration,
};

use tower_service::Service;

use super::{
    ByClosure, ByError, Classify, ConsumerError, Consuming, Escalation, Summary,
    connect::Connect,
    sessions::{Sessions, Settings},
    setters::setters,
    source::Typed,
    subscription::Subscription,
    supervised::{MakeServices, Supervised},
};
use crate::{
    backoff::Delays,
    sentinel::{Sentinel, SentinelLayer},
};

/// A [`Consumer`](crate::Consumer) that makes a new subscription and a fresh service each time that the last
/// ones ended without a request; see [`Consumer::reconnecting`](crate::Consumer::reconnecting).
///
/// There is a pause before each further attempt: a random part of a ceiling that doubles from attempt to
/// attempt ("full jitter"). The ceilings start over after a session that worked. That is one in which a call
/// succeeded, or which lasted longer than the longest pause, counted from the connection to the cause of its
/// end.
///
/// # Lost channels
///
/// If no tag of a session can be settled any more ([`Subscription::is_gone`]), for example after its
/// connection is lost, the consumer does not wait for its jobs. They drain beside the next session, and their
/// settlements are refused. So up to twice as many jobs run as one service allows. A redelivered job may run
/// beside its first run, as it may in another process. To stop such jobs instead, set a short
/// [`drain_timeout`](Self::drain_timeout).
///
/// A session whose end was requested is the last one. If its channel is gone, its running jobs are stopped,
/// as by [a `Consumer`](crate::Consumer#draining).
///
/// Only one session drains in this way. If the next session has lost its channel too, the first is told to
/// stop, and the consumer waits for it before it begins a third.
///
/// # Ending
///
/// The consumer gives up
/// - when its end is requested, which takes effect at once during a pause and while it connects: then it
///   returns the [`Summary`] of all sessions;
/// - after an error that a new channel would not help,
///   [`EndCause::Misconfigured`](crate::consumer::EndCause::Misconfigured);
/// - after [`max_attempts`](Self::max_attempts) attempts.
///
/// It returns when all sessions have drained.
///
/// A panic in `connect` or `make_service` is a failed attempt. So is a `connect` that takes longer than the
/// [`connect_timeout`](Self::connect_timeout). The token of such an attempt is cancelled, and its services
/// are dropped.
///
/// # Retried causes
///
/// | cause | | event |
/// | --- | --- | --- |
/// | a connection, stream or channel that ends; a service that is unready; a panic | for ever, or [`max_attempts`](Self::max_attempts) times | "reconnecting after a pause" at WARN each time, with the cause and the number of attempts |
/// | a `connect` that fails, also because of a wrong address or a refused password | the same: a broker that starts may not know its users yet | the same; the cause names the address |
/// | an error that a new channel would not help ([`EndCause::Misconfigured`](crate::consumer::EndCause::Misconfigured)); the end of the consumer's runtime | never | "not reconnecting" at ERROR |
///
/// So alert on a WARN that repeats, or set `max_attempts`.
///
/// # Examples
///
/// ```
/// # use std::{io, pin::Pin, task::{Context, Poll}};
/// # use futures_util::Stream;
/// # struct Deliveries;
/// # impl Stream for Deliveries {
/// #     type Item = Result<u64, io::Error>;
/// #     fn poll_next(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
/// #         Poll::Pending
/// #     }
/// # }
/// # impl tower_sentinel::consumer::Subscription for Deliveries {
/// #     type Job = u64;
/// #     type Error = io::Error;
/// #     fn poll_closed(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
/// #         Poll::Pending
/// #     }
/// #     fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> { Poll::Ready(()) }
/// # }
/// use std::{convert::Infallible, time::Duration};
/// use tower::{ServiceBuilder, service_fn};
/// use tower_sentinel::{Consumer, Report, SentinelLayer};
///
/// async fn connect() -> io::Result<Deliveries> {
///     Ok(Deliveries) // a connection, a channel, a subscription
/// }
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() {
/// let policy = service_fn(|_: Report<u64, (), io::Error>| async { Ok::<_, Infallible>("acked") });
/// let summary = Consumer::reconnecting(connect, move |shutdown| {
///     ServiceBuilder::new()
///         .concurrency_limit(64)
///         .layer(SentinelLayer::with_tag(policy, |job: &u64| *job).shutdown(shutdown))
///         .service_fn(|_: u64| async { Ok::<_, io::Error>(()) })
/// })
/// .backoff(Duration::from_secs(1)..=Duration::from_secs(60))
/// .with_graceful_shutdown(tokio::time::sleep(Duration::from_secs(3600)))
/// .run()
/// .await
/// .unwrap();
/// assert_eq!(summary.called, 0);
/// # }
/// ```
///
/// One that uses two cores, and ends if the broker is away for long:
///
/// ```
/// # use std::convert::Infallible;
/// # use tower::service_fn;
/// # use tower_sentinel::{SentinelLayer, SettlePolicy, ack_on_success, broker::memory::{Broker, Delivery}};
/// # async fn process(_: Delivery<u32>) -> Result<(), Infallible> { Ok(()) }
/// use std::{io, time::Duration};
/// use tower_sentinel::{
///     Consumer,
///     broker::memory::Deliveries,
///     consumer::{AfterError, EndCause, State},
/// };
///
/// async fn connect() -> io::Result<Deliveries<u32>> {
///     Err(io::ErrorKind::ConnectionRefused.into())
/// }
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() {
/// # let layer = SentinelLayer::new(SettlePolicy::new(ack_on_success()));
/// let consumer = Consumer::reconnecting(connect, |_| service_fn(process))
///     .sentinel(layer)
///     .tasks(2)
///     .on_error(AfterError::Continue)
///     .connect_timeout(Duration::from_secs(5))
///     .max_attempts(10)
///     .random(|| 0.5) // for a test: each pause is half of its ceiling
///     .drain_timeout(Duration::from_secs(15))
///     .stop_timeout(Duration::from_secs(10))
///     .with_forced_shutdown(async { tokio::signal::ctrl_c().await.unwrap() });
/// let watch = consumer.watch();
///
/// let error = consumer.await.unwrap_err();
/// assert!(matches!(error.cause(), EndCause::Connect(_)));
/// assert_eq!(watch.state(), State::Ended);
/// # }
/// ```
#[must_use = "a consumer does nothing unless it is awaited"]
pub struct ReconnectingConsumer<K, M, C = ByError> {
    connect: K,
    make_services: M,
    classify: C,
    settings: Settings,
}

impl<K, M> ReconnectingConsumer<K, M> {
    pub(super) fn new(connect: K, make_services: M) -> Self {
        Self {
            connect,
            make_services,
            classify: ByError,
            settings: Settings::default(),
        }
    }
}

impl<K, M, C> ReconnectingConsumer<K, M, C> {
    setters!(settings);

    /// Sets the ceilings of the pauses; from 500 ms to 30 s by default. The first is the lower bound, each is
    /// twice the last, and none is above the upper bound.
    ///
    /// # Panics
    ///
    /// Panics if the lower bound is zero, since it would never grow, or above the upper bound.
    #[track_caller]
    pub fn backoff(mut self, pauses: RangeInclusive<Duration>) -> Self {
        self.settings.retry.longest = *pauses.end();
        self.settings.retry.pauses = Delays::new(pauses);
        self
    }

    /// Sets the source of the jitter, a number from 0 to 1; for tests.
    pub fn random(mut self, random: fn() -> f64) -> Self {
        self.settings.retry.random = random;
        self
    }

    /// Sets the number of attempts in a row, without a session that worked, after which the consumer gives
    /// up; never by default.
    ///
    /// A connector tries all its addresses in one attempt. With pauses of up to 30 s, ten attempts may be over after
    /// two minutes: a worker that should outlast an outage of its broker sets no number.
    ///
    /// # Panics
    ///
    /// Panics if `max` is 0, since that would never connect.
    #[track_caller]
    pub fn max_attempts(mut self, max: u32) -> Self {
        assert!(max > 0, "`max_attempts(0)` would never connect");
        self.settings.retry.max_attempts = Some(max);
        self
    }

    /// Sets the time limit of one `connect`, including the subscription; 30 s by default.
    ///
    /// A `connect` that takes longer is dropped, and is a failed attempt.
    pub fn connect_timeout(mut self, limit: Duration) -> Self {
        self.settings.connect_timeout = limit;
        self
    }

    /// Sets the number of tasks of a session. `make_service` is called for each, with the same token.
    ///
    /// The default is 1. With [its own sentinel](Self::sentinel) the consumer chooses the number, as
    /// [`Consumer::sentinel`](crate::Consumer::sentinel) does, and divides the limit. Otherwise the limits of
    /// the tasks add up, see [`Consumer::parallel`](crate::Consumer::parallel).
    ///
    /// # Panics
    ///
    /// Panics if `number` is 0, since that would consume nothing.
    #[track_caller]
    pub fn tasks(mut self, number: usize) -> Self {
        assert!(number > 0, "`tasks(0)` would consume nothing");
        self.settings.tasks = Some(number);
        self
    }

    /// Puts the service under a sentinel that the consumer makes, as
    /// [`Consumer::sentinel`](crate::Consumer::sentinel) does: `make_service` then makes only the handler.
    ///
    /// It makes one handler for each session; each further task has a clone of it. Make anything that must
    /// last longer, such as an [`IntensityLayer`](crate::IntensityLayer), before that, and clone it.
    ///
    /// Each session has a fresh shutdown token. If the layer has a token, it is the parent of all of them.
    /// Cancelling the parent stops the jobs and ends the consumer; the consumer never cancels the parent.
    ///
    /// ```
    /// use std::{convert::Infallible, time::Duration};
    /// use tower::service_fn;
    /// use tower_sentinel::{
    ///     Consumer, SentinelLayer, SettlePolicy, ack_on_success,
    ///     broker::memory::{Broker, Delivery},
    /// };
    ///
    /// async fn process(delivery: Delivery<u32>) -> Result<(), Infallible> {
    ///     assert_eq!(*delivery.payload(), 7);
    ///     Ok(())
    /// }
    ///
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() {
    /// let queue = Broker::new().queue("jobs").declare();
    /// queue.publish(7);
    ///
    /// let jobs = queue.clone();
    /// let connect = move || std::future::ready(jobs.subscribe(64));
    /// let layer = SentinelLayer::new(SettlePolicy::new(ack_on_success()));
    /// let summary = Consumer::reconnecting(connect, |_| service_fn(process))
    ///     .sentinel(layer.timeout(Duration::from_secs(30)))
    ///     .with_graceful_shutdown(async move {
    ///         queue.emptied().await;
    ///     })
    ///     .run()
    ///     .await
    ///     .unwrap();
    /// assert_eq!(summary.answered, 1);
    /// # }
    /// ```
    pub fn sentinel<P, H, B, S>(
        mut self,
        layer: SentinelLayer<P, H>,
    ) -> ReconnectingConsumer<K, Supervised<M, P, H>, C>
    where
        K: Connect<Subscription = B>,
        B: Subscription,
        M: MakeServices<Service = S>,
        S: Clone,
        P: Clone,
        H: Clone,
        Sentinel<S, P, H>: Service<B::Job>,
    {
        self.settings.options.is_bounded = true;
        self.map(
            |handlers| Supervised::new(handlers, layer),
            |classify| classify,
        )
    }

    /// Sets the function that decides the effect of a service error on the channel; see
    /// [`Consumer::escalation`](crate::Consumer::escalation).
    ///
    /// ```
    /// # use std::{convert::Infallible, future::ready, io};
    /// # use tower::{ServiceBuilder, service_fn};
    /// # use tower_sentinel::{Consumer, broker::memory::{Broker, Delivery}};
    /// use tower_sentinel::consumer::Escalation;
    ///
    /// # let queue = Broker::<u32>::new().queue("jobs").declare();
    /// # let connect = move || ready(queue.subscribe(64));
    /// # let make_service = |_| service_fn(|_: Delivery<u32>| async { Err::<(), _>(io::Error::other("no")) });
    /// let consumer = Consumer::reconnecting(connect, make_service).escalation(|error: &io::Error| match error.kind() {
    ///     io::ErrorKind::PermissionDenied => Escalation::Consumer, // a new channel would not help
    ///     _ => Escalation::Channel,
    /// });
    /// # drop(consumer);
    /// ```
    pub fn escalation<E, F>(self, classify: F) -> ReconnectingConsumer<K, M, ByClosure<F>>
    where
        F: Fn(&E) -> Escalation,
    {
        self.map(|services| services, |_| ByClosure(classify))
    }

    fn map<N, D>(
        self,
        make_services: impl FnOnce(M) -> N,
        classify: impl FnOnce(C) -> D,
    ) -> ReconnectingConsumer<K, N, D> {
        ReconnectingConsumer {
            connect: self.connect,
            make_services: make_services(self.make_services),
            classify: classify(self.classify),
            settings: self.settings,
        }
    }
}

impl<K, M, C> ReconnectingConsumer<K, M, C> {
    /// Returns the future that `.await` would poll; see [`Consumer::run`](crate::Consumer::run).
    pub fn run<B, S>(self) -> Consuming<B::Error, S::Error, K::Error>
    where
        K: Connect<Subscription = B, Error: fmt::Display + Send, Future: Send> + Send + 'static,
        M: MakeServices<Service = S> + Send + 'static,
        B: Subscription<Job: Send, Error: fmt::Display + Send + 'static> + Send + 'static,
        S: Service<B::Job, Response: Send, Future: Send> + Send + 'static,
        S::Error: fmt::Display + Send + 'static,
        C: Classify<S::Error> + Send + 'static,
    {
        let source = Box::new(Typed {
            connect: self.connect,
            make_services: self.make_services,
            classify: Arc::new(Mutex::new(self.classify)),
            is_bounded: self.settings.options.is_bounded,
            connecting: None,
            services: Vec::new(),
        });
        Consuming::new(Sessions::start(source, self.settings))
    }
}

impl<K, M, C, B, S> IntoFuture for ReconnectingConsumer<K, M, C>
where
    K: Connect<Subscription = B, Error: fmt::Display + Send, Future: Send> + Send + 'static,
    M: MakeServices<Service = S> + Send + 'static,
    B: Subscription<Job: Send, Error: fmt::Display + Send + 'static> + Send + 'static,
    S: Service<B::Job, Response: Send, Future: Send> + Send + 'static,
    S::Error: fmt::Display + Send + 'static,
    C: Classify<S::Error> + Send + 'static,
{
    type Output = Result<Summary, ConsumerError<B::Error, S::Error, K::Error>>;
    type IntoFuture = Consuming<B::Error, S::Error, K::Error>;

    fn into_future(self) -> Self::IntoFuture {
        self.run()
    }
}

impl<K, M, C> fmt::Debug for ReconnectingConsumer<K, M, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReconnectingConsumer")
            .field("name", &self.settings.name)
            .field("options", &self.settings.options)
            .field("signals", &self.settings.signals)
            .field("retry", &self.settings.retry)
            .finish_non_exhaustive()
    }
}
