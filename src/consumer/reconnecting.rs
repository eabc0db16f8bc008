//! [`ReconnectingConsumer`]: one session after the other.

use std::{
    fmt,
    future::{Future, IntoFuture, poll_fn},
    ops::RangeInclusive,
    panic::resume_unwind,
    pin::pin,
    sync::{Arc, Mutex},
    task::Poll,
    time::Duration,
};

use tokio::{
    task::JoinHandle,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tower_service::Service;

use super::{
    AfterError, ByClosure, ByError, Classify, ConsumerError, Consuming, EndCause, Escalation,
    Summary,
    in_flight::Call,
    session::Options,
    signals::{Asked, Signals},
    tasks::{Ended, Ending, Rest, consume, end_last},
};
use crate::{
    backoff::{Delays, full_jitter},
    consumer::subscription::Subscription,
    outcome::{catch, drop_quietly, guard},
    telemetry::consumer_name::carried,
};

/// A [`Consumer`](crate::Consumer) that makes a new subscription and a fresh service whenever the
/// last ones ended without being asked to; see
/// [`Consumer::reconnecting`](crate::Consumer::reconnecting).
///
/// Before each further try there is a pause: a random part of a ceiling that doubles from try to
/// try ("full jitter"). The ceilings start over after a session that worked: one that answered a
/// job, or lasted longer than the longest pause, counted from the connection to the cause of its end.
///
/// # A channel that is gone
///
/// When no tag of a session can be settled any more ([`Subscription::is_gone`]), as when its connection is
/// lost, nobody waits for its jobs: they drain beside the next session, and their settlements are
/// refused. So up to twice as many jobs run as one service allows, and one that is redelivered may run
/// beside its first run, as it may in another process. To have them stopped instead, set a short
/// [`drain_timeout`](Self::drain_timeout).
///
/// A session that was asked to end is the last one: if its channel is gone, what runs is stopped, as by
/// [a `Consumer`](crate::Consumer#how-a-consumer-drains).
///
/// No more than one session drains so: when the next one has lost its channel, too, the first is told to
/// stop, and waited for, before there is a third.
///
/// # How it ends
///
/// It gives up
/// - when it is asked to end, at once during a pause and while it connects: then it returns the
///   [`Summary`] of all sessions;
/// - after an error that a new channel would not help, [`EndCause::Misconfigured`];
/// - after [`max_attempts`](Self::max_attempts) tries.
///
/// It returns when all sessions have drained.
///
/// A panic in `connect` or `make_service` is a try that failed, as is a `connect` that takes longer
/// than the [`connect_timeout`](Self::connect_timeout). The token and the services of such a try are
/// cancelled and dropped.
///
/// # What is retried
///
/// | cause | | event |
/// | --- | --- | --- |
/// | a connection, stream or channel that ends; a service that is unready; a panic | for ever, or [`max_attempts`](Self::max_attempts) times | "will reconnect" at WARN each time, with the cause and the number of tries |
/// | a `connect` that fails, also by an address that is wrong or a password that is refused | the same: a broker that starts may not know its users yet | the same; the cause names the address |
/// | an error that a new channel would not help ([`EndCause::Misconfigured`]); the end of the consumer's runtime | never | "does not reconnect" at ERROR |
///
/// So alert on WARN that goes on, or set `max_attempts`.
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
#[must_use = "a consumer does nothing unless it is awaited"]
pub struct ReconnectingConsumer<F, M, C = ByError> {
    connect: F,
    make_service: M,
    classify: C,
    options: Options,
    signals: Signals,
    retry: Retry,
    connect_timeout: Duration,
    tasks: usize,
    name: Option<Arc<str>>,
}

#[derive(Clone, Copy, Debug)]
struct Retry {
    pauses: Delays,
    longest: Duration,
    random: fn() -> f64,
    max_attempts: Option<u32>,
}

impl<F, M> ReconnectingConsumer<F, M> {
    pub(super) fn new(connect: F, make_service: M) -> Self {
        let (min, max) = (Duration::from_millis(500), Duration::from_secs(30));
        Self {
            connect,
            make_service,
            classify: ByError,
            options: Options::default(),
            signals: Signals::default(),
            retry: Retry {
                pauses: Delays::new(min..=max),
                longest: max,
                random: fastrand::f64,
                max_attempts: None,
            },
            connect_timeout: Duration::from_secs(30),
            tasks: 1,
            name: None,
        }
    }
}

impl<F, M, C> ReconnectingConsumer<F, M, C> {
    /// Sets the name, which is in all that is told of the consumer and its jobs; see
    /// [`Consumer::name`](crate::Consumer::name).
    pub fn name(mut self, name: impl Into<Arc<str>>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Sets the ceilings of the pauses: the first is the lower bound, each is twice the last, and
    /// none is above the upper bound; from 500 ms to 30 s by default.
    ///
    /// # Panics
    ///
    /// Panics if the lower bound is zero, which would never grow, or above the upper one.
    #[track_caller]
    pub fn backoff(mut self, pauses: RangeInclusive<Duration>) -> Self {
        self.retry.longest = *pauses.end();
        self.retry.pauses = Delays::new(pauses);
        self
    }

    /// Sets where the jitter comes from, a number from 0 to 1; for tests.
    pub fn random(mut self, random: fn() -> f64) -> Self {
        self.retry.random = random;
        self
    }

    /// Sets after how many tries in a row without a session that worked it gives up; never by
    /// default.
    ///
    /// # Panics
    ///
    /// Panics if `max` is 0, which would never connect.
    #[track_caller]
    pub fn max_attempts(mut self, max: u32) -> Self {
        assert!(max > 0, "`max_attempts(0)` would never connect");
        self.retry.max_attempts = Some(max);
        self
    }

    /// Sets how long one `connect` may take, the subscription included; 30 s by default.
    ///
    /// A `connect` that takes longer is dropped, and is a try that failed.
    pub fn connect_timeout(mut self, limit: Duration) -> Self {
        self.connect_timeout = limit;
        self
    }

    /// Drains and returns once `signal` resolves; see
    /// [`Consumer::with_graceful_shutdown`](crate::Consumer::with_graceful_shutdown).
    pub fn with_graceful_shutdown<G>(mut self, signal: G) -> Self
    where
        G: Future<Output = ()> + Send + 'static,
    {
        self.signals.graceful = Some(Box::pin(signal));
        self
    }

    /// Cuts the drain short once `signal` resolves; see
    /// [`Consumer::with_forced_shutdown`](crate::Consumer::with_forced_shutdown).
    pub fn with_forced_shutdown<G>(mut self, signal: G) -> Self
    where
        G: Future<Output = ()> + Send + 'static,
    {
        self.signals.forced = Some(Box::pin(signal));
        self
    }

    /// Sets how long what runs may take to finish once a session ends; 30 s by default. See
    /// [`Consumer::drain_timeout`](crate::Consumer::drain_timeout).
    pub fn drain_timeout(mut self, limit: Duration) -> Self {
        self.options.drain_timeout = limit;
        self
    }

    /// Sets how long what is told to stop may take to be settled; 40 s by default. See
    /// [`Consumer::stop_timeout`](crate::Consumer::stop_timeout).
    pub fn stop_timeout(mut self, limit: Duration) -> Self {
        self.options.stop_timeout = limit;
        self
    }

    /// Sets how many tasks a session has; 1 by default. `make_service` is called for each, with the
    /// same token.
    ///
    /// See [`Consumer::with_tasks`](crate::Consumer::with_tasks), in particular for their limits, which
    /// add up.
    ///
    /// # Panics
    ///
    /// Panics if `number` is 0, which would consume nothing.
    #[track_caller]
    pub fn tasks(mut self, number: usize) -> Self {
        assert!(number > 0, "`tasks(0)` would consume nothing");
        self.tasks = number;
        self
    }

    /// Sets what happens after an error that concerns [one call alone](Escalation::Call);
    /// [`AfterError::Stop`] by default, which ends the session.
    pub fn on_error(mut self, after_error: AfterError) -> Self {
        self.options.after_error = after_error;
        self
    }

    /// Sets who says what an error of the service means for the channel; see
    /// [`Consumer::escalation`](crate::Consumer::escalation).
    pub fn escalation<E, K>(self, classify: K) -> ReconnectingConsumer<F, M, ByClosure<K>>
    where
        K: Fn(&E) -> Escalation,
    {
        ReconnectingConsumer {
            connect: self.connect,
            make_service: self.make_service,
            classify: ByClosure(classify),
            options: self.options,
            signals: self.signals,
            retry: self.retry,
            connect_timeout: self.connect_timeout,
            tasks: self.tasks,
            name: self.name,
        }
    }
}

impl<F, M, C> ReconnectingConsumer<F, M, C> {
    /// Returns the future that `.await` would poll; see [`Consumer::run`](crate::Consumer::run).
    pub fn run<Fut, B, S, X>(self) -> Consuming<B::Error, S::Error, X>
    where
        F: FnMut() -> Fut + Send + 'static,
        Fut: Future<Output = Result<B, X>> + Send + 'static,
        M: FnMut(CancellationToken) -> S + Send + 'static,
        X: fmt::Display + Send + 'static,
        B: Subscription + Send + 'static,
        B::Job: Send,
        B::Error: fmt::Display + Send + 'static,
        S: Service<B::Job> + Send + 'static,
        S::Future: Send + 'static,
        S::Response: Send + 'static,
        S::Error: fmt::Display + Send + 'static,
        C: Classify<S::Error> + Send + 'static,
    {
        let signals = self.signals;
        let mut sessions = Sessions {
            connect: self.connect,
            make_service: self.make_service,
            classify: Arc::new(Mutex::new(self.classify)),
            options: self.options,
            connect_timeout: self.connect_timeout,
            tasks: self.tasks,
            total: Summary::default(),
            beside: None,
        };
        let retry = self.retry;
        Consuming::new(self.name, signals, |mut signals| async move {
            let cause = sessions.run(retry, &mut signals).await;
            signals.attend(sessions.join_beside()).await;
            match cause {
                None => Ok(sessions.total),
                Some(cause) => Err(ConsumerError::new(cause, sessions.total)),
            }
        })
    }
}

impl<F, M, C, Fut, B, S, X> IntoFuture for ReconnectingConsumer<F, M, C>
where
    F: FnMut() -> Fut + Send + 'static,
    Fut: Future<Output = Result<B, X>> + Send + 'static,
    M: FnMut(CancellationToken) -> S + Send + 'static,
    X: fmt::Display + Send + 'static,
    B: Subscription + Send + 'static,
    B::Job: Send,
    B::Error: fmt::Display + Send + 'static,
    S: Service<B::Job> + Send + 'static,
    S::Future: Send + 'static,
    S::Response: Send + 'static,
    S::Error: fmt::Display + Send + 'static,
    C: Classify<S::Error> + Send + 'static,
{
    type Output = Result<Summary, ConsumerError<B::Error, S::Error, X>>;
    type IntoFuture = Consuming<B::Error, S::Error, X>;

    fn into_future(self) -> Self::IntoFuture {
        self.run()
    }
}

/// The sessions of a consumer, and what they did together.
struct Sessions<F, M, C> {
    connect: F,
    make_service: M,
    classify: Arc<Mutex<C>>,
    options: Options,
    connect_timeout: Duration,
    tasks: usize,
    total: Summary,
    /// The session that drains beside the present one.
    beside: Option<Beside>,
}

/// A session whose channel is gone, and that still drains.
struct Beside {
    /// Cuts its drain short.
    stop: CancellationToken,
    task: JoinHandle<Summary>,
}

/// Why a session ended, or could not begin.
struct Failure<T, E, X> {
    cause: EndCause<T, E, X>,
    answered: u64,
    lasted: Duration,
}

impl<T, E, X> From<EndCause<T, E, X>> for Failure<T, E, X> {
    fn from(cause: EndCause<T, E, X>) -> Self {
        Self {
            cause,
            answered: 0,
            lasted: Duration::ZERO,
        }
    }
}

impl<F, M, C> Sessions<F, M, C> {
    /// Runs one session after the other, and returns why it gave up: nothing if it was asked to end.
    async fn run<Fut, B, S, X>(
        &mut self,
        retry: Retry,
        signals: &mut Signals,
    ) -> Option<EndCause<B::Error, S::Error, X>>
    where
        F: FnMut() -> Fut,
        Fut: Future<Output = Result<B, X>>,
        M: FnMut(CancellationToken) -> S,
        X: fmt::Display,
        B: Subscription<Job: Send, Error: fmt::Display + Send + 'static> + Send + 'static,
        S: Service<B::Job, Response: Send + 'static> + Send + 'static,
        S::Error: fmt::Display + Send + 'static,
        S::Future: Send + 'static,
        C: Classify<S::Error> + Send + 'static,
    {
        // In a row; and which of the pauses comes next.
        let (mut failures, mut step) = (0_u32, 0_u32);
        loop {
            guard(|| tracing::info!(attempt = failures + 1, "connecting"));
            let Failure {
                cause,
                answered,
                lasted,
            } = self.next(signals).await?;
            let worked = answered > 0 || lasted > retry.longest;
            (failures, step) = match worked {
                true => (0, 1),
                false => (failures.saturating_add(1), step.saturating_add(1)),
            };
            if !cause.is_transient() || retry.max_attempts.is_some_and(|max| failures >= max) {
                let attempts = failures;
                guard(|| {
                    tracing::error!(attempts, cause = cause.print(), "does not reconnect");
                });
                return Some(cause);
            }
            let ceiling = retry.pauses.nth(step);
            let pause = full_jitter(ceiling, catch(retry.random).unwrap_or(1.0));
            guard(|| {
                tracing::warn!(
                    attempts = failures,
                    ?pause,
                    cause = cause.print(),
                    "will reconnect"
                );
            });
            drop_quietly(cause);
            signals.unless_asked(sleep(pause)).await?;
        }
    }

    /// Runs one session, and returns why it ended or could not begin: nothing if it was asked to end.
    async fn next<Fut, B, S, X>(
        &mut self,
        signals: &mut Signals,
    ) -> Option<Failure<B::Error, S::Error, X>>
    where
        F: FnMut() -> Fut,
        Fut: Future<Output = Result<B, X>>,
        M: FnMut(CancellationToken) -> S,
        B: Subscription<Job: Send, Error: fmt::Display + Send + 'static> + Send + 'static,
        S: Service<B::Job, Response: Send + 'static> + Send + 'static,
        S::Error: fmt::Display + Send + 'static,
        S::Future: Send + 'static,
        C: Classify<S::Error> + Send + 'static,
    {
        // Before the connection, which has then nothing to be closed for.
        let shutdown = CancellationToken::new();
        let make_services = || {
            let services = (0..self.tasks).map(|_| (self.make_service)(shutdown.clone()));
            services.collect()
        };
        let services: Vec<S> = match catch(make_services) {
            Ok(services) => services,
            Err(panic) => return Some(EndCause::MakeServicePanicked(panic).into()),
        };
        let subscription = match self.subscribe(signals).await {
            Some(Ok(subscription)) => subscription,
            unconnected => {
                // Whoever has the token, or the services, waits for their end.
                guard(|| shutdown.cancel());
                services.into_iter().for_each(drop_quietly);
                return unconnected.and_then(Result::err).map(Failure::from);
            }
        };
        guard(|| tracing::info!("connected"));
        let gone = CancellationToken::new();
        self.options.shutdown = Some(shutdown);
        self.options.gone = gone.clone();
        let subscription = Box::pin(subscription);
        let stop = signals.stop_token();
        let Self {
            classify, options, ..
        } = self;
        let consuming = consume(
            subscription,
            services,
            classify,
            options,
            signals,
            stop.clone(),
        );
        let Ending {
            cause,
            answered,
            lasted,
            mut rest,
        } = consuming.await;
        // A session that was asked to end is the last one, and waited for.
        let is_last = cause.is_none();
        let ended = async {
            if is_last {
                return Some(end_last(&mut rest, &gone, &stop).await);
            }
            let mut gone = pin!(gone.cancelled());
            poll_fn(|cx| match rest.as_mut().poll(cx) {
                Poll::Ready(ended) => Poll::Ready(Some(ended)),
                Poll::Pending => gone.as_mut().poll(cx).map(|()| None),
            })
            .await
        };
        let ended = signals.attend(ended).await;
        let (answered, other) = match ended {
            Some(Ended { cause, summary }) => {
                let answered = summary.answered;
                self.total.add(summary);
                (answered, cause)
            }
            None => {
                self.drain_beside(rest, stop, signals).await;
                (answered, None)
            }
        };
        let Some(cause) = cause else {
            drop_quietly(other);
            return None;
        };
        let cause = cause.or_graver(other);
        // What is asked for while an error drains is an end too.
        match signals.asked() {
            Asked::Drain | Asked::Stop if cause.is_transient() => None,
            _ => Some(Failure {
                cause: cause.widen(),
                answered,
                lasted,
            }),
        }
    }

    /// Lets a session drain while the next ones run, and has the one before it stopped.
    async fn drain_beside<T, E>(
        &mut self,
        rest: Rest<T, E>,
        stop: CancellationToken,
        signals: &mut Signals,
    ) where
        T: Send + 'static,
        E: Send + 'static,
    {
        guard(|| tracing::info!("the channel is gone: the session drains beside the next one"));
        let rest = async move {
            let ended = rest.await;
            // A service that can't be used as configured tells the next session, too.
            drop_quietly(ended.cause);
            ended.summary
        };
        let task = tokio::spawn(carried(rest));
        if let Some(older) = &self.beside {
            older.stop.cancel();
        }
        signals.attend(self.join_beside()).await;
        self.beside = Some(Beside { stop, task });
    }

    /// Waits for the session that drains beside the present one.
    async fn join_beside(&mut self) {
        let Some(beside) = self.beside.take() else {
            return;
        };
        match beside.task.await {
            Ok(summary) => self.total.add(summary),
            Err(error) => {
                if let Ok(payload) = error.try_into_panic() {
                    // What is the user's is caught where it is called.
                    resume_unwind(payload);
                }
            }
        }
    }

    /// Connects, unless the end is asked for first.
    async fn subscribe<Fut, B, T, E, X>(
        &mut self,
        signals: &mut Signals,
    ) -> Option<Result<B, EndCause<T, E, X>>>
    where
        F: FnMut() -> Fut,
        Fut: Future<Output = Result<B, X>>,
    {
        let connecting = match catch(&mut self.connect) {
            Ok(connecting) => connecting,
            Err(panic) => return Some(Err(EndCause::ConnectPanicked(panic))),
        };
        let limit = self.connect_timeout;
        let connecting = timeout(limit, Call::new(connecting));
        Some(match signals.unless_asked(connecting).await? {
            Ok(Ok(Ok(subscription))) => Ok(subscription),
            Ok(Ok(Err(error))) => Err(EndCause::Connect(error)),
            Ok(Err(panic)) => Err(EndCause::ConnectPanicked(panic)),
            Err(_elapsed) => Err(EndCause::ConnectTimedOut(limit)),
        })
    }
}

impl<F, M, C> fmt::Debug for ReconnectingConsumer<F, M, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReconnectingConsumer")
            .field("name", &self.name)
            .field("options", &self.options)
            .field("signals", &self.signals)
            .field("retry", &self.retry)
            .finish_non_exhaustive()
    }
}
