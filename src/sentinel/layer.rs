//! [`SentinelLayer`], the builder of a [`Sentinel`].

use std::{
    fmt,
    sync::{Arc, OnceLock},
    time::Duration,
};

use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use tower_layer::Layer;
use tracing::Span;

use crate::{
    job::TimeLimit,
    sentinel::{
        abandoned::Abandoned,
        arrival::LimitedDeliveries,
        base::Base,
        cause::Ladder,
        error::SentinelError,
        hooks::{CallerSpan, EventOnly, Hooks},
        roll_call::RunningJob,
        runtimes::Runtimes,
        service::Sentinel,
        settings::{OnDrop, OnStuck, Settings},
        supervision::Shared,
    },
    settle::ProcessSpan,
    telemetry::metrics::{Instruments, Labels},
};

/// Layer that supervises each call of a service, and settles its outcome with the policy `P`.
///
/// `H` holds the callbacks of the layer; see [`make_span`](Self::make_span),
/// [`on_unsettled`](Self::on_unsettled) and [`with_tag`](SentinelLayer::with_tag).
///
/// # Stopping a job
///
/// A time limit, a dropped caller, a shutdown, a lost lease and a requested cancellation all go through the
/// same steps:
///
/// 1. the job is *told* to stop: [`cancelled()`](crate::cancelled) resolves;
/// 2. it has its [`grace`](Self::grace) to finish, none by default;
/// 3. it is *aborted*, which takes effect at its next `.await`;
/// 4. the sentinel waits up to [`stop_wait`](Self::stop_wait) until the job is really gone;
/// 5. the policy is called, and sees by [`stopped`](crate::outcome::TimedOut::stopped) whether it is.
///
/// The first cause wins, by its time and not by the poll that sees it: a shutdown at 5 s comes before a limit
/// at 10 s, even if the response future is next polled at 11 s. A job that *returns* during these steps has
/// completed (or failed): if finished work were retried, it would run twice. A panic during these steps, in
/// the grace or in a destructor, does not replace the cause; it is attached.
///
/// # Precision of time limits
///
/// An abort takes effect at an `.await`. And a thread that a job blocks may be the one that drives the timers
/// of its runtime. So if jobs and supervision share a runtime, the outcome of a blocking job may come only
/// after the job no longer blocks its thread. If the jobs have their own [`runtime`](Self::runtime), the
/// limit is punctual also for jobs that block. Work that blocks or computes for long belongs in
/// [`spawn_blocking`](crate::spawn_blocking), which the job awaits. Then the job can be stopped, and the work
/// can check for it.
///
/// A job that returns long after its limit has completed. If it is more than a second late, a `warn!` asks
/// whether it blocks its thread. The cause may also be a caller that polls the response late.
///
/// # Number of blocking jobs
///
/// If jobs block, a runtime runs as many of them as it has threads. If the concurrency limit, or the
/// prefetch, is above that number, the other jobs wait for a thread. Their limits run meanwhile, since they
/// count from `call`. A job whose limit passes before it has [started](crate::outcome::TimedOut::started)
/// never starts. [`ack_on_success`](crate::ack_on_success) releases it, which charges no attempt. So give a
/// `runtime` for jobs that block as many threads as the concurrency limit, or use `spawn_blocking`, for which
/// tokio has 512 threads.
///
/// # Examples
///
/// ```
/// use std::{convert::Infallible, time::Duration};
/// use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
/// use tower_sentinel::{Job, Outcome, Report, SentinelLayer};
///
/// struct Delivery(u64);
///
/// impl Job for Delivery {
///     type Tag = u64;
///     fn tag(&self) -> u64 { self.0 }
/// }
///
/// async fn process(delivery: Delivery) -> Result<(), std::io::Error> {
///     match delivery.0 {
///         1 => Ok(()),
///         2 => panic!("a poison message"),
///         _ => std::future::pending().await,
///     }
/// }
///
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() {
/// let policy = service_fn(|report: Report<u64, (), std::io::Error>| async move {
///     Ok::<_, Infallible>(match report.outcome {
///         Outcome::Completed(()) => "ack",
///         Outcome::Failed(_) | Outcome::TimedOut(_) | Outcome::Cancelled(_) => "requeue",
///         Outcome::Panicked(_) => "dead-letter",
///     })
/// });
///
/// let mut handler = ServiceBuilder::new()
///     .concurrency_limit(64) // the prefetch gate: covers the run and the acknowledgement
///     .layer(SentinelLayer::new(policy).timeout(Duration::from_secs(30)))
///     .service_fn(process);
///
/// assert_eq!(handler.ready().await.unwrap().call(Delivery(1)).await.unwrap(), "ack");
/// assert_eq!(handler.ready().await.unwrap().call(Delivery(2)).await.unwrap(), "dead-letter");
/// assert_eq!(handler.ready().await.unwrap().call(Delivery(3)).await.unwrap(), "requeue");
/// # }
/// ```
///
/// Each time that a job can take has a setting of its own, and so has what waits for it:
///
/// ```
/// use std::time::Duration;
/// use tokio::runtime::Handle;
/// use tokio_util::sync::CancellationToken;
/// use tower_sentinel::{SentinelLayer, SettlePolicy, ack_on_success, sentinel::OnDrop};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// let policy = SettlePolicy::new(ack_on_success());
/// let reports = SentinelLayer::new(policy.clone())
///     .timeout(Duration::from_secs(300))
///     .grace(Duration::from_secs(10)) // after it was told to stop
///     .stop_wait(Duration::from_secs(1)) // after it was aborted
///     .settle_timeout(Duration::from_secs(30))
///     .max_abandoned(4) // jobs that block their thread after all that
///     .runtime(Handle::current())
///     .shutdown(CancellationToken::new());
/// // Its callers set limits.
/// let requests = SentinelLayer::new(policy).no_timeout().on_drop(OnDrop::Abort);
/// # drop((reports, requests));
/// # }
/// ```
#[must_use = "a layer does nothing until it is applied to a service"]
pub struct SentinelLayer<P, H = Hooks> {
    policy: P,
    pub(crate) settings: Settings,
    runtime: Option<Handle>,
    hooks: H,
}

impl<P> SentinelLayer<P> {
    /// Creates a layer that settles every [`Job`](crate::Job) with `policy`.
    pub fn new(policy: P) -> Self {
        Self::from_hooks(policy, Hooks::default())
    }

    /// Creates a layer for requests that are not a [`Job`](crate::Job): `tag` reads the tag.
    ///
    /// The time limit of such a job is the layer's.
    ///
    /// ```
    /// use std::{collections::HashMap, convert::Infallible};
    /// use tower::{Service, ServiceExt, service_fn};
    /// use tower_layer::Layer;
    /// use tower_sentinel::{Report, SentinelLayer};
    ///
    /// type Headers = HashMap<&'static str, String>; // stands for an `http::Request`
    ///
    /// fn message_id(headers: &Headers) -> String {
    ///     headers["message-id"].clone()
    /// }
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() {
    /// let policy = service_fn(|report: Report<String, usize, Infallible>| async move {
    ///     Ok::<_, Infallible>(format!("ack {}", report.tag))
    /// });
    /// let mut sentinel = SentinelLayer::with_tag(policy, message_id)
    ///     .layer(service_fn(|headers: Headers| async move { Ok(headers.len()) }));
    ///
    /// let request = Headers::from([("message-id", "m-7".to_owned())]);
    /// assert_eq!(sentinel.ready().await.unwrap().call(request).await.unwrap(), "ack m-7");
    /// # }
    /// ```
    pub fn with_tag<J, Tag, G>(policy: P, tag: G) -> SentinelLayer<P, Hooks<G>>
    where
        G: Fn(&J) -> Tag,
    {
        let (span, unsettled) = (CallerSpan, EventOnly);
        SentinelLayer::from_hooks(
            policy,
            Hooks {
                tag,
                span,
                unsettled,
            },
        )
    }
}

impl<P, H> SentinelLayer<P, H> {
    fn from_hooks(policy: P, hooks: H) -> Self {
        let ladder = Ladder {
            grace: Duration::ZERO,
            stop_wait: Duration::from_secs(5),
        };
        let settings = Settings {
            timeout: TimeLimit::Inherit,
            outliving: Arc::default(),
            ladder,
            settle_timeout: Duration::from_secs(30),
            on_drop: OnDrop::Abort,
            shutdown: None,
            is_told_by_polls: false,
            max_abandoned: None,
            on_stuck: OnStuck::default(),
            labels: Labels::default(),
        };
        Self {
            policy,
            settings,
            runtime: None,
            hooks,
        }
    }

    /// Sets the time limit of a job, counted from `call`; 30 s by default, or two thirds of the job's
    /// [lease](crate::Job::lease) if that is less.
    ///
    /// The remaining third is for [`stop_wait`](Self::stop_wait) and the settlement, so that the verdict
    /// comes in time. A job that a [`KeepAliveLayer`](crate::KeepAliveLayer) keeps alive has the full 30 s.
    ///
    /// A limit that you set does not depend on the lease. If limit and [`grace`](Self::grace) together are
    /// not shorter than the lease, and nothing keeps the job alive, there is an event at level WARN with all
    /// three. It comes once for a layer and everything that is made from it.
    ///
    /// A job's own [`time_limit`](crate::Job::time_limit) takes precedence. `Duration::ZERO` stops every job
    /// at once, unless it completes in its first poll. A limit too far in the future for the clock, such as
    /// `Duration::MAX`, is no limit.
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.settings.timeout = TimeLimit::After(limit);
        self
    }

    /// Removes the time limit of jobs, unless they have [their own](crate::Job::time_limit).
    pub fn no_timeout(mut self) -> Self {
        self.settings.timeout = TimeLimit::Never;
        self
    }

    /// Sets the time that a job has to finish after it was told to stop and before it is aborted; 0 by
    /// default.
    pub fn grace(mut self, grace: Duration) -> Self {
        self.settings.ladder.grace = grace;
        self
    }

    /// Sets the time to wait until an aborted job is really gone, before the policy is called anyway; 5 s by
    /// default.
    ///
    /// It is spent only on jobs that block their thread. `Duration::ZERO` does not wait, so any job may be
    /// reported as still running although it is about to be dropped.
    pub fn stop_wait(mut self, wait: Duration) -> Self {
        self.settings.ladder.stop_wait = wait;
        self
    }

    /// Sets the time limit of the policy, for its readiness and its call together; 30 s by default.
    ///
    /// A policy that takes longer is dropped, and the call fails with [`SentinelError::PolicyTimedOut`].
    pub fn settle_timeout(mut self, limit: Duration) -> Self {
        self.settings.settle_timeout = limit;
        self
    }

    /// Sets the fate of a job whose caller drops the response future; [`OnDrop::Abort`] by default.
    pub fn on_drop(mut self, on_drop: OnDrop) -> Self {
        self.settings.on_drop = on_drop;
        self
    }

    /// Sets a separate runtime for the jobs, while their supervision and the policy stay on the caller's; by
    /// default both run on the caller's.
    ///
    /// Then a time limit is punctual also for jobs that block their thread; see [Precision of time
    /// limits](Self#precision-of-time-limits). If that runtime has ended, its jobs are
    /// [`Cancelled`](crate::Outcome::Cancelled) with
    /// [`RuntimeGone`](crate::outcome::CancelReason::RuntimeGone). After the first of them the readiness of
    /// the service is an error, [`SentinelError::RuntimeGone`], so no further jobs are taken that could not
    /// run.
    ///
    /// A value or an error that has a destructor costs a second task on that runtime, in which a
    /// [`SettlePolicy`](crate::SettlePolicy) drops it.
    pub fn runtime(mut self, runtime: Handle) -> Self {
        self.runtime = Some(runtime);
        self
    }

    /// Sets a token that stops all jobs when it is cancelled, with the reason
    /// [`Shutdown`](crate::outcome::CancelReason::Shutdown); no token by default.
    ///
    /// Jobs that are called later are stopped at once. Settlements continue. It costs each job one
    /// allocation.
    pub fn shutdown(mut self, token: CancellationToken) -> Self {
        self.settings.shutdown = Some(token);
        self
    }

    /// Keeps the service unready while `max` jobs still run although their outcome is known; no bound by
    /// default.
    ///
    /// These are jobs that blocked their thread, or the thread of a
    /// [`spawn_blocking`](crate::spawn_blocking), for longer than their limit and
    /// [`stop_wait`](Self::stop_wait). They no longer hold a permit of a concurrency limit, but they hold a
    /// thread. The bound applies to new jobs: jobs that are running when it is reached may be abandoned too.
    /// All clones of a service share it.
    ///
    /// # Panics
    ///
    /// Panics if `max` is 0, since that would never let a job in.
    #[track_caller]
    pub fn max_abandoned(mut self, max: usize) -> Self {
        assert!(max > 0, "`max_abandoned(0)` would never let a job in");
        self.settings.max_abandoned = Some(max);
        self
    }

    /// Sets the callback for a job that still runs after it was told to stop, had its [`grace`](Self::grace), was aborted,
    /// and had its [`stop_wait`](Self::stop_wait); none by default.
    ///
    /// Such a job does not await: it blocks its thread, or the thread of a [`spawn_blocking`](crate::spawn_blocking). So
    /// no task dump of tokio can show where it is. A debugger can, with a backtrace of all threads. An event at level
    /// ERROR with the id of its task and its tag comes first, in the job's span; both come as soon as the outcome is
    /// known, and before the settlement.
    ///
    /// The callback should return at once. Its panic is ignored.
    ///
    /// ```
    /// use std::{convert::Infallible, thread, time::Duration};
    /// use tokio::runtime::Handle;
    /// use tower::{Layer, Service, ServiceExt, service_fn};
    /// use tower_sentinel::{Report, SentinelLayer};
    ///
    /// # #[tokio::main(flavor = "multi_thread", worker_threads = 2)]
    /// # async fn main() {
    /// let policy = service_fn(|_: Report<u64, (), Infallible>| async { Ok::<_, Infallible>(()) });
    /// let (stuck, mut is_stuck) = tokio::sync::mpsc::unbounded_channel();
    /// let mut sentinel = SentinelLayer::with_tag(policy, |job: &u64| *job)
    ///     .timeout(Duration::from_millis(10))
    ///     .stop_wait(Duration::from_millis(10))
    ///     .on_stuck(move |job| drop(stuck.send(job.tag.clone())))
    ///     .layer(service_fn(|_: u64| async {
    ///         thread::sleep(Duration::from_millis(500));
    ///         Ok::<_, Infallible>(())
    ///     }));
    ///
    /// let call = sentinel.ready().await.unwrap().call(7);
    /// tokio::spawn(call).await.unwrap().unwrap();
    /// assert_eq!(&*is_stuck.recv().await.unwrap(), "7");
    /// # }
    /// ```
    pub fn on_stuck<F>(mut self, callback: F) -> Self
    where
        F: Fn(&RunningJob) + Send + Sync + 'static,
    {
        self.settings.on_stuck = OnStuck(Some(Arc::new(callback)));
        self
    }

    fn map_hooks<I>(self, map: impl FnOnce(H) -> I) -> SentinelLayer<P, I> {
        SentinelLayer {
            policy: self.policy,
            settings: self.settings,
            runtime: self.runtime,
            hooks: map(self.hooks),
        }
    }
}

impl<P, G, M, U> SentinelLayer<P, Hooks<G, M, U>> {
    /// Sets the function that makes the span of a job; by default it is the caller's own span.
    ///
    /// The function runs in the caller's span, which is therefore the parent of the new span. The new span is
    /// current in the job and in the policy. `span` must be `Clone`, for [`layer`](Layer::layer), and `Send +
    /// Sync + 'static`.
    ///
    /// ```
    /// use tower_sentinel::SentinelLayer;
    ///
    /// # let policy = ();
    /// let queue = "orders".to_owned();
    /// let layer = SentinelLayer::new(policy)
    ///     .make_span(move |tag: &u64| tracing::info_span!("process", queue, delivery_tag = tag));
    /// # drop(layer);
    /// ```
    pub fn make_span<Tag, F>(self, span: F) -> SentinelLayer<P, Hooks<G, F, U>>
    where
        F: Fn(&Tag) -> Span,
    {
        self.map_hooks(|Hooks { tag, unsettled, .. }| Hooks {
            tag,
            span,
            unsettled,
        })
    }

    /// Refuses to run a job that was [delivered](crate::settle::Settle::deliveries) more than `limit` times;
    /// no limit by default.
    ///
    /// A job that takes its process down, by an abort, a stack overflow or by using all memory, has no
    /// outcome. So no decision is made about it, and the broker delivers it to the next worker. This limit
    /// checks the count before the run. A job above it is [`Cancelled`](crate::Outcome::Cancelled) with
    /// [`DeliveryLimit`](crate::outcome::CancelReason::DeliveryLimit), and the inner service is not called.
    /// The policy decides as on any outcome. [`ack_on_success`](crate::ack_on_success) rejects the job, with
    /// a reason such as "delivered 6 times without an outcome".
    ///
    /// Use it together with [`DecisionExt::delivery_limit`](crate::DecisionExt::delivery_limit), with the
    /// same number or a higher one. The decision limits jobs that fail, and this limits jobs that never reach
    /// a decision. The count includes everything that the broker counts. So leave some room for connections
    /// that end, and for releases if a `Release` [is charged](crate::settle::Capabilities::charges).
    ///
    /// If a broker does not report the count, there is no limit, and an event at level WARN says so once. A
    /// classic queue of RabbitMQ does not count the deliveries of a consumer that went down, so no limit
    /// applies to such a job; use a quorum queue, or a queue of suspects.
    ///
    /// A death charges all jobs that the worker held. To find the one that did it, give the queue a queue of
    /// [suspects](crate::settle::Settle::is_suspect). Then a job that may have done it is not run, whatever its
    /// count: it is `Cancelled` with [`Suspect`](crate::outcome::CancelReason::Suspect), and a `Reject` moves it
    /// to where jobs are [delivered alone](crate::_guide::isolation#which-job-killed-the-worker).
    ///
    /// ```
    /// use tower_sentinel::{DecisionExt, SentinelLayer, SettlePolicy, ack_on_success};
    ///
    /// let policy = SettlePolicy::new(ack_on_success().delivery_limit(5));
    /// let layer = SentinelLayer::new(policy).delivery_limit(10);
    /// # drop(layer);
    /// ```
    ///
    /// # Panics
    ///
    /// Panics if `limit` is 0. Elsewhere that may mean "no limit"; here it would run nothing.
    #[track_caller]
    pub fn delivery_limit(self, limit: u32) -> SentinelLayer<P, Hooks<LimitedDeliveries<G>, M, U>> {
        assert!(limit > 0, "no job is delivered less than once");
        self.map_hooks(|hooks| Hooks {
            tag: LimitedDeliveries::new(hooks.tag, limit),
            span: hooks.span,
            unsettled: hooks.unsettled,
        })
    }

    /// Makes a span for each job that follows the messaging conventions of OpenTelemetry, for tags that can
    /// [`Settle`](crate::settle::Settle); see [`ProcessSpan`].
    ///
    /// ```
    /// use tower_sentinel::{SentinelLayer, SettlePolicy, ack_on_success};
    ///
    /// let layer = SentinelLayer::new(SettlePolicy::new(ack_on_success())).process_span();
    /// # drop(layer);
    /// ```
    pub fn process_span(self) -> SentinelLayer<P, Hooks<G, ProcessSpan, U>> {
        self.map_hooks(|Hooks { tag, unsettled, .. }| Hooks {
            tag,
            span: ProcessSpan,
            unsettled,
        })
    }

    /// Sets the handler of policy errors that no caller waits for any more.
    ///
    /// It is called if a settlement fails after the response future was dropped. The call comes after an
    /// `error!` event, in the job's span. The delivery may then be unsettled: give up the channel, so that
    /// the broker takes the job back. A job that is lost because every runtime has ended is only an event.
    /// `unsettled` must be `Clone`, for [`layer`](Layer::layer), and `Send + Sync + 'static`.
    ///
    /// ```
    /// use std::{convert::Infallible, io};
    /// use tower_sentinel::{SentinelError, SentinelLayer};
    ///
    /// # let policy = ();
    /// let (lost, mut is_lost) = tokio::sync::watch::channel(false);
    /// let layer = SentinelLayer::new(policy)
    ///     .on_unsettled(move |_: SentinelError<Infallible, io::Error>| {
    ///         lost.send_replace(true);
    ///     });
    /// # drop((layer, is_lost.borrow_and_update()));
    /// ```
    pub fn on_unsettled<E, R, F>(self, unsettled: F) -> SentinelLayer<P, Hooks<G, M, F>>
    where
        F: Fn(SentinelError<E, R>),
    {
        self.map_hooks(|Hooks { tag, span, .. }| Hooks {
            tag,
            span,
            unsettled,
        })
    }
}

#[cfg(feature = "metrics")]
impl<P, H> SentinelLayer<P, H> {
    /// Sets labels of this sentinel's metrics, beside those of the first job's
    /// [description](crate::Job::messaging); none by default.
    ///
    /// A label with the name of one of those, such as `messaging.destination.name`, takes its place. See
    /// [`describe_metrics`](crate::telemetry::describe_metrics#labels).
    ///
    /// ```
    /// use tower_sentinel::{SentinelLayer, SettlePolicy, ack_on_success};
    ///
    /// let labels = [("messaging.system", "rabbitmq"), ("messaging.destination.name", "orders")];
    /// let policy = SettlePolicy::new(ack_on_success()).metric_labels(labels);
    /// let layer = SentinelLayer::new(policy).metric_labels(labels);
    /// # drop(layer);
    /// ```
    pub fn metric_labels<K, V>(mut self, labels: impl IntoIterator<Item = (K, V)>) -> Self
    where
        K: Into<::metrics::SharedString>,
        V: Into<::metrics::SharedString>,
    {
        self.settings.labels = crate::telemetry::metrics::labels(labels);
        self
    }
}

impl<S, P: Clone, H: Clone> Layer<S> for SentinelLayer<P, H> {
    type Service = Sentinel<S, P, H>;

    fn layer(&self, service: S) -> Self::Service {
        let instruments = self.instruments();
        let abandoned = self.abandoned(&instruments);
        let shared = self.shared(self.settings.clone(), instruments, abandoned);
        Sentinel::new(service, self.policy.clone(), shared)
    }
}

impl<P: Clone, H: Clone> SentinelLayer<P, H> {
    /// Puts each of `services` under a sentinel with a child of `shutdown`. Their caller polls its calls
    /// again once that token is cancelled. They share one bound on abandoned jobs, as clones of one sentinel
    /// do, and nothing else that would cause contention between their threads.
    pub(crate) fn layer_each<S>(
        &self,
        mut services: Vec<S>,
        shutdown: &CancellationToken,
    ) -> Vec<Sentinel<S, P, H>> {
        let abandoned = self.abandoned(&self.instruments());
        let mut sentinels = Vec::new();
        while let Some(service) = services.pop() {
            let shared = self.shared_under(shutdown, abandoned.clone());
            sentinels.push(Sentinel::new(service, self.policy.clone(), shared));
        }
        // They were taken from the end.
        sentinels.reverse();
        sentinels
    }

    fn instruments(&self) -> Arc<Instruments> {
        Arc::new(Instruments::new(&self.settings.labels))
    }

    fn abandoned(&self, instruments: &Arc<Instruments>) -> Option<Arc<Abandoned>> {
        let max = self.settings.max_abandoned.or(Instruments::UNBOUNDED)?;
        Some(Arc::new(Abandoned::new(max, Arc::clone(instruments))))
    }

    fn shared_under(
        &self,
        shutdown: &CancellationToken,
        abandoned: Option<Arc<Abandoned>>,
    ) -> Arc<Shared<H>> {
        let mut settings = self.settings.clone();
        settings.shutdown = Some(shutdown.child_token());
        settings.is_told_by_polls = true;
        self.shared(settings, self.instruments(), abandoned)
    }

    fn shared(
        &self,
        settings: Settings,
        instruments: Arc<Instruments>,
        abandoned: Option<Arc<Abandoned>>,
    ) -> Arc<Shared<H>> {
        let base = Base {
            settings,
            runtimes: Runtimes::new(self.runtime.clone()),
            shutdown: OnceLock::new(),
            abandoned,
            instruments,
        };
        let hooks = self.hooks.clone();
        Arc::new(Shared { base, hooks })
    }
}

impl<P: Clone, H: Clone> Clone for SentinelLayer<P, H> {
    fn clone(&self) -> Self {
        Self {
            policy: self.policy.clone(),
            settings: self.settings.clone(),
            runtime: self.runtime.clone(),
            hooks: self.hooks.clone(),
        }
    }
}

impl<P: fmt::Debug, H> fmt::Debug for SentinelLayer<P, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SentinelLayer")
            .field("policy", &self.policy)
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}
