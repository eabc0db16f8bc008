//! The worker of the scenarios: a [`Consumer`] with the whole stack.

use std::{
    convert::Infallible,
    fmt,
    future::Future,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio_util::sync::CancellationToken;
use tower::{Service, ServiceBuilder, service_fn};
use tower_sentinel::{
    Consumer, SentinelError, SentinelLayer, SettlePolicy, Verdict,
    consumer::{ConsumerError, Summary},
    outcome::OutcomeKind,
    settle::{SettleError, Settled, decision::Decision},
};

use super::TestBroker;

/// A short [`Setup::drain`].
const DRAIN: Duration = Duration::from_millis(200);

/// A time limit for jobs that hang; less than a [`TestBroker::REDELIVERY`].
const LIMIT: Duration = Duration::from_secs(1);

/// The dependency of a scenario's jobs is down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refused;

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the dependency refused")
    }
}

/// The error of a worker's service, where `E` is that of the jobs.
pub(super) type StackError<B, E> = SentinelError<E, SettleError<<B as TestBroker>::DeliveryError>>;

/// How a worker ends; `E` is the error of the jobs, and `C` that of connecting.
pub(super) type Ended<B, E, C = Infallible> =
    Result<Summary, ConsumerError<<B as TestBroker>::SubscriptionError, StackError<B, E>, C>>;

/// What the broker was told, job by job.
#[derive(Clone, Debug, Default)]
pub(super) struct Told(Arc<Mutex<Vec<(OutcomeKind, Verdict)>>>);

impl Told {
    pub(super) fn all(&self) -> Vec<(OutcomeKind, Verdict)> {
        self.0.lock().unwrap().clone()
    }
}

/// How a worker works.
#[derive(Clone)]
pub(super) struct Setup<D> {
    pub(super) prefetch: usize,
    pub(super) decision: D,
    pub(super) limit: Duration,
    /// How long what runs may take to finish once a session ends.
    pub(super) drain: Duration,
    /// What it does is added here.
    pub(super) told: Told,
}

impl<D> Setup<D> {
    pub(super) fn new(prefetch: usize, decision: D) -> Self {
        Self {
            prefetch,
            decision,
            limit: LIMIT,
            drain: DRAIN,
            told: Told::default(),
        }
    }

    /// Returns the stack around `handler`, outermost the limit of the prefetch.
    fn stack<B, H, E>(
        self,
        shutdown: CancellationToken,
        handler: H,
    ) -> impl Service<
        B::Job,
        Response = Settled,
        Error = StackError<B, E>,
        Future = impl Future<Output = Result<Settled, StackError<B, E>>> + Send + 'static,
    > + Send
    + 'static
    where
        B: TestBroker,
        D: Decision<B::Tag, (), E> + Clone + Send + 'static,
        H: Service<B::Job, Response = (), Error = E, Future: Send> + Clone + Send + 'static,
        E: fmt::Display + Send + 'static,
    {
        let told = self.told;
        ServiceBuilder::new()
            .concurrency_limit(self.prefetch)
            .map_response(move |settled: Settled| {
                told.0.lock().unwrap().push((settled.kind, settled.verdict));
                settled
            })
            .layer(
                SentinelLayer::new(SettlePolicy::new(self.decision))
                    .timeout(self.limit)
                    .shutdown(shutdown),
            )
            .service(handler)
    }

    /// Works on `jobs` with `handler` until `stop`, or until the session ends in another way.
    pub(super) async fn work<B, H, E>(
        &self,
        jobs: B::Subscription,
        stop: &CancellationToken,
        handler: H,
    ) -> Ended<B, E>
    where
        B: TestBroker,
        D: Decision<B::Tag, (), E> + Clone + Send + 'static,
        H: Service<B::Job, Response = (), Error = E, Future: Send> + Clone + Send + 'static,
        E: fmt::Display + Send + 'static,
    {
        let shutdown = CancellationToken::new();
        let service = self.clone().stack::<B, _, _>(shutdown.clone(), handler);
        Consumer::new(jobs, service)
            .shutdown(shutdown)
            .drain_timeout(self.drain)
            .with_graceful_shutdown(stop.clone().cancelled_owned())
            .await
    }

    /// Works as [`work`](Self::work) does, and connects anew whenever a session ends.
    ///
    /// It gives up after `max_attempts`, if there is such a number.
    pub(super) async fn work_on<B, H, F, E>(
        self,
        broker: &B,
        max_attempts: Option<u32>,
        stop: &CancellationToken,
        handler: H,
    ) -> Ended<B, E, B::ConnectError>
    where
        B: TestBroker + 'static,
        D: Decision<B::Tag, (), E> + Clone + Send + 'static,
        H: Fn(B::Job) -> F + Clone + Send + 'static,
        F: Future<Output = Result<(), E>> + Send + 'static,
        E: fmt::Display + Send + 'static,
    {
        let (connect, drain) = (broker.connector(self.prefetch), self.drain);
        let make_service = move |shutdown| {
            self.clone()
                .stack::<B, _, _>(shutdown, service_fn(handler.clone()))
        };
        let mut consumer = Consumer::reconnecting(connect, make_service)
            .backoff(Duration::from_millis(50)..=Duration::from_millis(500))
            .drain_timeout(drain)
            .with_graceful_shutdown(stop.clone().cancelled_owned());
        if let Some(max) = max_attempts {
            consumer = consumer.max_attempts(max);
        }
        consumer.await
    }
}
