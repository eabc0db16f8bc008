//! Middleware that pauses a worker while most of its jobs fail.
//!
//! See [`IntensityLayer`].

use std::{
    fmt,
    future::Future,
    ops::RangeInclusive,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use pin_project_lite::pin_project;
use tokio::sync::watch;
use tower_layer::Layer;
use tower_service::Service;

use self::{
    machine::Limits,
    shared::{Probe, Shared, Trial, Wait},
};
use crate::{
    backoff::Delays,
    telemetry::metrics::Labels,
    unready::{self, Cause},
};

mod machine;
#[cfg(test)]
mod races;
mod shared;

pub use self::shared::IntensityState;

// === impl IntensityLayer ===

/// Layer that pauses a worker while most of its jobs fail.
///
/// A worker whose database is down fails each job of the backlog and retries it. At full speed it moves the
/// queue into delays and dead letters. Behind this layer the service becomes unready instead, and the jobs
/// stay in the queue. It is like the restart intensity of a supervisor, but the worker pauses and does not
/// end.
///
/// It belongs *directly inside* the sentinel, where a failure is still an error. Outside, a job that failed
/// and was settled is a success.
///
/// # States
///
/// 1. *Running*: all jobs are let through. The layer pauses once the failed part of the last
///    [`window`](Self::window) jobs reaches the [`threshold`](Self::threshold), if at least
///    [`minimum_sample`](Self::minimum_sample) jobs have ended.
/// 2. *Paused*: `poll_ready` is pending. Running jobs go on, and their outcomes change nothing any more.
/// 3. *Probing*: after the [`pause`](Self::pause) one instance becomes ready, for one job, the probe. If the
///    job succeeds, all jobs are let through at once and the window is empty. If it fails, the next pause is
///    twice as long.
///
/// The probe belongs to the instance that became ready, and is not cloned with it. Another instance can get
/// it when that instance is dropped, or when its job ends in a way that does not count. As long as the
/// instance is ready and is not called, no other instance gets the probe.
///
/// All services of a layer, their clones and the clones of the layer share one state. So a layer that is
/// made once stays paused while a consumer reconnects and makes its service anew.
///
/// # What counts
///
/// Each job counts by its later [`Outcome`](crate::Outcome):
///
/// | outcome | counts as |
/// | --- | --- |
/// | `Completed`, also after a request to stop | success |
/// | `Failed`, also after a request to stop | failure |
/// | `Panicked` | failure |
/// | `TimedOut` | failure |
/// | `Cancelled`: shutdown, dropped caller, lost lease, on request, runtime gone | neither |
///
/// A future that is dropped outside of a sentinel, or by a middleware between the sentinel and this layer,
/// also counts as neither, unless a panic unwinds. So put no `timeout` between the two. A job that blocks its
/// thread is counted when it has really stopped; the probe is counted when it has its outcome.
///
/// # How much an outage wastes
///
/// Suppose that every job fails at once, behind a `concurrency_limit(n)` outside the sentinel. Then the
/// outage wastes at most these deliveries:
///
/// - `max(sample, ⌈threshold × window⌉)` jobs until the pause: the minimum sample after a start, the other
///   term after a window full of successes. With the defaults both are 10. (A minimum sample above the
///   window counts as the window.)
/// - `n - 1` jobs that were let through before the pause; not `n`, since the last job to be counted held a
///   permit as well.
/// - One job for each pause that ends during the outage: with the defaults 6 in the first 10 s, and later
///   one every 30 s.
///
/// [`most_wasted`](Self::most_wasted) computes the sum. After the outage the first probe restores the full
/// throughput, at most one pause later. A dependency that fails repeatedly costs the first two terms each
/// time. The window is a number of jobs, since with a span of time the first term would grow with the
/// throughput.
///
/// # Why not a circuit breaker
///
/// The circuit breakers of the ecosystem return an *error* while they are open, from `call` or from
/// `poll_ready`. An error of `call` is the failure of a job: the backlog is taken and retried, faster than
/// before, and a breaker should prevent exactly that. An error of `poll_ready` means that the service is
/// dead, so the consumer makes a new one. A client needs a response now, but a queue can wait. So this layer
/// returns no error, and is not ready.
///
/// # Single bad jobs
///
/// This layer is for a dependency of all jobs. A job that fails every time is a matter of the decision.
/// [`delivery_limit`](crate::DecisionExt::delivery_limit),
/// [`poison_on_panic`](crate::DecisionExt::poison_on_panic) and [`on_error`](crate::DecisionExt::on_error)
/// reject jobs that can't succeed; [`backoff`](crate::DecisionExt::backoff) delays their next delivery. If
/// such jobs are expected and are most of the traffic, let the handler return `Ok` for them, or raise the
/// threshold. The same decision settles the wasted jobs, so a delivery limit of 1 would dead-letter them.
/// Note that a job can meet an outage more than once.
///
/// # Beside other middleware
///
/// tower's `ConcurrencyLimit` takes its permit before it polls the inner service, so the instance that waits
/// in a pause holds a permit. That is fine: it has no job yet, and the others would wait too. With several
/// consumers on one limit, each waiting instance holds a permit, each running job holds one, and all wait
/// for the same probe.
///
/// A consumer that polls readiness before it pulls takes nothing from its stream in a pause. It must watch
/// the stream in another way then, or it notices a lost connection only after the pause. Use
/// [`Subscription::poll_closed`](crate::consumer::Subscription::poll_closed) for that. Readiness errors of
/// the inner service pass through unchanged, also in a pause.
///
/// # Cost
///
/// While no job of the window has failed, a job reads one atomic three times and clones an `Arc` twice, one
/// of them for the clone that the sentinel makes. A short lock is taken for each result while there are
/// failures in the window, and for `poll_ready` in a pause.
///
/// # Examples
///
/// ```
/// use std::{convert::Infallible, sync::Arc, time::Duration};
/// use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
/// use tokio::time::{Instant, sleep};
/// use tower_sentinel::{IntensityLayer, Report, SentinelLayer, intensity::IntensityState};
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() {
/// let start = Instant::now();
/// // The database is down for the first 10 seconds.
/// let process = move |_id: Arc<u64>| async move {
///     match start.elapsed() < Duration::from_secs(10) {
///         true => Err("no connection"),
///         false => Ok(()),
///     }
/// };
/// let policy = service_fn(|report: Report<Arc<u64>, (), &'static str>| async move {
///     Ok::<_, Infallible>(report.outcome.is_completed())
/// });
/// let intensity = IntensityLayer::new();
/// let state = intensity.watch();
/// let mut handler = ServiceBuilder::new()
///     .concurrency_limit(64)
///     .layer(SentinelLayer::new(policy))
///     .layer(intensity) // directly inside
///     .service_fn(process);
///
/// let mut wasted = 0;
/// while !handler.ready().await.unwrap().call(Arc::new(7)).await.unwrap() {
///     wasted += 1;
/// }
/// assert_eq!(wasted, 10 + 6);
/// assert_eq!(*state.borrow(), IntensityState::Running);
/// # }
/// ```
///
/// A layer that waits for more failures, and for longer:
///
/// ```
/// use std::time::Duration;
/// use tower_sentinel::IntensityLayer;
///
/// let layer = IntensityLayer::new()
///     .window(200)
///     .threshold(0.25)
///     .minimum_sample(20)
///     .pause(Duration::from_secs(5)..=Duration::from_secs(120));
/// // 50 of 200, and 7 that ran beside them; then one for each pause: 5 s, 10 s, 20 s.
/// assert_eq!(layer.most_wasted(8, Duration::ZERO), 50 + 7);
/// assert_eq!(layer.most_wasted(8, Duration::from_secs(40)), 50 + 7 + 3);
/// ```
#[must_use = "a layer does nothing until it is applied to a service"]
#[doc(alias = "circuit breaker")]
pub struct IntensityLayer {
    shared: Arc<Shared>,
    pub(crate) labels: Labels,
}

impl IntensityLayer {
    /// Creates a layer with the default settings.
    pub fn new() -> Self {
        let limits = Limits {
            window: 20,
            threshold: 0.5,
            sample: 10,
            pauses: Delays::new(Duration::from_millis(100)..=Duration::from_secs(30)),
        };
        Self {
            shared: Arc::new(Shared::new(limits)),
            labels: Labels::default(),
        }
    }

    fn with_limits(self, limits: Limits) -> Self {
        Self {
            shared: Arc::new(Shared::new(limits)),
            labels: self.labels,
        }
    }

    /// Sets the number of last jobs in the window; 20 by default.
    ///
    /// It is a number and not a time, since only a number bounds the wasted jobs.
    ///
    /// # Panics
    ///
    /// Panics if `jobs` is 0.
    #[track_caller]
    pub fn window(self, jobs: usize) -> Self {
        assert!(jobs > 0, "a window of 0 jobs would never pause");
        let limits = Limits {
            window: jobs,
            ..self.shared.limits
        };
        self.with_limits(limits)
    }

    /// Sets the failed part of the window, from 0 to 1, that causes a pause; 0.5 by default.
    ///
    /// # Panics
    ///
    /// Panics if `ratio` is not above 0 and at most 1.
    #[track_caller]
    pub fn threshold(self, ratio: f64) -> Self {
        assert!(
            ratio > 0.0 && ratio <= 1.0,
            "a threshold of {ratio} is not above 0 and at most 1"
        );
        let limits = Limits {
            threshold: ratio,
            ..self.shared.limits
        };
        self.with_limits(limits)
    }

    /// Sets the number of jobs that must have ended before any pause; 10 by default.
    ///
    /// They count from the start, or from the last time that the layer resumed. A number above the
    /// [`window`](Self::window) counts as the window.
    pub fn minimum_sample(self, jobs: usize) -> Self {
        let limits = Limits {
            sample: jobs,
            ..self.shared.limits
        };
        self.with_limits(limits)
    }

    /// Sets the pauses; from 100 ms to 30 s by default.
    ///
    /// The first pause is the lower bound, each further one is twice as long, and none is longer than the
    /// upper bound.
    ///
    /// # Panics
    ///
    /// Panics if the lower bound is zero, since a pause of zero never grows, or above the upper bound.
    #[track_caller]
    pub fn pause(self, pauses: RangeInclusive<Duration>) -> Self {
        let limits = Limits {
            pauses: Delays::new(pauses),
            ..self.shared.limits
        };
        self.with_limits(limits)
    }

    /// Returns the largest number of deliveries that an outage can waste.
    ///
    /// It is for an outage in which every job fails, behind a limit of `concurrency`; see
    /// [How much an outage wastes](Self#how-much-an-outage-wastes).
    ///
    /// ```
    /// use std::time::Duration;
    /// use tower_sentinel::IntensityLayer;
    ///
    /// let layer = IntensityLayer::new();
    /// // 10 until the pause, 63 that were running, and 6 probes: after 0.1, 0.3, 0.7, … 6.3 s.
    /// assert_eq!(layer.most_wasted(64, Duration::from_secs(10)), 10 + 63 + 6);
    /// ```
    pub fn most_wasted(&self, concurrency: usize, outage: Duration) -> u64 {
        let limits = &self.shared.limits;
        let in_flight = concurrency.saturating_sub(1);
        let before = limits.longest_run().saturating_add(in_flight) as u64;
        before.saturating_add(limits.most_probes(outage))
    }

    /// Returns a receiver of the state that all services of this layer share.
    ///
    /// Each change is an event too: `warn` for a pause, with its counts, and `info` for a probe and for the
    /// end. Each setting makes a new layer, so call this after the last setting; an earlier receiver is
    /// closed.
    ///
    /// ```
    /// use tower_layer::Layer;
    /// use tower_sentinel::{IntensityLayer, intensity::IntensityState};
    ///
    /// # let service = ();
    /// let layer = IntensityLayer::new().window(50);
    /// let state = layer.watch();
    /// let service = layer.layer(service);
    /// assert_eq!(*state.borrow(), IntensityState::Running);
    /// # drop(service);
    /// ```
    pub fn watch(&self) -> watch::Receiver<IntensityState> {
        self.shared.watch()
    }
}

impl Default for IntensityLayer {
    fn default() -> Self {
        Self::new()
    }
}

impl Clone for IntensityLayer {
    fn clone(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
            labels: self.labels.clone(),
        }
    }
}

impl fmt::Debug for IntensityLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IntensityLayer")
            .field("limits", &self.shared.limits)
            .field("state", &self.shared.state())
            .finish()
    }
}

#[cfg(feature = "metrics")]
impl IntensityLayer {
    /// Sets the labels of the gauge of the state; none by default.
    ///
    /// Two layers with the same labels set the same gauge, so each layer should have its own labels, such as
    /// `messaging.destination.name`. Clones share one state and one gauge, which is made for the first
    /// service. See [`describe_metrics`](crate::telemetry::describe_metrics).
    ///
    /// ```
    /// use tower_sentinel::IntensityLayer;
    ///
    /// let labels = [("messaging.destination.name", "orders")];
    /// let intensity = IntensityLayer::new().metric_labels(labels);
    /// # drop(intensity);
    /// ```
    pub fn metric_labels<K, V>(mut self, labels: impl IntoIterator<Item = (K, V)>) -> Self
    where
        K: Into<::metrics::SharedString>,
        V: Into<::metrics::SharedString>,
    {
        self.labels = crate::telemetry::metrics::labels(labels);
        self
    }
}

impl<S> Layer<S> for IntensityLayer {
    type Service = Intensity<S>;

    fn layer(&self, service: S) -> Intensity<S> {
        self.shared.instruments.begin(&self.labels);
        Intensity {
            service,
            shared: Arc::clone(&self.shared),
            wait: None,
            probe: None,
        }
    }
}

// === impl Intensity ===

/// Service of an [`IntensityLayer`], not ready while most jobs fail.
///
/// # Contract
///
/// - *Readiness*: the inner service is polled first, and its errors pass through unchanged. In a pause
///   `poll_ready` is pending, and wakes its task at the end of the pause and when the state changes. An
///   instance that is ready and is polled again in a pause may be pending again; if it is called instead, its
///   job is let through.
/// - *Calls* go to the inner service unchanged.
/// - *Cancellation*: dropping an instance or a future is safe at any point, and gives a probe back.
/// - *Panics* of the inner service unwind through `call` and the future, and are counted.
///
/// # Panics
///
/// In a pause, `poll_ready` panics outside of a tokio runtime with timers. Each poll may happen in another
/// runtime, also after the former one has ended.
pub struct Intensity<S> {
    service: S,
    shared: Arc<Shared>,
    // Created when this clone first waits.
    wait: Option<Wait>,
    // Held while this clone is ready for the one job of the probe.
    probe: Option<Probe>,
}

impl<S> Intensity<S> {
    /// Returns the inner service.
    pub fn get_ref(&self) -> &S {
        &self.service
    }

    /// Returns the inner service, mutably.
    pub fn get_mut(&mut self) -> &mut S {
        &mut self.service
    }

    /// Returns the inner service, without the pauses.
    pub fn into_inner(self) -> S {
        self.service
    }
}

impl<S, J> Service<J> for Intensity<S>
where
    S: Service<J>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = IntensityFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        if let Err(error) = ready!(self.service.poll_ready(cx)) {
            self.probe = None;
            return Poll::Ready(Err(error));
        }
        if self.probe.is_none() && !self.shared.is_running() {
            let wait = self.wait.get_or_insert_with(Wait::default);
            let Poll::Ready(probe) = wait.poll(&self.shared, cx) else {
                unready::note(Cause::Intensity);
                return Poll::Pending;
            };
            self.probe = probe;
        }
        self.wait = None;
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, job: J) -> Self::Future {
        let mut trial = Trial::begin(&self.shared, self.probe.take());
        let future = trial.run(|| self.service.call(job));
        IntensityFuture { future, trial }
    }
}

impl<S: Clone> Clone for Intensity<S> {
    fn clone(&self) -> Self {
        Self {
            service: self.service.clone(),
            shared: Arc::clone(&self.shared),
            wait: None,
            probe: None,
        }
    }
}

impl<S: fmt::Debug> fmt::Debug for Intensity<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Intensity")
            .field("service", &self.service)
            .field("state", &self.shared.state())
            .field("has_probe", &self.probe.is_some())
            .finish_non_exhaustive()
    }
}

// === impl IntensityFuture ===

pin_project! {
    /// The future of an [`Intensity`], with the output of the inner future.
    ///
    /// # Cancel safety
    ///
    /// As the inner future. A drop may count as a failure, depending on the job; see
    /// [What counts](IntensityLayer#what-counts).
    #[must_use = "futures do nothing unless they are polled"]
    pub struct IntensityFuture<F> {
        #[pin]
        future: F,
        // After the future, so that a probe ends when its job has really stopped.
        trial: Trial,
    }
}

impl<F, T, E> Future for IntensityFuture<F>
where
    F: Future<Output = Result<T, E>>,
{
    type Output = Result<T, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<T, E>> {
        let this = self.project();
        let result = ready!(this.trial.run(|| this.future.poll(cx)));
        this.trial.end(result.is_err());
        Poll::Ready(result)
    }
}

impl<F> fmt::Debug for IntensityFuture<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IntensityFuture").finish_non_exhaustive()
    }
}
