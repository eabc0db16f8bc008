//! Counts and measurements: for every fate of a job, and down to zero afterwards.

use std::{
    any::type_name,
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    future::{Ready, pending, ready},
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, SystemTime},
};

use futures_util::FutureExt;
use metrics::Label;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder};
use metrics_util::{
    MetricKind,
    debugging::{DebugValue, DebuggingRecorder, Snapshotter},
};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tower::{Layer, Service, ServiceBuilder, ServiceExt, service_fn};
use tower_sentinel::{
    Consumer, IntensityLayer, Job, Report, SentinelLayer, SettlePolicy, TimeLimit, Verdict,
    ack_on_success,
    broker::memory::{self, Broker},
    consumer::Escalation,
    outcome::OutcomeKind,
    settle::{Messaging, Settle, Settled, Unsettled},
    telemetry::DURATION_BUCKETS,
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
            let error_type = match kind {
                OutcomeKind::Failed => Some(type_name::<Refused>()),
                OutcomeKind::Panicked => Some("panic"),
                OutcomeKind::TimedOut => Some("timeout"),
                OutcomeKind::Completed | OutcomeKind::Cancelled => None,
            };
            let mut expected = gauges(0.0, 0.0, 0.0);
            expected.extend([
                (
                    "messaging.client.consumed.messages messaging.operation.name=consume"
                        .to_owned(),
                    vec![1.0],
                ),
                (format!("tower_sentinel.outcomes outcome={kind}"), vec![1.0]),
                (
                    format!(
                        "messaging.process.duration outcome={kind} \
                         messaging.operation.name=process{}",
                        error_type.map_or_else(String::new, |it| format!(" error.type={it}"))
                    ),
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

    fn messaging(&self) -> Option<Messaging<'_>> {
        Settle::messaging(&self.1)
    }

    fn queued_since(&self) -> Option<SystemTime> {
        Settle::published_at(&self.1)
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

/// Returns the values of the metrics of a policy, by their names and labels without `common`.
fn of_policy(values: Values, common: &str) -> Values {
    let names = [
        "tower_sentinel.verdicts",
        "tower_sentinel.moot",
        "messaging.client.operation.duration",
    ];
    let is_of_policy = |name: &str| names.iter().any(|it| name.starts_with(it));
    let values = values.into_iter().filter(|(name, _)| is_of_policy(name));
    values
        .map(|(name, value)| (name.replacen(common, "", 1), value))
        .collect()
}

const DURATION: &str = "messaging.client.operation.duration";

#[tokio::test(start_paused = true)]
async fn each_verdict_that_the_broker_was_told_is_counted_and_each_settlement_is_timed() {
    const TWO: Duration = Duration::from_secs(2);
    let labels = [("messaging.destination.name", "orders")];
    let refused = type_name::<Refused>();
    let quick = Tag::new().settling(|_| sleep(TWO).map(Ok));
    let failing = |failure: fn() -> Unsettled<Tag, Refused>| {
        Tag::new().settling(move |_| sleep(TWO).map(move |()| Err(failure())))
    };
    let failed = failing(|| Unsettled::last(Refused));
    let misconfigured = failing(|| Unsettled::misconfigured(Refused));
    let moot = failing(|| Unsettled::moot(Refused));
    let hanging = Tag::new().settling(|_| pending());
    let panicking = Tag::new().settling(|_| sleep(TWO).map(|()| raise("poison")));
    let panicking_at_once = Tag::new().settling(|_| -> Ready<_> { raise("poison") });
    let table = [
        (Fate::Value, quick.clone(), "ack", Ok(()), 2.0),
        (Fate::Error, quick.clone(), "retry", Ok(()), 2.0),
        (Fate::PanicFirst, quick, "retry", Ok(()), 2.0),
        (Fate::Value, failed, "ack", Err(refused), 2.0),
        (Fate::Error, misconfigured, "retry", Err(refused), 2.0),
        (Fate::Value, moot, "ack", Err(refused), 2.0),
        (Fate::Value, panicking, "ack", Err("panic"), 2.0),
        (Fate::Value, panicking_at_once, "ack", Err("panic"), 0.0),
        (Fate::Error, hanging, "retry", Err("timeout"), 5.0),
    ];
    for (nth, (fate, tag, verdict, result, seconds)) in table.into_iter().enumerate() {
        let (metrics, _guard) = Metrics::start();
        let policy = SettlePolicy::new(ack_on_success()).metric_labels(labels);
        let mut sentinel = SentinelLayer::new(policy)
            .metric_labels(labels)
            .layer(service_fn(process));
        let settled = call(&mut sentinel, Delivery(fate, tag)).await;
        let is_moot = matches!(&settled, Err(error) if error.to_string().contains("any more"));
        let values = metrics.take();
        // Nothing is left of the labels that there were before.
        for (key, ..) in metrics.snapshotter.snapshot().into_vec() {
            let mut labels = key.key().labels().map(Label::value);
            assert!(labels.any(|it| it == "orders"), "{key:?}");
        }
        let mut name = format!(
            "{DURATION} messaging.operation.name={verdict} messaging.operation.type=settle"
        );
        let mut expected = Values::new();
        let mut count = |name: &str| {
            let name = format!("tower_sentinel.{name} messaging.operation.name={verdict}");
            expected.insert(name, vec![1.0]);
        };
        match result {
            Ok(()) => count("verdicts"),
            Err(error_type) => name += &format!(" error.type={error_type}"),
        }
        if is_moot {
            count("moot");
        }
        expected.insert(name, vec![seconds]);
        let found = of_policy(values, " messaging.destination.name=orders");
        assert_eq!(found, expected, "{nth}: {settled:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_settlement_that_the_sentinel_drops_is_a_failed_one() {
    const LIMIT: Duration = Duration::from_secs(3);
    let (metrics, _guard) = Metrics::start();
    let mut sentinel = SentinelLayer::new(SettlePolicy::new(ack_on_success()))
        .settle_timeout(LIMIT)
        .layer(service_fn(process));
    let hanging = Tag::new().settling(|_| pending());
    let error = call(&mut sentinel, Delivery(Fate::Value, hanging)).await;
    assert!(error.is_err());
    let name = format!(
        "{DURATION} messaging.operation.name=ack messaging.operation.type=settle error.type=dropped"
    );
    let expected = Values::from([(name, vec![LIMIT.as_secs_f64()])]);
    assert_eq!(of_policy(metrics.take(), ""), expected);
}

fn description() -> Option<Messaging<'static>> {
    let messaging = Messaging::new("rabbitmq", "events:order.paid:orders");
    Some(messaging.queue("orders").consumer_group("billing"))
}

/// Returns the labels of all metrics of a job, without those that differ between them.
async fn common_labels(tag: Tag, own: &[(&'static str, &'static str)]) -> BTreeSet<String> {
    let (metrics, _guard) = Metrics::start();
    let policy = SettlePolicy::new(ack_on_success()).metric_labels(own.iter().copied());
    let mut sentinel = SentinelLayer::new(policy)
        .metric_labels(own.iter().copied())
        .layer(service_fn(process));
    call(&mut sentinel, Delivery(Fate::Value, tag))
        .await
        .unwrap();
    let keys = metrics.snapshotter.snapshot().into_vec().into_iter();
    keys.map(|(key, ..)| {
        let labels = key.key().labels().filter(|label| {
            let of_one = ["outcome", "error.type"].contains(&label.key());
            !of_one && !label.key().starts_with("messaging.operation")
        });
        let labels = labels.map(|label| format!("{}={}", label.key(), label.value()));
        labels.collect::<Vec<_>>().join(" ")
    })
    .collect()
}

#[tokio::test]
async fn the_first_delivery_describes_the_metrics_unless_the_user_does() {
    let described = Tag::new().describing(description);
    let own = common_labels(described.clone(), &[]).await;
    let all = "messaging.system=rabbitmq messaging.destination.name=orders \
               messaging.consumer.group.name=billing";
    assert_eq!(Vec::from_iter(own), [all]);

    let labels = [("messaging.destination.name", "mine"), ("region", "eu")];
    let set = common_labels(described, &labels).await;
    let all = "messaging.destination.name=mine region=eu messaging.system=rabbitmq \
               messaging.consumer.group.name=billing";
    assert_eq!(Vec::from_iter(set), [all]);

    for silent in [Tag::new(), Tag::new().describing(|| raise("no name"))] {
        assert_eq!(Vec::from_iter(common_labels(silent, &[]).await), [""]);
    }
}

#[tokio::test]
async fn only_the_first_delivery_is_asked_for_its_description() {
    static ASKED: AtomicUsize = AtomicUsize::new(0);
    let (_metrics, _guard) = Metrics::start();
    // Spans ask, too.
    let _no_spans = tracing::subscriber::set_default(tracing::subscriber::NoSubscriber::new());
    let mut sentinel =
        SentinelLayer::new(SettlePolicy::new(ack_on_success())).layer(service_fn(process));
    let tag = Tag::new().describing(|| {
        ASKED.fetch_add(1, Ordering::Relaxed);
        description()
    });
    for _ in 0..5 {
        let job = Delivery(Fate::Value, tag.clone());
        call(&mut sentinel, job).await.unwrap();
    }
    // Once by the sentinel, once by the policy.
    assert_eq!(ASKED.load(Ordering::Relaxed), 2);
}

#[tokio::test(start_paused = true)]
async fn consumers_that_share_a_layer_have_their_own_labels() {
    let (metrics, _guard) = Metrics::start();
    let broker = Broker::new();
    let layer = SentinelLayer::new(SettlePolicy::new(ack_on_success()));
    for name in ["mails", "images"] {
        let queue = broker.queue(name).declare();
        queue.publish(7);
        let ended = queue.clone();
        let process = |_: memory::Delivery<u32>| ready(Ok::<_, Refused>(()));
        let consumer = Consumer::new(queue.subscribe(1).unwrap(), service_fn(process))
            .sentinel(layer.clone())
            .name(name)
            .with_graceful_shutdown(async move { ended.emptied().await });
        consumer.await.unwrap();
    }
    let values = metrics.take();
    for name in ["mails", "images"] {
        let labels = format!(
            "consumer.name={name} messaging.system=memory messaging.destination.name={name}"
        );
        for (metric, own) in [
            ("tower_sentinel.outcomes", "outcome=completed"),
            ("tower_sentinel.verdicts", "messaging.operation.name=ack"),
        ] {
            let found = values.get(&format!("{metric} {labels} {own}"));
            assert_eq!(found, Some(&vec![1.0]), "{metric} of {name}: {values:?}");
        }
    }
}

#[tokio::test]
async fn two_policies_of_one_sentinel_have_their_own_labels() {
    let (metrics, _guard) = Metrics::start();
    let policy = |class| SettlePolicy::new(ack_on_success()).metric_labels([("class", class)]);
    let (urgent, other) = (policy("urgent"), policy("other"));
    let policy =
        service_fn(
            move |report: Report<Tag, (), Refused>| match report.tag.deliveries() {
                Some(1) => urgent.clone().call(report),
                _ => other.clone().call(report),
            },
        );
    let mut sentinel = SentinelLayer::new(policy).layer(service_fn(process));
    for tag in [Tag::new(), Tag::new().delivered(1), Tag::new().delivered(1)] {
        call(&mut sentinel, Delivery(Fate::Value, tag))
            .await
            .unwrap();
    }
    let values = metrics.take();
    for (class, count) in [("urgent", 2.0), ("other", 1.0)] {
        let name = format!("tower_sentinel.verdicts class={class} messaging.operation.name=ack");
        assert_eq!(values.get(&name), Some(&vec![count]), "{values:?}");
    }
}

#[tokio::test]
async fn jobs_of_which_only_the_tag_is_read_have_no_labels_of_a_delivery() {
    let (metrics, _guard) = Metrics::start();
    let tag = |job: &Delivery| job.1.clone();
    let layer = SentinelLayer::with_tag(SettlePolicy::new(ack_on_success()), tag);
    let mut sentinel = layer.layer(service_fn(process));
    call(&mut sentinel, Delivery(Fate::Value, Tag::new()))
        .await
        .unwrap();
    let consumed = metrics.take().into_keys();
    let consumed = consumed.filter(|it| it.starts_with("messaging.client.consumed.messages"));
    assert_eq!(
        consumed.collect::<Vec<_>>(),
        ["messaging.client.consumed.messages messaging.operation.name=consume"]
    );
}

// === time in the queue ===

const QUEUE: &str = "tower_sentinel.queue.duration";

#[tokio::test]
async fn the_time_in_the_queue_is_measured_if_it_is_known() {
    const WAIT: Duration = Duration::from_secs(100);
    let now = SystemTime::now();
    let table = [
        (Tag::new().published(now - WAIT), Some(WAIT.as_secs_f64())),
        // The clock of the sender is ahead.
        (Tag::new().published(now + WAIT), Some(0.0)),
        (Tag::new(), None),
    ];
    for (tag, expected) in table {
        let (metrics, _guard) = Metrics::start();
        let policy = SettlePolicy::new(ack_on_success());
        // Another reader of the job passes the time on.
        let mut sentinel = SentinelLayer::new(policy)
            .delivery_limit(3)
            .layer(service_fn(process));
        call(&mut sentinel, Delivery(Fate::Value, tag))
            .await
            .unwrap();
        let found = metrics.take().remove(QUEUE);
        let rounded = found.map(|it| it.iter().map(|it| it.floor()).collect::<Vec<_>>());
        assert_eq!(rounded, expected.map(|it| vec![it]));
    }
}

#[tokio::test(start_paused = true)]
async fn the_time_in_the_queue_is_that_of_the_first_delivery() {
    let (metrics, _guard) = Metrics::start();
    let queue = Broker::new().queue("jobs").declare();
    for job in 0..2 {
        queue.publish(job);
    }
    sleep(Duration::from_secs(7)).await;
    let ended = queue.clone();
    // Another reader of the job passes the labels on.
    let layer = SentinelLayer::new(SettlePolicy::new(ack_on_success())).delivery_limit(3);
    let process = |job: memory::Delivery<u32>| async move {
        sleep(Duration::from_secs(2)).await;
        match *job.payload() == 0 && job.tag().deliveries() == Some(1) {
            true => Err(Refused),
            false => Ok(()),
        }
    };
    let summary = Consumer::new(queue.subscribe(1).unwrap(), service_fn(process))
        .sentinel(layer)
        .with_graceful_shutdown(async move { ended.emptied().await });
    assert_eq!(summary.await.unwrap().called, 3);
    let labels = "messaging.system=memory messaging.destination.name=jobs";
    let found = metrics.take().remove(&format!("{QUEUE} {labels}")).unwrap();
    let mut seconds: Vec<_> = found.iter().map(|it| it.round()).collect();
    seconds.sort_by(f64::total_cmp);
    // The retry is done before the second job, which waits for two runs.
    assert_eq!(seconds, [7.0, 11.0]);
}

// === consumers ===

/// The gauges of a worker, apart from the intensity's.
fn worker_gauges(values: Values) -> BTreeMap<String, f64> {
    let names = ["connected", "running", "unsettled", "abandoned"];
    let values = values.into_iter().filter_map(|(name, values)| {
        let name = name.strip_prefix("tower_sentinel.")?;
        let name = name.split(' ').next()?.to_owned();
        names.contains(&&*name).then(|| (name, values[0]))
    });
    values.collect()
}

const RECONNECTS: &str = "tower_sentinel.reconnects consumer.name=orders";

#[tokio::test(start_paused = true)]
async fn a_consumer_is_connected_while_it_has_a_subscription_and_counts_its_reconnects() {
    const SECOND: Duration = Duration::from_secs(1);
    let (metrics, _guard) = Metrics::start();
    let broker = Broker::<u32>::new();
    let queue = broker.queue("jobs").declare();
    let server = broker.clone();
    let connect = move || ready(server.connect().and_then(|it| it.subscribe(&queue, 1)));
    let layer = SentinelLayer::new(SettlePolicy::new(ack_on_success()));
    let process = |_: memory::Delivery<u32>| ready(Ok::<_, Refused>(()));
    let consumer = Consumer::reconnecting(connect, move |_| service_fn(process))
        .sentinel(layer)
        .name("orders")
        .backoff(SECOND..=SECOND)
        .random(|| 1.0)
        .with_graceful_shutdown(sleep(10 * SECOND));
    let consumer = tokio::spawn(consumer.run());
    let connected = "tower_sentinel.connected consumer.name=orders";
    let now = |connected_now: f64, reconnects: Option<f64>| {
        let mut values = metrics.take();
        assert_eq!(values.remove(connected), Some(vec![connected_now]));
        assert_eq!(values.remove(RECONNECTS), reconnects.map(|it| vec![it]));
    };
    sleep(5 * SECOND / 2).await;
    now(1.0, None);
    // After the loss of the session two attempts fail.
    broker.refuse_connections(2);
    broker.drop_connections();
    sleep(SECOND / 2).await;
    now(0.0, None);
    sleep(2 * SECOND).await;
    now(0.0, Some(2.0));
    sleep(SECOND).await;
    now(1.0, Some(1.0));
    consumer.await.unwrap().unwrap();
    now(0.0, None);
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Requested,
    FutureDropped,
    TaskAborted,
    ConnectionLost,
    Panic,
    RuntimeGone,
}

#[test]
fn the_gauges_return_to_zero_after_every_end_of_a_consumer() {
    const SECOND: Duration = Duration::from_secs(1);
    const LONG: Duration = Duration::from_secs(100);
    for end in [
        End::Requested,
        End::FutureDropped,
        End::TaskAborted,
        End::ConnectionLost,
        End::Panic,
        End::RuntimeGone,
    ] {
        let (metrics, _guard) = Metrics::start();
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_time().start_paused(true).build().unwrap();
        let left = runtime.block_on(async {
            let broker = Broker::new();
            let queue = broker.queue("jobs").declare();
            (0..2).for_each(|job| queue.publish(job));
            let shutdown = CancellationToken::new();
            let layer = SentinelLayer::new(SettlePolicy::new(ack_on_success()))
                .no_timeout()
                .shutdown(shutdown.clone());
            let service = ServiceBuilder::new()
                .map_response(|settled: Settled| match settled.verdict {
                    Verdict::Ack => raise("in the middleware"),
                    _ => settled,
                })
                .layer(layer)
                .service_fn(|job: memory::Delivery<u32>| async move {
                    match *job.payload() {
                        9 => Ok::<_, Refused>(()),
                        _ => pending().await,
                    }
                });
            let request = CancellationToken::new();
            let mut consumer = Consumer::new(queue.subscribe(5).unwrap(), service)
                .shutdown(shutdown)
                .drain_timeout(SECOND)
                .with_graceful_shutdown(request.clone().cancelled_owned())
                .run();
            tokio::time::timeout(SECOND, &mut consumer)
                .await
                .unwrap_err();
            let expected = [("connected", 1.0), ("running", 2.0), ("unsettled", 0.0)];
            let mut expected = BTreeMap::from(expected.map(|(name, it)| (name.to_owned(), it)));
            expected.insert("abandoned".to_owned(), 0.0);
            assert_eq!(worker_gauges(metrics.take()), expected, "{end:?}");
            match end {
                End::Requested => {
                    request.cancel();
                    consumer.await.unwrap();
                }
                End::FutureDropped => {
                    drop(consumer);
                    sleep(LONG).await;
                }
                End::TaskAborted => {
                    let task = tokio::spawn(consumer);
                    task.abort();
                    assert!(task.await.unwrap_err().is_cancelled());
                    sleep(LONG).await;
                }
                End::ConnectionLost => {
                    broker.drop_connections();
                    consumer.await.unwrap_err();
                }
                End::Panic => {
                    queue.publish(9);
                    consumer.await.unwrap_err();
                }
                End::RuntimeGone => return Some(consumer),
            }
            None
        });
        drop(runtime);
        drop(left);
        let gauges = worker_gauges(metrics.take());
        assert_eq!(gauges.len(), 4, "{end:?}");
        assert!(gauges.values().all(|it| *it == 0.0), "{end:?}: {gauges:?}");
    }
}

// === buckets ===

#[tokio::test]
async fn an_exporter_takes_the_advised_buckets_for_each_duration() {
    let recorder = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("duration".to_owned()), &DURATION_BUCKETS)
        .unwrap()
        .build_recorder();
    let text = recorder.handle();
    let _guard = metrics::set_default_local_recorder(&recorder);
    let mut sentinel =
        SentinelLayer::new(SettlePolicy::new(ack_on_success())).layer(service_fn(process));
    let tag = Tag::new().published(SystemTime::now() - Duration::from_secs(7));
    call(&mut sentinel, Delivery(Fate::Value, tag))
        .await
        .unwrap();
    let text = text.render();
    for metric in [
        "messaging_process_duration",
        "messaging_client_operation_duration",
        "tower_sentinel_queue_duration",
    ] {
        let lines = text
            .lines()
            .filter(|it| it.starts_with(&format!("{metric}_bucket{{")));
        let bounds: BTreeSet<_> = lines
            .filter_map(|it| it.split_once("le=\"")?.1.split_once('"'))
            .map(|(bound, _)| bound.to_owned())
            .collect();
        let mut advised = BTreeSet::from_iter(DURATION_BUCKETS.map(|it| it.to_string()));
        advised.insert("+Inf".to_owned());
        assert_eq!(bounds, advised, "{metric}: {text}");
    }
    // Seven seconds are above five, and not above seven and a half.
    let count = |bound: &str| {
        let start = format!("tower_sentinel_queue_duration_bucket{{le=\"{bound}\"}} ");
        text.lines().find_map(|it| it.strip_prefix(&start))
    };
    assert_eq!((count("5"), count("7.5")), (Some("0"), Some("1")));
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
    let deliveries = Broker::<u32>::new().queue("jobs").declare().subscribe(1);
    let service = service_fn(|_| ready(Ok::<_, Refused>(())));
    let consumer = Consumer::new(deliveries.unwrap(), service);
    let consumer = consumer.escalation(|_: &Refused| Escalation::Call);
    consumer.with_graceful_shutdown(ready(())).await.unwrap();
    tower_sentinel::telemetry::describe_metrics();
    let all = metrics.snapshotter.snapshot().into_vec();
    assert_eq!(all.len(), 5 + 4 * 5 + 1 + 2);
    for (key, unit, description, _) in all {
        assert!(unit.is_some() && description.is_some(), "{key:?}");
    }
}
