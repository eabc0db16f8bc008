//! [`Worker`]: the consumer of a scenario, with the whole stack around its handler.

use std::{
    collections::BTreeMap,
    fmt,
    future::{Future, IntoFuture},
    pin::{Pin, pin},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use futures_util::future::{Either, select};
use tokio_util::sync::CancellationToken;
use tower::{ServiceBuilder, limit::ConcurrencyLimitLayer};
use tower_service::Service;

use crate::{
    conformance::{
        fixture::{Fixture, JobOf, TagOf},
        run::{Run, Step},
    },
    consumer::{Consumer, ConsumerError, Subscription, Summary},
    outcome::OutcomeKind,
    sentinel::{SentinelError, SentinelLayer},
    settle::{Settle, SettleError, SettlePolicy, Settled, Verdict, decision::Decision},
};

/// Time that running jobs have to finish once a drain begins.
const DRAIN: Duration = Duration::from_millis(200);

/// Time limit for jobs that hang; less than a [`Fixture::lease`].
const LIMIT: Duration = Duration::from_secs(1);

/// Error of a job whose dependency is down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refused;

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the dependency refused")
    }
}

/// Error of a worker's stack, where `E` is that of its jobs.
type StackError<F, E> = SentinelError<E, SettleError<<TagOf<F> as Settle>::Error>>;

/// End of a worker.
pub(super) type Ended<F, E> = Result<
    Summary,
    ConsumerError<<<F as Fixture>::Subscription as Subscription>::Error, StackError<F, E>>,
>;

/// Consumer of a scenario.
pub(super) struct Worker<D> {
    prefetch: usize,
    decision: D,
    limit: Duration,
    settled: Arc<Mutex<Vec<(OutcomeKind, Verdict)>>>,
}

impl<D> Worker<D> {
    pub(super) fn new(prefetch: usize, decision: D) -> Self {
        Self {
            prefetch,
            decision,
            limit: LIMIT,
            settled: Arc::default(),
        }
    }

    /// Sets the time limit of the jobs.
    pub(super) fn limit(self, limit: Duration) -> Self {
        Self { limit, ..self }
    }

    /// Returns the outcomes and verdicts of the jobs that are settled.
    pub(super) fn settled(&self) -> Vec<(OutcomeKind, Verdict)> {
        lock(&self.settled).clone()
    }

    /// Works on `jobs` with `handler` until `driving` resolves, and drains then.
    ///
    /// Returns early if the consumer ends by itself.
    pub(super) async fn work<F, H, E>(
        &self,
        jobs: F::Subscription,
        handler: H,
        driving: impl Future<Output = Step<F>>,
    ) -> Step<F, Ended<F, E>>
    where
        F: Fixture,
        D: Decision<TagOf<F>, (), E> + Clone + Send + 'static,
        H: Service<JobOf<F>, Response = (), Error = E, Future: Send> + Clone + Send + 'static,
        E: fmt::Display + Send + 'static,
    {
        let (shutdown, stop) = (CancellationToken::new(), CancellationToken::new());
        let sentinel = SentinelLayer::new(SettlePolicy::new(self.decision.clone()))
            .timeout(self.limit)
            .shutdown(shutdown.clone());
        let service = ServiceBuilder::new()
            .layer(ConcurrencyLimitLayer::new(self.prefetch))
            .layer(sentinel)
            .service(handler);
        let service = Recording {
            service,
            settled: Arc::clone(&self.settled),
        };
        let consumer = Consumer::new(jobs, service)
            .shutdown(shutdown)
            .drain_timeout(DRAIN)
            .with_graceful_shutdown(stop.clone().cancelled_owned())
            .into_future();
        match select(pin!(driving), consumer).await {
            Either::Left((driven, consumer)) => {
                stop.cancel();
                let ended = consumer.await;
                driven.map(|()| ended)
            }
            Either::Right((ended, _)) => Ok(ended),
        }
    }
}

impl<F: Fixture> Run<'_, F> {
    /// Works as [`Worker::work`] does, and expects the end that was requested.
    pub(super) async fn work<D, H, E>(
        &self,
        worker: &Worker<D>,
        jobs: F::Subscription,
        handler: H,
        driving: impl Future<Output = Step<F>>,
    ) -> Step<F, Summary>
    where
        D: Decision<TagOf<F>, (), E> + Clone + Send + 'static,
        H: Service<JobOf<F>, Response = (), Error = E, Future: Send> + Clone + Send + 'static,
        E: fmt::Display + Send + 'static,
    {
        match worker.work::<F, _, _>(jobs, handler, driving).await? {
            Ok(summary) => Ok(summary),
            Err(error) => self.violated(
                "a consumer that works until it is asked to end",
                format_args!("the error \"{error}\""),
            ),
        }
    }
}

/// Number of runs of each job.
#[derive(Clone, Default)]
pub(super) struct Runs(Arc<Mutex<BTreeMap<String, u32>>>);

impl Runs {
    /// Counts a run of this job, and returns its number.
    pub(super) fn begin(&self, body: &str) -> u32 {
        let mut runs = lock(&self.0);
        let run = runs.entry(body.to_owned()).or_default();
        *run += 1;
        *run
    }

    pub(super) fn of_each(&self) -> BTreeMap<String, u32> {
        lock(&self.0).clone()
    }

    pub(super) fn total(&self) -> u32 {
        lock(&self.0).values().sum()
    }
}

/// Service made of a closure.
#[derive(Clone)]
pub(super) struct Handler<H>(pub(super) H);

impl<H, J, E, Fut> Service<J> for Handler<H>
where
    H: FnMut(J) -> Fut,
    Fut: Future<Output = Result<(), E>>,
{
    type Response = ();
    type Error = E;
    type Future = Fut;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), E>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, job: J) -> Fut {
        (self.0)(job)
    }
}

/// Service that writes down how each job was settled.
struct Recording<S> {
    service: S,
    settled: Arc<Mutex<Vec<(OutcomeKind, Verdict)>>>,
}

impl<S, J> Service<J> for Recording<S>
where
    S: Service<J, Response = Settled>,
    S::Future: Send + 'static,
{
    type Response = Settled;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Settled, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.service.poll_ready(cx)
    }

    fn call(&mut self, job: J) -> Self::Future {
        let (response, all) = (self.service.call(job), Arc::clone(&self.settled));
        Box::pin(async move {
            let settled = response.await?;
            lock(&all).push((settled.kind, settled.verdict));
            Ok(settled)
        })
    }
}

/// Locks a mutex whose content is whole after each statement, so that a panic cannot spoil it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
