//! Counts and measurements: for every fate of a job, and down to zero afterwards.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    future::{pending, ready},
    time::Duration,
};

use futures_util::FutureExt;
use metrics::Label;
use metrics_exporter_prometheus::PrometheusBuilder;
use metrics_util::{
    MetricKind,
    debugging::{DebugValue, DebuggingRecorder, Snapshotter},
};
use tokio::time::sleep;
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_sentinel::{
    IntensityLayer, Job, SentinelLayer, SettlePolicy, TimeLimit, ack_on_success,
    outcome::OutcomeKind, settle::Unsettled,
};

use crate::support::{
    Blocked, Fate, Plan, Recorder, Refused, WORK, Work, Worker, call, current_thread, idle, raise,
    tag::Tag,
};

/// The values by name and labels; a histogram's is its samples.
type Values = BTreeMap<String, Vec<f64>>;

struct Metrics {
    snapshotter: Snapshotter,
    /// A snapshot takes the gauges away as well: each is the sum of its snapshots.
    gauges: RefCell<BTreeMap<String, f64>>,
}

impl Metrics {
    /// Records on this thread, which is the only one of these runtimes.
    fn start() -> (Self, metrics::LocalRecorderGuard<'static>) {
        let recorder: &'static DebuggingRecorder = Box::leak(Box::default());
        let guard = metrics::set_default_local_recorder(recorder);
        let metrics = Self {
            snapshotter: recorder.snapshotter(),
            gauges: RefCell::default(),
        };
        (metrics, guard)
    }

    /// Returns the gauges, and the counts and samples since the last time.
    fn take(&self) -> Values {
        let mut values = Values::new();
        for (key, _, _, value) in self.snapshotter.snapshot().into_vec() {
            let (kind, key) = key.into_parts();
            let mut name = key.name().to_owned();
            for label in key.labels() {
                name += &format!(" {}={}", label.key(), label.value());
            }
            let value = match value {
                DebugValue::Counter(0) => continue,
                DebugValue::Counter(count) => vec![count as f64],
                DebugValue::Gauge(change) => {
                    let mut gauges = self.gauges.borrow_mut();
                    let gauge = gauges.entry(name.clone()).or_default();
                    *gauge += change.into_inner();
                    vec![*gauge]
                }
                DebugValue::Histogram(samples) => {
                    samples.into_iter().map(|it| it.into_inner()).collect()
                }
            };
            if kind == MetricKind::Histogram && value.is_empty() {
                continue;
            }
            values.insert(name, value);
        }
        values
    }
}

fn gauges(running: f64, unsettled: f64, abandoned: f64) -> Values {
    let gauges = [
        ("tower_sentinel.running", running),
        ("tower_sentinel.unsettled", unsettled),
        ("tower_sentinel.abandoned", abandoned),
    ];
    gauges.map(|(name, it)| (name.to_owned(), vec![it])).into()
}

fn gauges_of(values: Values) -> Values {
    let is_gauge = |name: &str| gauges(0.0, 0.0, 0.0).contains_key(name);
    values.into_iter().filter(|(it, _)| is_gauge(it)).collect()
}

#[tokio::test(start_paused = true)]
async fn each_outcome_is_counted_once_and_the_gauges_return_to_zero() {
    let table = [
        (Fate::Value, OutcomeKind::Completed, 1.0),
        (Fate::Error, OutcomeKind::Failed, 1.0),
        (Fate::PanicLater, OutcomeKind::Panicked, 1.0),
        (Fate::PanicInCall, OutcomeKind::Panicked, 0.0),
        (Fate::Hang, OutcomeKind::TimedOut, 10.0),
        (Fate::CancelsItself, OutcomeKind::Cancelled, 1.0),
    ];
    for plan in [Plan::Ok, Plan::Error, Plan::PanicInCall, Plan::Hang] {
        for (fate, kind, seconds) in table {
            let (metrics, _guard) = Metrics::start();
            let recorder = Recorder::default();
            let mut sentinel = SentinelLayer::new(recorder.scripted(plan, Duration::ZERO))
                .timeout(10 * WORK)
                .layer(Worker::default());
            call(&mut sentinel, Work::new(fate)).await.ok();
            let mut expected = gauges(0.0, 0.0, 0.0);
            expected.extend([
                ("messaging.client.consumed.messages".to_owned(), vec![1.0]),
                (format!("tower_sentinel.outcomes outcome={kind}"), vec![1.0]),
                (
                    format!("messaging.process.duration outcome={kind}"),
                    vec![seconds],
                ),
            ]);
            assert_eq!(metrics.take(), expected, "{fate:?}, {plan:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn the_gauges_follow_a_job_whose_caller_is_gone() {
    let (metrics, _guard) = Metrics::start();
    let recorder = Recorder::default();
    let mut sentinel = SentinelLayer::new(recorder.scripted(Plan::Ok, 5 * WORK))
        .on_drop(tower_sentinel::sentinel::OnDrop::Detach)
        .layer(Worker::default());
    let response = sentinel.call(Work::new(Fate::Value));
    assert_eq!(gauges_of(metrics.take()), gauges(1.0, 0.0, 0.0));
    drop(response);
    sleep(WORK / 2).await;
    assert_eq!(gauges_of(metrics.take()), gauges(1.0, 0.0, 0.0));
    sleep(WORK).await;
    assert_eq!(gauges_of(metrics.take()), gauges(0.0, 1.0, 0.0));
    sleep(5 * WORK).await;
    assert_eq!(gauges_of(metrics.take()), gauges(0.0, 0.0, 0.0));
}

#[test]
fn a_job_that_does_not_stop_is_abandoned_until_it_does() {
    let (metrics, _guard) = Metrics::start();
    let jobs = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let runtime = current_thread();
    let thread = Blocked::until_released();
    runtime.block_on(async {
        let worker = Worker {
            thread: thread.clone(),
        };
        let mut sentinel = SentinelLayer::new(Recorder::default().policy())
            .stop_wait(Duration::ZERO)
            .runtime(jobs.handle().clone())
            .layer(worker);
        let mut job = Work::new(Fate::BlockFirst);
        job.limit = TimeLimit::After(Duration::from_millis(50));
        call(&mut sentinel, job).await.unwrap();
        assert_eq!(gauges_of(metrics.take()), gauges(0.0, 0.0, 1.0));
        thread.release();
        idle(jobs.handle()).await;
        idle(&tokio::runtime::Handle::current()).await;
        assert_eq!(gauges_of(metrics.take()), gauges(0.0, 0.0, 0.0));
    });
}

// === settlements ===

struct Delivery(Fate, Tag);

impl Job for Delivery {
    type Tag = Tag;

    fn tag(&self) -> Tag {
        self.1.clone()
    }
}

async fn process(Delivery(fate, _): Delivery) -> Result<(), Refused> {
    match fate {
        Fate::Value => Ok(()),
        Fate::Error => Err(Refused),
        Fate::Hang => pending().await,
        _ => raise("poison"),
    }
}

#[tokio::test(start_paused = true)]
async fn each_verdict_that_the_broker_was_told_is_counted_and_timed() {
    let labels = [("messaging.destination.name", "orders")];
    let quick = Tag::new().settling(|_| sleep(Duration::from_secs(2)).map(Ok));
    let failing = Tag::new().failing(|_| Unsettled::last(Refused));
    let table = [
        (Fate::Value, quick.clone(), Some("ack")),
        (Fate::Error, quick.clone(), Some("retry")),
        (Fate::PanicFirst, quick, Some("retry")),
        // The broker got no settlement.
        (Fate::Value, failing, None),
    ];
    for (fate, tag, verdict) in table {
        let (metrics, _guard) = Metrics::start();
        let policy = SettlePolicy::new(ack_on_success()).metric_labels(labels);
        let mut sentinel = SentinelLayer::new(policy)
            .metric_labels(labels)
            .layer(service_fn(process));
        call(&mut sentinel, Delivery(fate, tag)).await.ok();
        let values = metrics.take();
        // Nothing is left of the labels that there were before.
        for (key, ..) in metrics.snapshotter.snapshot().into_vec() {
            let mut labels = key.key().labels().map(Label::value);
            assert!(labels.any(|it| it == "orders"), "{key:?}");
        }
        let of_settling: Values = values
            .into_iter()
            .filter(|(name, _)| name.contains("messaging.operation.name"))
            .collect();
        let mut expected = Values::new();
        if let Some(verdict) = verdict {
            let of = |name| {
                format!(
                    "{name} messaging.destination.name=orders messaging.operation.name={verdict}"
                )
            };
            expected.insert(of("tower_sentinel.verdicts"), vec![1.0]);
            expected.insert(of("messaging.client.operation.duration"), vec![2.0]);
        }
        assert_eq!(of_settling, expected, "{fate:?}");
    }
}

// === intensity ===

#[tokio::test(start_paused = true)]
async fn the_state_of_an_intensity_layer_is_a_gauge() {
    const PAUSE: Duration = Duration::from_secs(1);
    // The other recorder adds up the values that a gauge is set to.
    let recorder = PrometheusBuilder::new().build_recorder();
    let text = recorder.handle();
    let _guard = metrics::set_default_local_recorder(&recorder);
    // A setting after the labels keeps them, and none leaves a gauge behind.
    let layer = IntensityLayer::new()
        .minimum_sample(1)
        .metric_labels([("messaging.destination.name", "orders")])
        .pause(PAUSE..=PAUSE);
    assert_eq!(text.render(), "");
    let mut service = layer.layer(service_fn(|fate: Fate| async move {
        match fate {
            Fate::Error => Err(Refused),
            _ => Ok(()),
        }
    }));
    // As a consumer does when it reconnects.
    let again = layer.layer(());
    let state = || {
        let text = text.render();
        let lines = text
            .lines()
            .filter(|it| !it.starts_with('#') && !it.is_empty());
        lines.map(ToOwned::to_owned).collect::<Vec<_>>()
    };
    let is = |value: u32| {
        let name = "tower_sentinel_intensity_state";
        [format!(
            "{name}{{messaging_destination_name=\"orders\"}} {value}"
        )]
    };
    let (running, probing, paused) = (0, 1, 2);
    assert_eq!(state(), is(running));
    service.ready().await.unwrap();
    service.call(Fate::Error).await.unwrap_err();
    assert_eq!(state(), is(paused));
    service.ready().await.unwrap();
    assert_eq!(state(), is(probing));
    service.call(Fate::Error).await.unwrap_err();
    assert_eq!(state(), is(paused));
    service.ready().await.unwrap();
    assert_eq!(state(), is(probing));
    // A service that is made now does not say that all is well.
    drop((again, layer.layer(())));
    assert_eq!(state(), is(probing));
    service.call(Fate::Value).await.unwrap();
    assert_eq!(state(), is(running));
}

#[tokio::test]
async fn every_metric_is_described() {
    let (metrics, _guard) = Metrics::start();
    let policy = SettlePolicy::new(ack_on_success());
    let service = service_fn(|_: Delivery| ready(Ok::<_, Refused>(())));
    let service = IntensityLayer::new().layer(service);
    let mut sentinel = SentinelLayer::new(policy).layer(service);
    let job = Delivery(Fate::Value, Tag::new());
    call(&mut sentinel, job).await.unwrap();
    tower_sentinel::telemetry::describe_metrics();
    let all = metrics.snapshotter.snapshot().into_vec();
    assert_eq!(all.len(), 4 + 4 * 5 + 1);
    for (key, unit, description, _) in all {
        assert!(unit.is_some() && description.is_some(), "{key:?}");
    }
}
