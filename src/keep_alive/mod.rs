//! Middleware that keeps a delivery alive at its broker while its job runs.
//!
//! See [`KeepAliveLayer`].

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use pin_project_lite::pin_project;
use tokio::{runtime::Handle, time::sleep};
use tower_layer::Layer;
use tower_service::Service;

use crate::{
    cancel::{Cancellation, Companion},
    job::Job,
    keep_alive::ticker::{Rhythm, Stopping, Ticker},
    outcome::guard,
    settle::Settle,
};

mod ticker;

// === impl KeepAliveLayer ===

/// Asks the broker for more time, again and again, while a job runs.
///
/// A broker with an ack wait (JetStream), a visibility timeout (SQS) or a claim by idle time (Redis
/// streams) gives a job to somebody else when it has had no sign of life for that long. This layer
/// sends one every [`interval`](Self::new), by [`Settle::keep_alive`], from a task of its own: a
/// job need not be polled to be kept alive.
///
/// It belongs *directly inside* a [`SentinelLayer`](crate::SentinelLayer), around everything else.
///
/// # Which interval
///
/// A third of the broker's ack wait. A keep-alive that fails is tried again after an eighth of the
/// interval, then a quarter, then every half; so there are at least three tries before the ack wait
/// is over, and six if the broker answers at once that it can't.
///
/// The interval counts from `call`, the ack wait from the delivery: where jobs wait in between, as
/// in a `buffer` or a client's own queue, that time is to be taken off. A job that is done within
/// the first interval costs a task and no request.
///
/// # Contract
///
/// - *Readiness* is the inner service's.
/// - *End*: the ticker is stopped before the policy is called, whatever became of the job, and also
///   if the job [was not](crate::outcome::TimedOut::stopped) stopped. It stops when the inner future returns
///   or is dropped, if that is sooner. A keep-alive that is in flight then is dropped, and is not
///   polled again: what it has not sent yet it never sends. What it *has* sent, or left in the
///   client's queue, may reach the broker at any time; on the same connection, before the
///   settlement.
/// - *Waiting for that*: if a keep-alive is being polled on another thread at this moment, the stop
///   waits for that one poll. An implementation of `keep_alive` that blocks its thread blocks its
///   job's settlement.
/// - *A lost lease*: if the broker answers [`Lease::Lost`](crate::settle::Lease::Lost) the job is cancelled
///   with [`CancelReason::LeaseLost`](crate::outcome::CancelReason::LeaseLost), to which
///   [`ack_on_success`](crate::ack_on_success) says [`Abandon`](crate::Verdict::Abandon). A job that
///   completes within its grace is acked; the broker says what it makes of that.
/// - *The default time limit* of the sentinel is the whole [30 s](crate::SentinelLayer::timeout) for a job
///   that is kept alive, however short its [lease](crate::Job::lease).
/// - *A failed keep-alive* costs the job nothing: nobody knows whether the lease is lost. It is an
///   event, and is tried again for as long as the job runs, never more often than said above. An
///   error and a [timeout](Self::try_timeout) are a `warn!`, a panic is an `error!`.
/// - *A runtime that ends*, or has no timers, ends its tickers: each is an `error!`, and its job runs
///   on without.
/// - *A broker without keep-alive* ([`Capabilities::has_keep_alive`]): there is no ticker, and the
///   job runs as it would without this layer. That is one `warn!` for a layer and all that was made
///   of it, since a worker is set up for the broker that it has.
/// - *Outside of a sentinel* (in no job, such as in a task that a job spawned) the ticker lives as
///   long as the inner future, and a lost lease ends the ticker only: there is nobody to stop the
///   inner future.
/// - *The tag* is taken once more from the job, before the inner `call`; a panic in
///   [`Job::tag`] is a panic of the job.
///
/// [`Capabilities::has_keep_alive`]: crate::settle::Capabilities::has_keep_alive
///
/// # Jobs that block
///
/// The ticker runs on the runtime of the job. If that is a current-thread one, a job that blocks is
/// not kept alive. On a multi-thread one it often is, and it is not to be relied upon: what a
/// worker has spawned last can't be taken over by others, and the worker that blocks may be the one
/// that drives the timers. A [`runtime`](Self::runtime) that no job runs on keeps time for sure:
/// give the layer the consumer's, and the jobs one of their own by
/// [`SentinelLayer::runtime`](crate::SentinelLayer::runtime).
///
/// # Examples
///
/// ```
/// use std::{convert::Infallible, future::{Ready, ready}, time::Duration};
/// use std::sync::{Arc, atomic::{AtomicU32, Ordering}};
/// use tower::{Service, ServiceBuilder, ServiceExt};
/// use tower_sentinel::{
///     Job, KeepAliveLayer, SentinelLayer, SettlePolicy, Verdict, ack_on_success,
///     settle::{Capabilities, Lease, Reason, Settle, Unsettled},
/// };
///
/// /// What a broker's client hands out with a delivery.
/// #[derive(Clone, Debug, Default)]
/// struct Acker { kept_alive: Arc<AtomicU32> }
///
/// impl Settle for Acker {
///     type Error = Infallible;
///     type Future = Ready<Result<(), Unsettled<Self, Infallible>>>;
///
///     fn settle(self, _: Verdict, _: Reason) -> Self::Future { ready(Ok(())) }
///     async fn keep_alive(&self) -> Result<Lease, Infallible> {
///         // The third time, the broker has given the job to somebody else.
///         match self.kept_alive.fetch_add(1, Ordering::Relaxed) {
///             0..2 => Ok(Lease::Held),
///             _ => Ok(Lease::Lost),
///         }
///     }
///     fn deliveries(&self) -> Option<u32> { None }
///     fn capabilities(&self) -> Capabilities { Capabilities::none().keep_alive() }
/// }
///
/// struct Delivery { acker: Acker, takes: Duration }
///
/// impl Job for Delivery {
///     type Tag = Acker;
///     fn tag(&self) -> Acker { self.acker.clone() }
/// }
///
/// async fn process(delivery: Delivery) -> Result<(), Infallible> {
///     tokio::time::sleep(delivery.takes).await;
///     Ok(())
/// }
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() {
/// let ack_wait = Duration::from_secs(30);
/// let mut handler = ServiceBuilder::new()
///     .layer(SentinelLayer::new(SettlePolicy::new(ack_on_success())).no_timeout())
///     .layer(KeepAliveLayer::new(ack_wait / 3))
///     .service_fn(process);
///
/// for (takes, kept_alive, verdict) in [(25, 2, Verdict::Ack), (60, 3, Verdict::Abandon)] {
///     let acker = Acker::default();
///     let job = Delivery { acker: acker.clone(), takes: Duration::from_secs(takes) };
///     let settled = handler.ready().await.unwrap().call(job).await.unwrap();
///     assert_eq!(acker.kept_alive.load(Ordering::Relaxed), kept_alive);
///     assert_eq!(settled.verdict, verdict);
/// }
/// # }
/// ```
#[derive(Clone, Debug)]
#[must_use = "a layer does nothing until it is applied to a service"]
#[doc(alias = "visibility timeout")]
#[doc(alias = "heartbeat")]
#[doc(alias = "lease")]
pub struct KeepAliveLayer {
    settings: Settings,
}

#[derive(Clone, Debug)]
struct Settings {
    rhythm: Rhythm,
    runtime: Option<Handle>,
    /// Whether it was said that the broker has no keep-alive; shared by all clones.
    told: Arc<AtomicBool>,
}

impl KeepAliveLayer {
    /// Creates a layer that keeps each job alive every `interval`, which is a third of the broker's
    /// ack wait.
    ///
    /// An interval too long for the clock, such as `Duration::MAX`, is none: there is no keep-alive.
    ///
    /// # Panics
    ///
    /// Panics if `interval` is zero, which would ask the broker without a pause.
    #[track_caller]
    pub fn new(interval: Duration) -> Self {
        assert!(!interval.is_zero(), "a keep-alive needs an interval");
        Self {
            settings: Settings {
                rhythm: Rhythm {
                    interval,
                    try_timeout: interval / 2,
                },
                runtime: None,
                told: Arc::default(),
            },
        }
    }

    /// Sets how long one keep-alive may take before it has failed; half of the interval by default.
    pub fn try_timeout(mut self, limit: Duration) -> Self {
        self.settings.rhythm.try_timeout = limit;
        self
    }

    /// Sets on which runtime the tickers run; by default on that of the job.
    ///
    /// With a runtime that no job runs on, a job that blocks its thread is kept alive.
    /// [`Settle::keep_alive`] is then called there, so its client must not be bound to another.
    ///
    /// # Panics
    ///
    /// Panics if `runtime` has no timers (`enable_time`).
    #[track_caller]
    pub fn runtime(mut self, runtime: Handle) -> Self {
        {
            let _context = runtime.enter();
            drop(sleep(Duration::ZERO));
        }
        self.settings.runtime = Some(runtime);
        self
    }
}

impl<S> Layer<S> for KeepAliveLayer {
    type Service = KeepAlive<S>;

    fn layer(&self, inner: S) -> KeepAlive<S> {
        KeepAlive {
            inner,
            settings: self.settings.clone(),
        }
    }
}

// === impl KeepAlive ===

/// Keeps the deliveries of its inner service alive; see [`KeepAliveLayer`].
#[derive(Clone)]
pub struct KeepAlive<S> {
    inner: S,
    settings: Settings,
}

impl<S> KeepAlive<S> {
    /// Returns the inner service.
    pub fn get_ref(&self) -> &S {
        &self.inner
    }

    /// Returns the inner service, mutably.
    pub fn get_mut(&mut self) -> &mut S {
        &mut self.inner
    }

    /// Returns the inner service, without its keep-alive.
    pub fn into_inner(self) -> S {
        self.inner
    }
}

impl<S: fmt::Debug> fmt::Debug for KeepAlive<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeepAlive")
            .field("inner", &self.inner)
            .field("rhythm", &self.settings.rhythm)
            .finish_non_exhaustive()
    }
}

impl Settings {
    /// Starts the ticker of `tag`'s job, if its broker can do that.
    #[track_caller]
    fn start<Tag>(&self, tag: Tag) -> Option<Stopping>
    where
        Tag: Settle + Send + Sync + 'static,
    {
        if !tag.capabilities().has_keep_alive() {
            if !self.told.swap(true, Ordering::Relaxed) {
                guard(|| tracing::warn!("the broker has no keep-alive: jobs run without it"));
            }
            return None;
        }
        let ticker = Ticker::new(tag, self.rhythm);
        let stopping = Stopping(Arc::clone(&ticker));
        let job = Cancellation::current();
        if let Some(context) = job.job() {
            context.keep_alive();
            context.accompany(Arc::clone(&ticker) as Arc<dyn Companion>);
        }
        let task = ticker.run(job);
        // Its handle is of no use: a stopped ticker ends its task.
        match &self.runtime {
            Some(runtime) => drop(runtime.spawn(task)),
            None => drop(tokio::spawn(task)),
        }
        Some(stopping)
    }
}

impl<S, J> Service<J> for KeepAlive<S>
where
    S: Service<J>,
    J: Job,
    J::Tag: Settle + Send + Sync + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = KeepAliveFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    /// # Panics
    ///
    /// Panics outside of a tokio runtime, unless the layer was given one. Inside a sentinel there
    /// always is one.
    #[track_caller]
    fn call(&mut self, job: J) -> Self::Future {
        // First, so that a `call` that blocks is kept alive too.
        let ticker = self.settings.start(job.tag());
        KeepAliveFuture {
            inner: self.inner.call(job),
            ticker,
        }
    }
}

// === impl KeepAliveFuture ===

pin_project! {
    /// The future of a [`KeepAlive`].
    #[must_use = "futures do nothing unless polled"]
    pub struct KeepAliveFuture<F> {
        #[pin]
        inner: F,
        // `None` once the inner future has returned, or without a keep-alive.
        ticker: Option<Stopping>,
    }
}

impl<F: Future> Future for KeepAliveFuture<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        let polled = this.inner.poll(cx);
        if polled.is_ready() {
            this.ticker.take();
        }
        polled
    }
}

impl<F> fmt::Debug for KeepAliveFuture<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeepAliveFuture")
            .field("is_kept_alive", &self.ticker.is_some())
            .finish_non_exhaustive()
    }
}
