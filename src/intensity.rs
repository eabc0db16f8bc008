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
use crate::backoff::Delays;

mod machine;
mod shared;

pub use self::shared::IntensityState;

// === impl IntensityLayer ===

/// Pauses a worker while most of its jobs fail.
#[must_use = "a layer does nothing until it is applied to a service"]
pub struct IntensityLayer {
    shared: Arc<Shared>,
}

impl IntensityLayer {
    /// Creates a layer with every default.
    pub fn new() -> Self {
        Self::from_limits(Limits {
            window: 20,
            threshold: 0.5,
            sample: 10,
            pauses: Delays::new(Duration::from_millis(100)..=Duration::from_secs(30)),
        })
    }

    fn from_limits(limits: Limits) -> Self {
        Self {
            shared: Arc::new(Shared::new(limits)),
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
        Self::from_limits(Limits {
            window: jobs,
            ..self.shared.limits
        })
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
        Self::from_limits(Limits {
            threshold: ratio,
            ..self.shared.limits
        })
    }

    /// Sets how many jobs must have ended before any pause, since the start or since it last
    /// resumed; 10 by default.
    ///
    /// Above the [`window`](Self::window) it is the window.
    pub fn minimum_sample(self, jobs: usize) -> Self {
        Self::from_limits(Limits {
            sample: jobs,
            ..self.shared.limits
        })
    }

    /// Sets the pauses: the first is the lower bound, each one is twice the last, and none is
    /// longer than the upper bound; from 100 ms to 30 s by default.
    ///
    /// # Panics
    ///
    /// Panics if the lower bound is zero, which would never grow, or above the upper one.
    #[track_caller]
    pub fn pause(self, pauses: RangeInclusive<Duration>) -> Self {
        Self::from_limits(Limits {
            pauses: Delays::new(pauses),
            ..self.shared.limits
        })
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

impl<S> Layer<S> for IntensityLayer {
    type Service = Intensity<S>;

    fn layer(&self, service: S) -> Intensity<S> {
        Intensity {
            service,
            shared: Arc::clone(&self.shared),
            wait: None,
            probe: None,
        }
    }
}

// === impl Intensity ===

/// The service of an [`IntensityLayer`].
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
