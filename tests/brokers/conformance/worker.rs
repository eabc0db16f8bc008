//! The worker of the scenarios: a [`Consumer`] with the whole stack.

use std::{
    collections::BTreeMap,
    fmt,
    future::Future,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio_util::sync::CancellationToken;
use tower::{Service, ServiceBuilder, service_fn};
use tower_sentinel::{
    Consumer, SentinelError, SentinelLayer, SettlePolicy,
    conformance::Fixture,
    consumer::{ConsumerError, Subscription, Summary},
    settle::{Settle, SettleError, Settled, decision::Decision},
};

use super::{JobOf, TagOf, TestBroker};

/// A short [`Setup::drain`].
const DRAIN: Duration = Duration::from_millis(200);

/// A time limit for jobs that hang; less than a [`Fixture::lease`].
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
pub(super) type StackError<B, E> = SentinelError<E, SettleError<<TagOf<B> as Settle>::Error>>;

/// End of a worker; `E` is the error of the jobs.
pub(super) type Ended<B, E> = Result<
    Summary,
    ConsumerError<
        <<B as Fixture>::Subscription as Subscription>::Error,
        StackError<B, E>,
        <B as Fixture>::Error,
    >,
>;

/// Number of times that each job was begun.
#[derive(Clone, Default)]
pub(super) struct Runs(Arc<Mutex<BTreeMap<String, u32>>>);

impl Runs {
    pub(super) fn begin(&self, body: &str) {
        *self.0.lock().unwrap().entry(body.to_owned()).or_default() += 1;
    }

    pub(super) fn of_each(&self) -> BTreeMap<String, u32> {
        self.0.lock().unwrap().clone()
    }

    pub(super) fn total(&self) -> u32 {
        self.0.lock().unwrap().values().sum()
    }
}

/// Settings of a worker.
#[derive(Clone)]
pub(super) struct Setup<D> {
    pub(super) prefetch: usize,
    pub(super) decision: D,
    pub(super) limit: Duration,
    /// Time that running jobs have to finish once a session ends.
    pub(super) drain: Duration,
}

impl<D> Setup<D> {
    pub(super) fn new(prefetch: usize, decision: D) -> Self {
        Self {
            prefetch,
            decision,
            limit: LIMIT,
            drain: DRAIN,
        }
    }

    /// Returns the stack around `handler`, outermost the limit of the prefetch.
    fn stack<B, H, E>(
        self,
        shutdown: CancellationToken,
        handler: H,
    ) -> impl Service<
        JobOf<B>,
        Response = Settled,
        Error = StackError<B, E>,
        Future = impl Future<Output = Result<Settled, StackError<B, E>>> + Send + 'static,
    > + Send
    + 'static
    where
        B: TestBroker,
        D: Decision<TagOf<B>, (), E> + Clone + Send + 'static,
        H: Service<JobOf<B>, Response = (), Error = E, Future: Send> + Clone + Send + 'static,
        E: fmt::Display + Send + 'static,
    {
        ServiceBuilder::new()
            .concurrency_limit(self.prefetch)
            .layer(
                SentinelLayer::new(SettlePolicy::new(self.decision))
                    .timeout(self.limit)
                    .shutdown(shutdown),
            )
            .service(handler)
    }

    /// Works until `stop`, and connects anew whenever a session ends.
    ///
    /// It gives up after `max_attempts`, if there is such a number.
    pub(super) async fn work_on<B, H, F, E>(
        self,
        broker: &B,
        max_attempts: Option<u32>,
        stop: &CancellationToken,
        handler: H,
    ) -> Ended<B, E>
    where
        B: TestBroker + 'static,
        D: Decision<TagOf<B>, (), E> + Clone + Send + 'static,
        H: Fn(JobOf<B>) -> F + Clone + Send + 'static,
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
