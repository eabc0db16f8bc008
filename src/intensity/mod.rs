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
use crate::{backoff::Delays, telemetry::metrics::Labels};

mod machine;
mod shared;

pub use self::shared::IntensityState;

// === impl IntensityLayer ===

/// Pauses a worker while most of its jobs fail.
///
/// A worker whose database is down fails each job of the backlog in turn and gives it back: it
/// drains the queue into delays and dead letters, at full speed. Behind this layer the service
/// becomes unready instead, and the jobs stay where they are. It is the counterpart of a
/// supervisor's restart intensity, without the dying.
///
/// It belongs *directly inside* the sentinel, where a failure still looks like one. Outside, a job
/// that failed and was answered for is a success.
///
/// # When it pauses
///
/// 1. *Running*: all jobs are let through. Once at least the [`threshold`](Self::threshold) of
///    the last [`window`](Self::window) jobs has failed, of at least
///    [`minimum_sample`](Self::minimum_sample), it pauses.
/// 2. *Paused*: `poll_ready` is pending. Jobs that are on their way go on, and what they come to
///    changes nothing any more.
/// 3. *Probing*: after the [`pause`](Self::pause) one instance becomes ready, for one job. If that
///    succeeds, everything is let through at once and the window is empty; if it fails, the next
///    pause is twice as long.
///
/// The probe belongs to the instance that became ready, and is not cloned with it. It comes back
/// when that instance is dropped, and when its job ends in a way that does not count. While an
/// instance is ready and is not called, nobody else has the probe.
///
/// All services that a layer makes, their clones and the layer's clones share one state: a layer
/// that is made once goes on pausing while a consumer reconnects and makes its service anew.
///
/// # What counts
///
/// What the job's [`Outcome`](crate::Outcome) will be:
///
/// | outcome | counts as |
/// | --- | --- |
/// | `Completed`, also on the way down | success |
/// | `Failed`, also on the way down | failure |
/// | `Panicked` | failure |
/// | `TimedOut` | failure |
/// | `Cancelled`: shutdown, dropped caller, lost lease, on request, runtime gone | neither |
///
/// A future that is dropped outside of a sentinel, or by a middleware between the two, counts as
/// neither too, unless a panic unwinds: put no `timeout` between. A job that blocks its thread is
/// counted when it is really gone; the probe, when it has its outcome.
///
/// # How much an outage wastes
///
/// If every job fails at once, behind a `concurrency_limit(n)` outside the sentinel, these
/// deliveries are spent on it at most:
///
/// - `max(sample, ⌈threshold × window⌉)` jobs until it pauses: the minimum sample after a start,
///   the other after a window full of successes. With the defaults both are 10. (A minimum sample
///   above the window counts as the window.)
/// - `n - 1` jobs that were let through before, since the last one to be counted holds a permit
///   as well;
/// - one job for each pause that ends during the outage: with the defaults 6 in 10 s, and one in
///   each 30 s later on.
///
/// [`most_wasted`](Self::most_wasted) computes it. After the outage the first probe brings the
/// full throughput back, which is one pause later at most. A dependency that comes and goes costs
/// the first two again each time. The window is a number of jobs for this reason: with a span of
/// time the first part would grow with the throughput.
///
/// # Why not a circuit breaker
///
/// The circuit breakers of the ecosystem answer an *error* when they are open, from `call` or from
/// `poll_ready`. As the answer of a call it is the failure of a job: the backlog is taken and given
/// back, faster than before, which is what a breaker is to prevent. As an error of readiness it
/// tells the consumer that the service is dead, and to make a new one. A client wants an answer
/// now, but a queue can wait. So this layer answers nothing, and is not ready.
///
/// # Single bad jobs
///
/// This layer is for a dependency of all jobs. A job that fails every time is for the decision:
/// [`delivery_limit`](crate::DecisionExt::delivery_limit),
/// [`poison_on_panic`](crate::DecisionExt::poison_on_panic), and
/// [`on_error`](crate::DecisionExt::on_error) to reject what can't succeed;
/// [`backoff`](crate::DecisionExt::backoff) keeps it from coming back at once. Where such jobs are
/// expected and are most of the traffic, let the handler answer `Ok` for them, or raise the
/// threshold. The jobs wasted are given back by the same decision, so a delivery limit of 1 would
/// dead-letter them: a job can meet an outage more than once.
///
/// # Beside other middleware
///
/// tower's `ConcurrencyLimit` takes its permit before it asks the inner service, so the instance
/// that waits in a pause holds one. That is in order: it has no job yet, and others would wait too.
/// With several consumers on one limit each that waits holds a permit, the jobs on their way have
/// theirs, and all wait for the same.
///
/// A consumer that asks for readiness before it pulls takes nothing from its stream in a pause. So
/// it must watch the stream in another way meanwhile, or it learns of a lost connection only after
/// the pause: [`Subscription::poll_closed`](crate::consumer::Subscription::poll_closed) is for that. Errors of the
/// inner service's own readiness pass through unchanged, in a pause too.
///
/// # Cost
///
/// While no job of the window has failed, a job reads one atomic three times and clones an `Arc`
/// twice, once for the clone that the sentinel makes. A short lock is taken for each result while
/// there are failures in the window, and for `poll_ready` in a pause.
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
#[must_use = "a layer does nothing until it is applied to a service"]
#[doc(alias = "circuit breaker")]
pub struct IntensityLayer {
    shared: Arc<Shared>,
    pub(crate) labels: Labels,
}

impl IntensityLayer {
    /// Creates a layer with every default.
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

    /// Sets how many of the last jobs are looked back on; 20 by default.
    ///
    /// It is a number and not a time, since only so the jobs wasted are bounded.
    ///
    /// # Panics
    ///
    /// Panics if `jobs` is 0.
    #[track_caller]
    pub fn window(self, jobs: usize) -> Self {
        assert!(jobs > 0, "a window of 0 jobs would never tell anything");
        let limits = Limits {
            window: jobs,
            ..self.shared.limits
        };
        self.with_limits(limits)
    }

    /// Sets which part of the window must have failed for a pause, from 0 to 1; 0.5 by default.
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

    /// Sets how many jobs must have ended before any pause, since the start or since it last
    /// resumed; 10 by default.
    ///
    /// Above the [`window`](Self::window) it is the window.
    pub fn minimum_sample(self, jobs: usize) -> Self {
        let limits = Limits {
            sample: jobs,
            ..self.shared.limits
        };
        self.with_limits(limits)
    }

    /// Sets the pauses: the first is the lower bound, each one is twice the last, and none is
    /// longer than the upper bound; from 100 ms to 30 s by default.
    ///
    /// # Panics
    ///
    /// Panics if the lower bound is zero, which would never grow, or above the upper one.
    #[track_caller]
    pub fn pause(self, pauses: RangeInclusive<Duration>) -> Self {
        let limits = Limits {
            pauses: Delays::new(pauses),
            ..self.shared.limits
        };
        self.with_limits(limits)
    }

    /// Returns how many deliveries an outage can waste, in which every job fails, behind a limit
    /// of `concurrency`; see [How much an outage wastes](Self#how-much-an-outage-wastes).
    ///
    /// ```
    /// use std::time::Duration;
    /// use tower_sentinel::IntensityLayer;
    ///
    /// let layer = IntensityLayer::new();
    /// // 10 to notice, 63 that were on their way, and 6 probes: after 0.1, 0.3, 0.7, … 6.3 s.
    /// assert_eq!(layer.most_wasted(64, Duration::from_secs(10)), 10 + 63 + 6);
    /// ```
    pub fn most_wasted(&self, concurrency: usize, outage: Duration) -> u64 {
        let limits = &self.shared.limits;
        let in_flight = concurrency.saturating_sub(1);
        let before = limits.longest_run().saturating_add(in_flight) as u64;
        before.saturating_add(limits.most_probes(outage))
    }

    /// Returns a receiver of the state, which is that of all services of this layer.
    ///
    /// Each change is an event too: `warn` for a pause, with its counts, and `info` for a probe and
    /// for the end. Each setting makes another layer, so take the receiver after the last of them;
    /// one that was taken before is closed.
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
    /// Sets the labels of the gauge that tells the state; none by default.
    ///
    /// Two layers with the same labels set the same gauge, so each should have its own, such as
    /// `messaging.destination.name`. Clones share one state and one gauge, that of the first
    /// service. See [`describe_metrics`](crate::telemetry::describe_metrics).
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

/// The service of an [`IntensityLayer`]: pending while most jobs fail.
///
/// # Contract
///
/// - *Readiness*: that of the inner service comes first, and its errors pass through unchanged.
///   In a pause `poll_ready` is pending, and wakes its task at the end of the pause and when the
///   state changes. An instance that is ready and is asked again in a pause may be pending again;
///   if it is called instead, its job is let through.
/// - *Calls* go to the inner service as they are.
/// - *Cancellation*: to drop an instance or a future is safe at any point, and gives a probe back.
/// - *Panics* of the inner service unwind through, in `call` and in the future, and are counted.
///
/// # Panics
///
/// `poll_ready` panics in a pause, outside of a tokio runtime with timers. It may be asked in another
/// runtime than before, also as that one has ended.
pub struct Intensity<S> {
    service: S,
    shared: Arc<Shared>,
    // Made when this clone first waits.
    wait: Option<Wait>,
    // Held while this clone is ready for the one job of the probe.
    probe: Option<Probe>,
}

impl<S> Intensity<S> {
    /// Returns the inner service.
    pub fn get_ref(&self) -> &S {
        &self.service
    }

    /// Returns the inner service.
    pub fn get_mut(&mut self) -> &mut S {
        &mut self.service
    }

    /// Returns the inner service.
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
            self.probe = ready!(wait.poll(&self.shared, cx));
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
    /// The future of an [`Intensity`]: resolves as the inner one does.
    ///
    /// # Cancel safety
    ///
    /// As the inner future. Whether a drop counts as a failure is told by the job; see
    /// [What counts](IntensityLayer#what-counts).
    #[must_use = "futures do nothing unless they are polled"]
    pub struct IntensityFuture<F> {
        #[pin]
        future: F,
        // After the future, so that a probe is over when its job is really gone.
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
