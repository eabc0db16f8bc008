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
    keep_alive::ticker::{Schedule, Ticker, TickerGuard},
    outcome::guard,
    settle::Settle,
};

mod ticker;

// === impl KeepAliveLayer ===

/// Layer that asks the broker for more time, again and again, while a job runs.
///
/// Some brokers give a job to another worker after a time without a sign of life: the ack wait of
/// JetStream, the visibility timeout of SQS, the claim by idle time of Redis streams. This layer sends a
/// sign of life every [`interval`](Self::new), with [`Settle::keep_alive`]. It does so from its own task, so
/// a job is kept alive even if it is not polled.
///
/// It belongs *directly inside* a [`SentinelLayer`](crate::SentinelLayer), around everything else.
///
/// # Choosing the interval
///
/// Use a third of the broker's ack wait. A keep-alive that fails is tried again after an eighth of the
/// interval, then after a quarter, then after every half. So there are at least three tries before the ack
/// wait is over, and six if the broker returns its errors at once.
///
/// The interval counts from `call`, the ack wait from the delivery. If jobs wait in between, as in a
/// `buffer` or in the client's queue, subtract that time. A job that is done within the first interval costs
/// a task and no request.
///
/// # Contract
///
/// - *Readiness* is the inner service's.
/// - *End*: the ticker is stopped before the policy is called, for every outcome, and also if the job
///   [was not](crate::outcome::TimedOut::stopped) stopped. If the inner future returns or is dropped
///   earlier, the ticker stops then. A keep-alive in flight is dropped and not polled again, so it sends
///   nothing more. Data that it *has* sent, or left in the client's queue, may reach the broker at any time;
///   on the same connection it arrives before the settlement.
/// - *Blocking*: if another thread is polling a keep-alive at this moment, the stop waits for that one poll.
///   An implementation of `keep_alive` that blocks its thread blocks the settlement of its job.
/// - *A lost lease*: if the keep-alive returns [`Lease::Lost`](crate::settle::Lease::Lost), the job is
///   cancelled with [`CancelReason::LeaseLost`](crate::outcome::CancelReason::LeaseLost). The verdict of
///   [`ack_on_success`](crate::ack_on_success) for that is [`Abandon`](crate::Verdict::Abandon). A job that
///   completes within its grace is acked; the effect of that ack depends on the broker.
/// - *The default time limit* of the sentinel is the full [30 s](crate::SentinelLayer::timeout) for a job
///   that is kept alive, even if its [lease](crate::Job::lease) is shorter.
/// - *A failed keep-alive* does not stop the job, since the lease may still be held. It is an event, and is
///   tried again as long as the job runs, never more often than described above. An error and a
///   [timeout](Self::try_timeout) are a `warn!`, a panic is an `error!`.
/// - *A runtime that ends*, or has no timers, ends its tickers. Each of them is an `error!`, and its job runs
///   on without keep-alive.
/// - *A broker without keep-alive* ([`Capabilities::has_keep_alive`]): there is no ticker, and the job runs
///   as it would without this layer. That is one `warn!` for a layer and everything that is made from it,
///   since a worker is set up for one broker.
/// - *Outside of a sentinel* (in no job, such as in a task that a job spawned) the ticker lives as long as
///   the inner future. A lost lease then ends only the ticker, since nothing can stop the inner future.
/// - *The tag* is taken from the job once more, before the inner `call`. A panic in [`Job::tag`] is a panic
///   of the job.
///
/// [`Capabilities::has_keep_alive`]: crate::settle::Capabilities::has_keep_alive
///
/// # Jobs that block
///
/// The ticker runs on the runtime of the job. On a current-thread runtime, a job that blocks is not kept
/// alive. On a multi-thread runtime it often is, but do not rely on it: other threads can't take over the
/// task that a thread spawned last, and the thread that blocks may be the one that drives the timers. Only a
/// [`runtime`](Self::runtime) without jobs is always on time. Give the layer the consumer's runtime, and
/// give the jobs their own with [`SentinelLayer::runtime`](crate::SentinelLayer::runtime).
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
/// /// Handle that a broker's client hands out with a delivery.
/// #[derive(Clone, Debug, Default)]
/// struct Acker { kept_alive: Arc<AtomicU32> }
///
/// impl Settle for Acker {
///     type Error = Infallible;
///     type Future = Ready<Result<(), Unsettled<Self, Infallible>>>;
///
///     fn settle(self, _: Verdict, _: Reason) -> Self::Future { ready(Ok(())) }
///     async fn keep_alive(&self) -> Result<Lease, Infallible> {
///         // The third time, the broker has given the job to another worker.
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
///
/// Jobs that block have a runtime of their own, and the ticker another:
///
/// ```
/// use std::time::Duration;
/// use tokio::runtime::{Handle, Runtime};
/// use tower_sentinel::{KeepAliveLayer, SentinelLayer, SettlePolicy, ack_on_success};
///
/// let jobs = Runtime::new().unwrap();
/// # let _entered = jobs.enter();
/// let sentinel = SentinelLayer::new(SettlePolicy::new(ack_on_success())).runtime(jobs.handle().clone());
/// let keep_alive = KeepAliveLayer::new(Duration::from_secs(10))
///     .try_timeout(Duration::from_secs(2))
///     .runtime(Handle::current());
/// # drop((sentinel, keep_alive));
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
    schedule: Schedule,
    runtime: Option<Handle>,
    /// `true` once the warning of a broker without keep-alive is out; shared by all clones.
    told: Arc<AtomicBool>,
}

impl KeepAliveLayer {
    /// Creates a layer that keeps each job alive every `interval`, which should be a third of the broker's
    /// ack wait.
    ///
    /// If the interval is too long for the clock, such as `Duration::MAX`, there is no keep-alive.
    ///
    /// # Panics
    ///
    /// Panics if `interval` is zero, since that would ask the broker without a pause.
    #[track_caller]
    pub fn new(interval: Duration) -> Self {
        assert!(!interval.is_zero(), "a keep-alive needs an interval");
        Self {
            settings: Settings {
                schedule: Schedule {
                    interval,
                    try_timeout: interval / 2,
                },
                runtime: None,
                told: Arc::default(),
            },
        }
    }

    /// Sets the time limit of one keep-alive; half of the interval by default.
    pub fn try_timeout(mut self, limit: Duration) -> Self {
        self.settings.schedule.try_timeout = limit;
        self
    }

    /// Sets the runtime of the tickers; that of the job by default.
    ///
    /// On a runtime without jobs, a job that blocks its thread is kept alive too. [`Settle::keep_alive`] is
    /// then called on that runtime, so its client must not be bound to another one.
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

/// Service that keeps the deliveries of its inner service alive; see [`KeepAliveLayer`].
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

    /// Returns the inner service, without the keep-alive.
    pub fn into_inner(self) -> S {
        self.inner
    }
}

impl<S: fmt::Debug> fmt::Debug for KeepAlive<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeepAlive")
            .field("inner", &self.inner)
            .field("schedule", &self.settings.schedule)
            .finish_non_exhaustive()
    }
}

impl Settings {
    /// Starts the ticker of `tag`'s job, if its broker has a keep-alive.
    #[track_caller]
    fn start<Tag>(&self, tag: Tag) -> Option<TickerGuard>
    where
        Tag: Settle + Send + Sync + 'static,
    {
        if !tag.capabilities().has_keep_alive() {
            if !self.told.swap(true, Ordering::Relaxed) {
                guard(|| tracing::warn!("jobs running without keep-alive: the broker has none"));
            }
            return None;
        }
        let ticker = Ticker::new(tag, self.schedule);
        let stopping = TickerGuard(Arc::clone(&ticker));
        let job = Cancellation::current();
        if let Some(context) = job.job() {
            context.keep_alive();
            context.accompany(Arc::clone(&ticker) as Arc<dyn Companion>);
        }
        let task = ticker.run(job);
        // The handle is not needed: a stopped ticker ends its task.
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
    /// Panics outside of a tokio runtime, unless the layer has one. Inside a sentinel there is always a
    /// runtime.
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
        // `None` once the inner future has returned, or if there is no keep-alive.
        ticker: Option<TickerGuard>,
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
