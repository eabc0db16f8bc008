//! [`Consumer`], which drives a subscription into a service, and drains at the end.

use std::{
    fmt,
    future::IntoFuture,
    sync::{Arc, Mutex},
};

use tokio_util::sync::CancellationToken;
use tower_service::Service;

use crate::{
    outcome::{catch, drop_quietly},
    sentinel::{Sentinel, SentinelLayer},
};

mod connect;
mod consuming;
mod counts;
mod drain;
mod erased;
mod error;
mod escalation;
mod gate;
mod in_flight;
mod inbox;
mod options;
mod probe;
mod rebound;
mod reconnecting;
mod session;
mod sessions;
mod setters;
mod share;
mod signals;
mod single;
mod source;
mod stall;
mod state;
mod subscription;
mod summary;
mod supervised;
mod tasks;
mod watch;
mod watchdog;
mod watched;
mod work;

pub use self::{
    connect::{Connect, ConnectFn, connect_fn},
    consuming::Consuming,
    error::{ConsumerError, EndCause},
    escalation::{ByClosure, ByError, Classify, Escalate, Escalation},
    options::AfterError,
    probe::{Probe, ProbeError, Probing},
    reconnecting::ReconnectingConsumer,
    stall::{Stall, StallKind},
    state::{Pauser, Progress, State},
    subscription::Subscription,
    summary::Summary,
    supervised::{MakeServices, Supervised},
    watch::Watch,
};
use self::{
    options::Options, setters::setters, signals::Signals, single::start, supervised::Services,
    work::Wired,
};

/// Consumer that drives a [`Subscription`] into a service until one of them ends, or the end is requested.
///
/// It is awaited, as `axum::serve` is. The service is usually a stack of a `concurrency_limit`, a sentinel
/// and a handler. `C` decides the effect of a service error on the channel; see
/// [`escalation`](Self::escalation).
///
/// # Contract
///
/// - *Readiness*: a job is taken from the stream when the service is ready for it, and the service is then
///   called with it. With a `concurrency_limit` of n, at most n jobs are out of the stream and unsettled.
///   While the service is unready, [`poll_closed`](Subscription::poll_closed) is watched, so a connection
///   that dies is noticed.
/// - *End*: for every cause, the consumer stops pulling, drains, closes the channel and only then returns. It
///   returns a [`Summary`] if the end was requested, and a [`ConsumerError`] otherwise.
/// - *Lost settlements*: after an error that may leave a delivery unsettled, the channel is given up
///   ([`poll_close`](Subscription::poll_close)), so that the broker redelivers.
/// - *Panics* in the stream, in the service and in its response futures end the consumer with an error. A
///   panic in a call may have lost the settlement.
/// - *Loops*: a `tracing` event warns, every 10 s at most, while more than 100 jobs a second, and more than
///   half of all, are retried or released without a delay. The broker delivers them again at once.
/// - *Tasks*: the consumer is one task, which polls readiness, pulls, calls and polls the response futures. A
///   sentinel runs the jobs on separate tasks, so they use all cores. If one task is not enough, there can be
///   [several](Self::parallel).
///
/// # Draining
///
/// 1. The consumer stops pulling, and asks the broker for no more jobs
///    ([`poll_stop`](Subscription::poll_stop)). Meanwhile it lets running calls finish.
/// 2. After [`drain_timeout`](Self::drain_timeout), or at the [second signal](Self::with_forced_shutdown), it
///    cancels the [`shutdown`](Self::shutdown) token. The sentinel stops its jobs, which are `Cancelled` and
///    by default [released](crate::Verdict::Release): no attempt is charged.
/// 3. Response futures that have still not ended after [`stop_timeout`](Self::stop_timeout) are dropped and
///    counted in [`Summary::abandoned`]. Without a token there is no such wait, since nothing was told to
///    stop.
/// 4. It closes the channel, and waits 5 s at most for that.
///
/// If the channel [is gone](Subscription::is_gone), no job can be settled any more. Then step 2 comes at
/// once, and step 3 after 10 s at the latest.
///
/// The token is cancelled at the end of each drain, also of one that ended in time.
///
/// # Examples
///
/// ```
/// use std::{convert::Infallible, io, pin::Pin, task::{Context, Poll}};
/// use futures_util::Stream;
/// use tokio_util::sync::CancellationToken;
/// use tower::{ServiceBuilder, service_fn};
/// use tower_sentinel::{
///     Consumer, Job, Outcome, Report, SentinelLayer, consumer::{EndCause, Subscription},
/// };
///
/// struct Delivery(u64);
///
/// impl Job for Delivery {
///     type Tag = u64;
///     fn tag(&self) -> u64 { self.0 }
/// }
///
/// /// Stands for a broker's subscription: its connection breaks after three jobs.
/// struct Deliveries(u64);
///
/// impl Stream for Deliveries {
///     type Item = Result<Delivery, io::Error>;
///
///     fn poll_next(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
///         self.0 += 1;
///         Poll::Ready(Some(match self.0 {
///             1..=3 => Ok(Delivery(self.0)),
///             _ => Err(io::ErrorKind::ConnectionReset.into()),
///         }))
///     }
/// }
///
/// impl Subscription for Deliveries {
///     type Job = Delivery;
///     type Error = io::Error;
///
///     fn poll_closed(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
///         Poll::Pending
///     }
///
///     fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
///         Poll::Ready(())
///     }
/// }
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// let shutdown = CancellationToken::new();
/// let policy = service_fn(|report: Report<u64, (), io::Error>| async move {
///     assert!(report.outcome.is_completed());
///     Ok::<_, Infallible>("acked")
/// });
/// let service = ServiceBuilder::new()
///     .concurrency_limit(64)
///     .layer(SentinelLayer::new(policy).shutdown(shutdown.clone()))
///     .service_fn(|_: Delivery| async { Ok::<_, io::Error>(()) });
///
/// let error = Consumer::new(Deliveries(0), service)
///     .shutdown(shutdown)
///     .with_graceful_shutdown(async { tokio::signal::ctrl_c().await.unwrap() })
///     .with_forced_shutdown(async { tokio::signal::ctrl_c().await.unwrap() })
///     .run()
///     .await
///     .unwrap_err();
///
/// assert!(matches!(error.cause(), EndCause::Stream(_)));
/// assert_eq!(error.summary().answered, 3);
/// # }
/// ```
///
/// A consumer that operators watch, and that has less time for its end than Kubernetes gives by default (30 s):
///
/// ```
/// # use std::convert::Infallible;
/// # use tower::service_fn;
/// # use tower_sentinel::{SentinelLayer, SettlePolicy, ack_on_success, broker::memory::{Broker, Delivery}};
/// # async fn process(_: Delivery<u32>) -> Result<(), Infallible> { Ok(()) }
/// use std::time::Duration;
/// use tower_sentinel::{Consumer, consumer::AfterError};
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() {
/// # let queue = Broker::new().queue("jobs").declare();
/// # queue.publish(7);
/// # let layer = SentinelLayer::new(SettlePolicy::new(ack_on_success()));
/// let consumer = Consumer::new(queue.subscribe(64).unwrap(), service_fn(process))
///     .sentinel(layer.settle_timeout(Duration::from_secs(5)))
///     .drain_timeout(Duration::from_secs(15))
///     .stop_timeout(Duration::from_secs(10))
///     .on_error(AfterError::Stop);
/// let watch = consumer.watch();
/// # tokio::spawn(async move { queue.emptied().await; watch.drain() });
/// let summary = consumer.await.unwrap();
/// assert_eq!(summary.answered, 1);
/// # }
/// ```
#[must_use = "a consumer does nothing unless it is awaited"]
pub struct Consumer<B, S, C = ByError> {
    subscription: B,
    services: Services<S>,
    /// `None` for the default number.
    tasks: Option<usize>,
    classify: C,
    options: Options,
    signals: Signals,
    name: Option<Arc<str>>,
}

/// Panic message for a consumer with two shutdown tokens.
const TWO_TOKENS: &str = "the consumer and the layer have a shutdown token each: only one of them can stop \
     the jobs, so set the layer's alone";

impl<B, S> Consumer<B, S>
where
    B: Subscription + Send + 'static,
    B::Job: Send,
    B::Error: fmt::Display + Send + 'static,
    S: Service<B::Job> + Send + 'static,
    S::Future: Send + 'static,
    S::Response: Send + 'static,
    S::Error: fmt::Display + Send + 'static,
{
    /// Creates a consumer that calls `service` with the jobs of `subscription`.
    pub fn new(subscription: B, service: S) -> Self {
        Self::of(subscription, vec![service], None)
    }

    /// Creates a consumer with one task for each of `services`.
    ///
    /// It is for short jobs, at rates of hundreds of thousands a second, which are too many for one task. The
    /// tasks share the subscription. A job goes to the task that asks first, and a task whose service is
    /// unready does not ask. They end together, for the same cause, and the channel is closed when the last
    /// of them has drained.
    ///
    /// The limits of the services add up: with n tasks, the concurrency limit of each should be an n-th of
    /// the prefetch. Clones of one `concurrency_limit` share its permits instead. That is also correct, but
    /// slower, since every response may wake another core. An [intensity](crate::IntensityLayer) sees only
    /// the outcomes of its own service, unless each service is made with a clone of it.
    ///
    /// # Panics
    ///
    /// Panics if there are no services.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::convert::Infallible;
    /// use tower::{ServiceBuilder, limit::ConcurrencyLimit};
    /// use tower_sentinel::{
    ///     Consumer, SentinelLayer, SettlePolicy, ack_on_success,
    ///     broker::memory::{Broker, Delivery},
    /// };
    ///
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() {
    /// let broker = Broker::new();
    /// let queue = broker.queue("jobs").declare();
    /// (0..1_000).for_each(|number| queue.publish(number));
    ///
    /// let sentinel = ServiceBuilder::new()
    ///     .layer(SentinelLayer::new(SettlePolicy::new(ack_on_success())))
    ///     .service_fn(|_: Delivery<u64>| async { Ok::<_, Infallible>(()) });
    /// let deliveries = queue.subscribe(64).unwrap();
    /// let services = [(); 4].map(|()| ConcurrencyLimit::new(sentinel.clone(), 64 / 4));
    ///
    /// let summary = Consumer::parallel(deliveries, services)
    ///     .with_graceful_shutdown(async move {
    ///         queue.emptied().await;
    ///     })
    ///     .await
    ///     .unwrap();
    /// assert_eq!(summary.answered, 1_000);
    /// # }
    /// ```
    #[track_caller]
    pub fn parallel(subscription: B, services: impl IntoIterator<Item = S>) -> Self {
        let services = Vec::from_iter(services);
        let tasks = services.len();
        assert!(tasks > 0, "a consumer with 0 tasks would consume nothing");
        Self::of(subscription, services, Some(tasks))
    }

    fn of(subscription: B, services: Vec<S>, tasks: Option<usize>) -> Self {
        Self {
            subscription,
            services: Services::Given(services),
            tasks,
            classify: ByError,
            options: Options::default(),
            signals: Signals::default(),
            name: None,
        }
    }
}

impl Consumer<(), ()> {
    /// Creates a consumer that makes a new subscription and a fresh service each time that the last ones
    /// ended without a request.
    ///
    /// `make_service` gets the token for [`SentinelLayer::shutdown`](crate::SentinelLayer::shutdown). Each
    /// service has its own token, because the token is cancelled at the end of the service's drain.
    ///
    /// ```
    /// # use std::convert::Infallible;
    /// # use tower::service_fn;
    /// # use tower_sentinel::{SentinelLayer, SettlePolicy, ack_on_success, broker::memory::{Broker, Delivery}};
    /// # async fn process(_: Delivery<u32>) -> Result<(), Infallible> { Ok(()) }
    /// use std::future::ready;
    /// use tower_sentinel::Consumer;
    ///
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() {
    /// # let broker = Broker::new();
    /// # let queue = broker.queue("jobs").declare();
    /// # let layer = SentinelLayer::new(SettlePolicy::new(ack_on_success()));
    /// let connect = move || ready(queue.subscribe(64));
    /// let consumer = Consumer::reconnecting(connect, |_| service_fn(process)).sentinel(layer);
    /// let watch = consumer.watch();
    /// let consumer = tokio::spawn(consumer.run());
    /// # tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    ///
    /// broker.drop_connections();
    /// # tokio::time::sleep(std::time::Duration::from_secs(60)).await;
    /// assert!(watch.is_ready()); // a moment later
    /// # watch.drain();
    /// # assert!(consumer.await.unwrap().is_ok());
    /// # }
    /// ```
    pub fn reconnecting<K, M, B, S>(connect: K, make_service: M) -> ReconnectingConsumer<K, M>
    where
        K: Connect<Subscription = B, Error: fmt::Display + Send, Future: Send> + Send + 'static,
        M: FnMut(CancellationToken) -> S + Send + 'static,
        B: Subscription<Job: Send, Error: fmt::Display + Send + 'static> + Send + 'static,
        S: Service<B::Job, Response: Send, Future: Send> + Send + 'static,
        S::Error: fmt::Display + Send + 'static,
    {
        ReconnectingConsumer::new(connect, make_service)
    }
}

impl<B, S, C> Consumer<B, S, C> {
    setters!();

    /// Sets the token that the service's [`SentinelLayer::shutdown`](crate::SentinelLayer::shutdown) has,
    /// too: the consumer cancels it when a drain is over or cut short.
    ///
    /// A consumer with [its own sentinel](Self::sentinel) needs none.
    ///
    /// If the token is cancelled elsewhere, the consumer ends as after the [graceful
    /// signal](Self::with_graceful_shutdown): its jobs are already stopped.
    ///
    /// Without a token, a drain can stop running calls only by dropping them.
    pub fn shutdown(mut self, token: CancellationToken) -> Self {
        self.options.shutdown = Some(token);
        self
    }

    /// Puts the service under a sentinel that the consumer makes, which is the usual choice for a worker.
    ///
    /// The service is then only the handler. The consumer works like one with the stack `concurrency_limit` →
    /// [`SentinelLayer`] → handler, whose parts fit together:
    ///
    /// - *The limit* is the [`prefetch`](Subscription::prefetch) of the subscription: no more calls are in
    ///   flight. If the subscription does not report one, the only limit is the broker's.
    /// - *The shutdown token* is shared by both, so that a drain stops unfinished jobs instead of dropping
    ///   them. If the layer has a token, it is the parent of the shared one. Cancelling the parent stops the
    ///   jobs and ends the consumer; the consumer never cancels the parent.
    /// - *The tasks* are one for each worker thread of the runtime, but at most four. Each has an equal part
    ///   of the limit and a clone of the handler. [`parallel`](Self::parallel) sets another number.
    ///
    /// For middleware outside of the sentinel, as in the [table](crate::_guide::layer_order), build the stack
    /// by hand.
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
    /// let deliveries = queue.subscribe(64).unwrap();
    /// let layer = SentinelLayer::new(SettlePolicy::new(ack_on_success()));
    /// let summary = Consumer::new(deliveries, service_fn(process))
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
    pub fn sentinel<P, H>(mut self, layer: SentinelLayer<P, H>) -> Consumer<B, Sentinel<S, P, H>, C>
    where
        B: Subscription,
        S: Clone + Send + 'static,
        P: Clone + Send + 'static,
        H: Clone + Send + 'static,
        Sentinel<S, P, H>: Service<B::Job>,
    {
        self.options.is_bounded = true;
        self.map(
            |handlers| Services::Supervised(Box::new(Supervised::new(handlers, layer))),
            |classify| classify,
        )
    }

    /// Sets the function that decides the effect of a service error on the channel; by default the error
    /// itself decides, by [`Escalate`].
    ///
    /// Use it for errors that do not implement `Escalate`, such as the `BoxError` of a tower middleware
    /// around the sentinel:
    ///
    /// ```
    /// use std::{convert::Infallible, io};
    /// use tower::{BoxError, timeout::error::Elapsed};
    /// use tower_sentinel::{
    ///     Consumer, SentinelError, consumer::{Escalate, Escalation}, settle::SettleError,
    /// };
    ///
    /// type Inner = SentinelError<Infallible, SettleError<io::Error>>;
    ///
    /// fn escalation(error: &BoxError) -> Escalation {
    ///     match error.downcast_ref::<Inner>() {
    ///         Some(error) => error.escalation(),
    ///         // The sentinel settles in the background what a timeout drops.
    ///         None if error.is::<Elapsed>() => Escalation::Call,
    ///         None => Escalation::Channel,
    ///     }
    /// }
    ///
    /// # let queue = tower_sentinel::broker::memory::Broker::<u32>::new().queue("jobs").declare();
    /// # let subscription = queue.subscribe(1).unwrap();
    /// # let service = tower::service_fn(|_| async { Ok::<_, BoxError>(()) });
    /// let consumer = Consumer::new(subscription, service).escalation(escalation);
    /// # drop(consumer);
    /// let lost: BoxError = Inner::Policy(SettleError::Failed {
    ///     verdict: tower_sentinel::Verdict::Ack,
    ///     tries: 1,
    ///     error: io::ErrorKind::BrokenPipe.into(),
    /// }).into();
    /// assert_eq!(escalation(&lost), Escalation::Channel);
    /// ```
    pub fn escalation<E, F>(self, classify: F) -> Consumer<B, S, ByClosure<F>>
    where
        F: Fn(&E) -> Escalation,
    {
        self.map(|services| services, |_| ByClosure(classify))
    }

    fn map<T, D>(
        self,
        services: impl FnOnce(Services<S>) -> Services<T>,
        classify: impl FnOnce(C) -> D,
    ) -> Consumer<B, T, D> {
        Consumer {
            subscription: self.subscription,
            services: services(self.services),
            tasks: self.tasks,
            classify: classify(self.classify),
            options: self.options,
            signals: self.signals,
            name: self.name,
        }
    }
}

impl<B, S, C> Consumer<B, S, C> {
    /// Returns the future that `.await` would poll.
    ///
    /// If the [effect](Self::escalation) of a service error is not defined, the compiler names that error
    /// here. With an `.await` it only says that a consumer is not a future.
    pub fn run(self) -> Consuming<B::Error, S::Error>
    where
        B: Subscription + Send + 'static,
        B::Job: Send,
        B::Error: fmt::Display + Send + 'static,
        S: Service<B::Job> + Send + 'static,
        S::Future: Send + 'static,
        S::Response: Send + 'static,
        S::Error: fmt::Display + Send + 'static,
        C: Classify<S::Error> + Send + 'static,
    {
        let Self {
            subscription,
            mut services,
            tasks,
            classify,
            mut options,
            signals,
            name,
        } = self;
        if services.is_supervised() {
            options.shutdown = Some(match (options.shutdown, services.shutdown()) {
                (Some(_), Some(_)) => panic!("{TWO_TOKENS}"),
                (Some(token), None) => token,
                (None, Some(parent)) => parent.child_token(),
                (None, None) => CancellationToken::new(),
            });
        }
        let is_bounded = options.is_bounded;
        let wire = move |shutdown: &CancellationToken| match catch(|| {
            services.make_services(tasks, shutdown)
        }) {
            Ok(services) => {
                let classify = Arc::new(Mutex::new(classify));
                Ok(Wired::new(subscription, services, &classify, is_bounded))
            }
            Err(panic) => {
                drop_quietly(subscription);
                Err(panic)
            }
        };
        Consuming::new(start(Box::new(wire), options, name, signals))
    }
}

impl<B, S, C> IntoFuture for Consumer<B, S, C>
where
    B: Subscription + Send + 'static,
    B::Job: Send,
    B::Error: fmt::Display + Send + 'static,
    S: Service<B::Job> + Send + 'static,
    S::Future: Send + 'static,
    S::Response: Send + 'static,
    S::Error: fmt::Display + Send + 'static,
    C: Classify<S::Error> + Send + 'static,
{
    type Output = Result<Summary, ConsumerError<B::Error, S::Error>>;
    type IntoFuture = Consuming<B::Error, S::Error>;

    fn into_future(self) -> Self::IntoFuture {
        self.run()
    }
}

impl<B: fmt::Debug, S: fmt::Debug, C> fmt::Debug for Consumer<B, S, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Consumer")
            .field("name", &self.name)
            .field("subscription", &self.subscription)
            .field("services", &self.services)
            .field("options", &self.options)
            .field("signals", &self.signals)
            .finish_non_exhaustive()
    }
}
