//! Code of others that is told of a job and panics: a subscriber, a recorder, a waker, a printer.
//! None of it costs a job its policy call, reaches the caller's task, or ends the process.

use std::{
    fmt,
    future::{Future, IntoFuture, pending, poll_fn},
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    time::Duration,
};

use tokio::{
    runtime::Handle,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;
use tower::{Layer as _, Service, ServiceBuilder, ServiceExt, service_fn};
use tower_sentinel::{
    Consumer, IntensityLayer, Job, KeepAliveLayer, Outcome, Report, SentinelLayer, SettlePolicy,
    Verdict, ack_on_success,
    broker::memory::Broker,
    cancel::Cancellation,
    cancelled,
    intensity::IntensityState,
    outcome::{CancelReason, OutcomeKind},
    sentinel::OnDrop,
    settle::{Capabilities, Lease, Reason, Settle, Unsettled},
};
use tracing::{Id, span};
use tracing_subscriber::{
    Layer,
    layer::{Context as LayerContext, SubscriberExt},
    util::SubscriberInitExt,
};

use crate::support::{
    Answer, Fate, Plan, Recorder, Refused, WORK, Work, Worker, idle, log::Log, raise,
};

/// When a subscriber panics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Site {
    Enter,
    Exit,
    Record,
    Event,
    Close,
    Always,
}

/// The last two may abort where spans have parents: one that closes can close its parent, within the
/// subscriber, while the first panic unwinds.
pub(crate) const SITES: [Site; 6] = [
    Site::Enter,
    Site::Exit,
    Site::Record,
    Site::Event,
    Site::Close,
    Site::Always,
];

/// A subscriber's layer that panics from the moment it is armed.
#[derive(Clone)]
pub(crate) struct Burst {
    site: Site,
    armed: Arc<AtomicBool>,
    panics: Arc<AtomicUsize>,
}

impl Burst {
    pub(crate) fn new(site: Site) -> Self {
        Self {
            site,
            armed: Arc::default(),
            panics: Arc::default(),
        }
    }

    pub(crate) fn start(&self) -> tracing::subscriber::DefaultGuard {
        tracing_subscriber::registry()
            .with(self.clone())
            .set_default()
    }

    pub(crate) fn arm(&self) {
        self.armed.store(true, Ordering::SeqCst);
    }

    /// The test's own spans are closed after it.
    pub(crate) fn disarm(&self) {
        self.armed.store(false, Ordering::SeqCst);
    }

    fn at(&self, site: Site) {
        let hits = self.site == site || self.site == Site::Always;
        if hits && self.armed.load(Ordering::SeqCst) {
            self.panics.fetch_add(1, Ordering::SeqCst);
            raise("in the subscriber");
        }
    }
}

impl<S: tracing::Subscriber> Layer<S> for Burst {
    fn on_record(&self, _: &Id, _: &span::Record<'_>, _: LayerContext<'_, S>) {
        self.at(Site::Record);
    }

    fn on_event(&self, _: &tracing::Event<'_>, _: LayerContext<'_, S>) {
        self.at(Site::Event);
    }

    fn on_enter(&self, _: &Id, _: LayerContext<'_, S>) {
        self.at(Site::Enter);
    }

    fn on_exit(&self, _: &Id, _: LayerContext<'_, S>) {
        self.at(Site::Exit);
    }

    fn on_close(&self, _: Id, _: LayerContext<'_, S>) {
        self.at(Site::Close);
    }
}

fn span_of(_: &Fate) -> tracing::Span {
    tracing::info_span!("process", error.type = tracing::field::Empty, otel.status_code = tracing::field::Empty)
}

/// How a caller waits for a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Caller {
    Waits,
    /// Before the first poll.
    Drops,
    /// After the first poll.
    DropsLater,
    Detaches,
}

const CALLERS: [Caller; 4] = [
    Caller::Waits,
    Caller::Drops,
    Caller::DropsLater,
    Caller::Detaches,
];

const FATES: [(Fate, OutcomeKind); 7] = [
    (Fate::Value, OutcomeKind::Completed),
    (Fate::Error, OutcomeKind::Failed),
    (Fate::PanicInCall, OutcomeKind::Panicked),
    (Fate::PanicLater, OutcomeKind::Panicked),
    (Fate::PanicInDrop, OutcomeKind::TimedOut),
    (Fate::Hang, OutcomeKind::TimedOut),
    (Fate::CancelsItself, OutcomeKind::Cancelled),
];

/// Runs a job by a caller, and returns the kinds that the policy was told.
async fn run(layer: SentinelLayer<crate::support::Script>, fate: Fate, caller: Caller) {
    let on_drop = match caller {
        Caller::Detaches => OnDrop::Detach,
        _ => OnDrop::Abort,
    };
    let layer = layer.on_drop(on_drop).timeout(10 * WORK);
    let mut sentinel = layer.make_span(span_of).layer(Worker::default());
    let response = sentinel.ready().await.unwrap().call(Work::new(fate));
    // On a task of its own, as a panic on it is what must not be.
    let calling = tokio::spawn(async move {
        let mut response = pin!(response);
        match caller {
            Caller::Waits => drop(response.await),
            Caller::Drops => {}
            Caller::DropsLater | Caller::Detaches => {
                let polled = poll_fn(|cx| Poll::Ready(response.as_mut().poll(cx).is_ready()));
                polled.await;
            }
        }
    });
    calling.await.expect("no panic on the caller's task");
}

#[tokio::test(start_paused = true)]
async fn g1_a_subscriber_that_panics_costs_no_policy_call() {
    let mut cells = 0;
    for site in SITES {
        for (fate, kind) in FATES {
            for caller in CALLERS {
                let cell = format!("[{site:?} × {fate:?} × {caller:?}]");
                let burst = Burst::new(site);
                let guard = burst.start();
                let recorder = Recorder::default();
                burst.arm();
                run(SentinelLayer::new(recorder.policy()), fate, caller).await;
                idle(&Handle::current()).await;
                burst.disarm();
                drop(guard);
                let reports = recorder.reports();
                assert_eq!(reports.len(), 1, "{cell}");
                let dropped = matches!(caller, Caller::Drops | Caller::DropsLater);
                match dropped && fate != Fate::PanicInCall {
                    // It never began, or was stopped.
                    true => assert_eq!(reports[0].kind, OutcomeKind::Cancelled, "{cell}"),
                    false if dropped => {}
                    false => assert_eq!(reports[0].kind, kind, "{cell}"),
                }
                let events_only = site == Site::Event && kind == OutcomeKind::Completed;
                if !events_only && caller == Caller::Waits && site != Site::Record {
                    assert!(burst.panics.load(Ordering::SeqCst) > 0, "{cell}");
                }
                cells += 1;
            }
        }
    }
    assert_eq!(cells, 6 * 7 * 4);
}

#[test]
fn a_subscriber_that_panics_at_the_end_of_all_runtimes_ends_no_process() {
    for site in SITES {
        let burst = Burst::new(site);
        let _guard = burst.start();
        let recorder = Recorder::default();
        let runtime = crate::support::current_thread();
        let response = runtime.block_on(async {
            let layer = SentinelLayer::new(recorder.policy());
            let mut sentinel = layer.make_span(span_of).layer(Worker::default());
            let call = sentinel.ready().await.unwrap().call(Work::new(Fate::Hang));
            Some(call)
        });
        burst.arm();
        drop(runtime);
        // Nobody is left to settle it: it is lost, with an event.
        drop(response);
        burst.disarm();
        assert!(recorder.reports().is_empty(), "{site:?}");
        assert!(
            burst.panics.load(Ordering::SeqCst) > 0 || site == Site::Record,
            "{site:?}"
        );
    }
}

// === a tag of a broker ===

/// A tag whose `Debug`, and whose error's `Display`, panic.
#[derive(Clone)]
struct Tag {
    fails: Arc<AtomicUsize>,
    told: Arc<AtomicUsize>,
    lost_after: Option<usize>,
    kept: Arc<AtomicUsize>,
    /// The next one to be dropped panics.
    explodes: Arc<AtomicBool>,
}

impl Drop for Tag {
    fn drop(&mut self) {
        if self.explodes.swap(false, Ordering::SeqCst) {
            raise("in the tag's destructor");
        }
    }
}

impl Tag {
    fn new(fails: usize) -> Self {
        Self {
            fails: Arc::new(fails.into()),
            told: Arc::default(),
            lost_after: None,
            kept: Arc::default(),
            explodes: Arc::default(),
        }
    }
}

impl fmt::Debug for Tag {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        raise("in the tag's Debug")
    }
}

#[derive(Debug)]
struct Unprintable;

impl fmt::Display for Unprintable {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        raise("in the error's Display")
    }
}

impl std::error::Error for Unprintable {}

impl Drop for Unprintable {
    fn drop(&mut self) {
        raise("in the error's destructor");
    }
}

impl Settle for Tag {
    type Error = Unprintable;
    type Future = std::future::Ready<Result<(), Unsettled<Self, Unprintable>>>;

    fn settle(self, _: Verdict, _: Reason) -> Self::Future {
        let left = self.fails.load(Ordering::SeqCst);
        std::future::ready(if left == 0 {
            self.told.fetch_add(1, Ordering::SeqCst);
            Ok(())
        } else {
            self.fails.store(left - 1, Ordering::SeqCst);
            Err(Unsettled::again(self, Unprintable))
        })
    }

    async fn keep_alive(&self) -> Result<Lease, Unprintable> {
        let kept = self.kept.fetch_add(1, Ordering::SeqCst);
        match self.lost_after {
            Some(after) if kept >= after => {
                self.explodes.store(true, Ordering::SeqCst);
                Ok(Lease::Lost)
            }
            Some(_) => Ok(Lease::Held),
            None => Err(Unprintable),
        }
    }

    fn deliveries(&self) -> Option<u32> {
        None
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::none().keep_alive()
    }
}

struct Delivery(Tag);

impl Job for Delivery {
    type Tag = Tag;

    fn tag(&self) -> Tag {
        self.0.clone()
    }
}

#[tokio::test(start_paused = true)]
async fn a_settlement_is_tried_again_though_its_event_panics() {
    for site in SITES {
        let burst = Burst::new(site);
        let guard = burst.start();
        let tag = Tag::new(2);
        let policy = SettlePolicy::new(ack_on_success());
        let mut sentinel = SentinelLayer::new(policy)
            .process_span()
            .layer(service_fn(async |_: Delivery| Ok::<_, Refused>(())));
        burst.arm();
        let settled = sentinel.ready().await.unwrap().call(Delivery(tag.clone()));
        let settled = settled.await;
        burst.disarm();
        drop(guard);
        assert_eq!(settled.unwrap().verdict, Verdict::Ack, "{site:?}");
        assert_eq!(tag.told.load(Ordering::SeqCst), 1, "{site:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_settlement_is_tried_again_though_its_error_can_not_be_printed() {
    let (log, guard) = Log::start();
    let tag = Tag::new(2);
    let policy = SettlePolicy::new(ack_on_success());
    let report = Report::new(tag.clone(), Outcome::<_, Refused>::Completed(()), WORK);
    let settled = policy.oneshot(report).await;
    drop(guard);
    assert_eq!(settled.unwrap().verdict, Verdict::Ack);
    assert_eq!(tag.told.load(Ordering::SeqCst), 1);
    let lines = log.lines();
    let told = "the error cannot be printed: in the error's Display";
    assert!(lines.iter().all(|line| line.contains(told)), "{lines:?}");
}

#[tokio::test(start_paused = true)]
async fn a_lost_lease_cancels_its_job_though_the_event_panics() {
    let burst = Burst::new(Site::Event);
    let _guard = burst.start();
    let mut tag = Tag::new(0);
    tag.lost_after = Some(2);
    let exploded = Arc::clone(&tag.explodes);
    let policy = service_fn(async |report: Report<Tag, (), Refused>| {
        Ok::<_, Refused>(match report.outcome {
            Outcome::Cancelled(cancelled) => Some(cancelled.reason()),
            _ => None,
        })
    });
    let mut sentinel = ServiceBuilder::new()
        .layer(SentinelLayer::new(policy).no_timeout())
        .layer(KeepAliveLayer::new(Duration::from_secs(1)))
        .service_fn(async |_: Delivery| {
            pending::<()>().await;
            Ok::<_, Refused>(())
        });
    burst.arm();
    let reason = sentinel.ready().await.unwrap().call(Delivery(tag)).await;
    assert_eq!(reason.unwrap(), Some(CancelReason::LeaseLost));
    assert!(!exploded.load(Ordering::SeqCst), "by the ticker");
    assert!(burst.panics.load(Ordering::SeqCst) > 0);
}

#[tokio::test(start_paused = true)]
async fn a_keep_alive_goes_on_though_its_failure_can_not_be_told() {
    let burst = Burst::new(Site::Event);
    let _guard = burst.start();
    let tag = Tag::new(0);
    let policy = service_fn(async |_: Report<Tag, (), Refused>| Ok::<_, Refused>(()));
    let mut sentinel = ServiceBuilder::new()
        .layer(SentinelLayer::new(policy).no_timeout())
        .layer(KeepAliveLayer::new(Duration::from_secs(1)))
        .service_fn(async |_: Delivery| {
            sleep(Duration::from_secs(30)).await;
            Ok::<_, Refused>(())
        });
    burst.arm();
    let call = sentinel.ready().await.unwrap().call(Delivery(tag.clone()));
    call.await.unwrap();
    assert!(tag.kept.load(Ordering::SeqCst) > 20);
}

#[tokio::test(start_paused = true)]
async fn an_intensity_resumes_for_all_though_its_events_panic() {
    let burst = Burst::new(Site::Event);
    let _guard = burst.start();
    let fails = Arc::new(AtomicBool::new(true));
    let failing = Arc::clone(&fails);
    let layer = IntensityLayer::new().minimum_sample(1).pause(WORK..=WORK);
    let state = layer.watch();
    let service = layer.layer(service_fn(move |()| {
        let fails = failing.load(Ordering::SeqCst);
        async move {
            sleep(WORK).await;
            match fails {
                true => Err(Refused),
                false => Ok(()),
            }
        }
    }));
    burst.arm();
    let mut first = service.clone();
    while *state.borrow() == IntensityState::Running {
        first.ready().await.unwrap().call(()).await.ok();
    }
    fails.store(false, Ordering::SeqCst);
    // All of them wait for the probe of one.
    let others: Vec<_> = (0..4)
        .map(|_| {
            let mut service = service.clone();
            tokio::spawn(async move { service.ready().await.unwrap().call(()).await })
        })
        .collect();
    for other in others {
        assert_eq!(other.await.unwrap(), Ok(()));
    }
    assert!(burst.panics.load(Ordering::SeqCst) >= 3);
}

#[tokio::test(start_paused = true)]
async fn a_consumer_whose_events_panic_consumes_to_the_end() {
    let burst = Burst::new(Site::Event);
    let _guard = burst.start();
    let broker = Broker::new();
    let queue = broker.queue("jobs").declare();
    (0..20).for_each(|job: u32| queue.publish(job));
    let shutdown = CancellationToken::new();
    let service = ServiceBuilder::new()
        .concurrency_limit(2)
        .layer(SentinelLayer::new(SettlePolicy::new(ack_on_success())).shutdown(shutdown.clone()))
        .service_fn(async |_| Ok::<_, Refused>(()));
    burst.arm();
    let emptied = queue.clone();
    let consumer = Consumer::new(queue.subscribe(2).unwrap(), service)
        .shutdown(shutdown)
        .with_graceful_shutdown(async move { emptied.emptied().await });
    let summary = consumer.into_future().await.unwrap();
    assert_eq!((summary.answered, queue.counts().acked), (20, 20));
    assert!(burst.panics.load(Ordering::SeqCst) > 0);
}

// === wakers ===

/// A waker of a job's own that panics.
pub(crate) struct BadWaker;

impl Wake for BadWaker {
    fn wake(self: Arc<Self>) {
        raise("in a waker");
    }
}

#[tokio::test(start_paused = true)]
async fn g1_a_waker_of_the_jobs_own_that_panics_costs_no_policy_call() {
    for caller in CALLERS {
        let recorder = Recorder::default();
        let shutdown = CancellationToken::new();
        let job = service_fn(async |_: Arc<()>| {
            let mut told = pin!(cancelled());
            let waker = Waker::from(Arc::new(BadWaker));
            let _ = told.as_mut().poll(&mut Context::from_waker(&waker));
            pending::<Result<(), Refused>>().await
        });
        let on_drop = match caller {
            Caller::Detaches => OnDrop::Detach,
            _ => OnDrop::Abort,
        };
        let mut sentinel = SentinelLayer::new(recorder.scripted(Plan::Ok, Duration::ZERO))
            .timeout(WORK)
            .on_drop(on_drop)
            .shutdown(shutdown)
            .layer(job);
        let response = sentinel.ready().await.unwrap().call(Arc::new(()));
        let calling = tokio::spawn(async move {
            let mut response = pin!(response);
            if caller == Caller::Waits {
                return response
                    .await
                    .map(drop)
                    .map_err(|error| Answer::from(&error));
            }
            if caller != Caller::Drops {
                let first = poll_fn(|cx| Poll::Ready(response.as_mut().poll(cx).is_ready()));
                assert!(!first.await);
            }
            // The job is polled, and its waker known.
            sleep(WORK / 2).await;
            Ok(())
        });
        let answer = calling.await.expect("no panic on the caller's task");
        assert_eq!(answer, Ok(()), "{caller:?}");
        idle(&Handle::current()).await;
        let reports = recorder.reports();
        assert_eq!(reports.len(), 1, "{caller:?}");
        assert_eq!(reports[0].stopped, Some(true), "{caller:?}");
    }
}

/// Panics when it is woken for the job's own request.
#[tokio::test(start_paused = true)]
async fn a_callers_waker_that_panics_does_not_reach_the_job() {
    let recorder = Recorder::default();
    let job = service_fn(async |_: Arc<()>| {
        sleep(WORK).await;
        Cancellation::current().cancel(CancelReason::Requested);
        pending::<Result<(), Refused>>().await
    });
    let mut sentinel = SentinelLayer::new(recorder.policy()).layer(job);
    let response = sentinel.ready().await.unwrap().call(Arc::new(()));
    let mut response = Box::pin(response);
    let waker = Waker::from(Arc::new(BadWaker));
    assert!(
        response
            .as_mut()
            .poll(&mut Context::from_waker(&waker))
            .is_pending()
    );
    let started = Instant::now();
    sleep(2 * WORK).await;
    response.await.unwrap();
    assert_eq!(started.elapsed(), 2 * WORK);
    let [report] = recorder.reports()[..] else {
        panic!("one report");
    };
    assert_eq!(report.reason, Some(CancelReason::Requested));
    assert!(!report.panic);
}

// === recorders ===

#[cfg(feature = "metrics")]
mod recorders {
    use metrics::{
        Counter, CounterFn, Gauge, GaugeFn, Histogram, HistogramFn, Key, KeyName, Metadata,
        SharedString, Unit,
    };

    use super::*;

    /// A recorder all of whose instruments panic.
    struct BadRecorder;

    struct BadInstrument;

    impl CounterFn for BadInstrument {
        fn increment(&self, _: u64) {
            raise("in a counter")
        }

        fn absolute(&self, _: u64) {
            raise("in a counter")
        }
    }

    impl GaugeFn for BadInstrument {
        fn increment(&self, _: f64) {
            raise("in a gauge")
        }

        fn decrement(&self, _: f64) {
            raise("in a gauge")
        }

        fn set(&self, _: f64) {
            raise("in a gauge")
        }
    }

    impl HistogramFn for BadInstrument {
        fn record(&self, _: f64) {
            raise("in a histogram")
        }
    }

    impl metrics::Recorder for BadRecorder {
        fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

        fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

        fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

        fn register_counter(&self, _: &Key, _: &Metadata<'_>) -> Counter {
            Counter::from_arc(Arc::new(BadInstrument))
        }

        fn register_gauge(&self, _: &Key, _: &Metadata<'_>) -> Gauge {
            Gauge::from_arc(Arc::new(BadInstrument))
        }

        fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
            Histogram::from_arc(Arc::new(BadInstrument))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn g1_a_recorder_that_panics_costs_no_policy_call() {
        let _guard = metrics::set_default_local_recorder(&BadRecorder);
        for (fate, kind) in FATES {
            for caller in CALLERS {
                let recorder = Recorder::default();
                run(SentinelLayer::new(recorder.policy()), fate, caller).await;
                idle(&Handle::current()).await;
                let reports = recorder.reports();
                assert_eq!(reports.len(), 1, "{fate:?} × {caller:?}");
                if matches!(caller, Caller::Waits | Caller::Detaches) {
                    assert_eq!(reports[0].kind, kind, "{fate:?} × {caller:?}");
                }
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_recorder_that_panics_costs_no_settlement() {
        let _guard = metrics::set_default_local_recorder(&BadRecorder);
        let tag = Tag::new(1);
        let mut sentinel = SentinelLayer::new(SettlePolicy::new(ack_on_success()))
            .layer(service_fn(async |_: Delivery| Ok::<_, Refused>(())));
        let call = sentinel.ready().await.unwrap().call(Delivery(tag.clone()));
        assert_eq!(call.await.unwrap().verdict, Verdict::Ack);
        assert_eq!(tag.told.load(Ordering::SeqCst), 1);
    }
}
