//! A worker with a page that shows its metrics live, and with the text for Prometheus.
//!
//! ```sh
//! cargo run --example dashboard --features metrics -- 127.0.0.1:3000
//! ```
//!
//! The load is like that of the quickstart, but endless: jobs complete, fail, panic, hang and cancel
//! themselves. Some block their thread. Every 30 s their database is down for 3 s, so that the worker pauses.
//!
//! - `/` is the page (`dashboard.html`), which polls `/state` and draws the last three minutes. Its times are
//!   estimated from buckets, as Prometheus does.
//! - `/metrics` is the text for Prometheus; `grafana.json` beside this file is a dashboard for it.
//!
//! ![The page: throughput, outcomes, processing time, jobs in flight and the time in the queue as plots, and the last
//! panics](dashboard.png)

use std::{
    collections::VecDeque, env, error::Error, fmt, future::pending, sync::LazyLock, thread,
    time::Duration,
};

use axum::{Json, Router, response::Html, routing::get};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use serde::Serialize;
use tokio::{
    net::TcpListener,
    runtime::{self, Runtime},
    sync::watch,
    time::{Instant, MissedTickBehavior, interval},
};
use tower::ServiceBuilder;
use tower_sentinel::{
    Consumer, DecisionExt, IntensityLayer, Job, Outcome, Report, SentinelLayer, SettlePolicy,
    ack_on_success,
    broker::memory::{Broker, Deliveries, Delivery, DeliveryTag, Queue},
    cancel::Cancellation,
    consumer::{self, AfterError, Pauser, Watch},
    outcome::{CancelReason, OutcomeKind},
    panic_hook,
    settle::Settle,
    telemetry::DURATION_BUCKETS,
};

const PREFETCH: usize = 32;
/// Time between two published jobs.
const PACE: Duration = Duration::from_millis(5);
/// Time between two refreshes of the state.
const REFRESH: Duration = Duration::from_millis(250);
/// Number of refreshes from one point of the plots to the next: 1 s.
const PER_POINT: usize = 4;
/// Number of points over which the plots measure rates and times: 5 s.
const POINTS_OF_PLOTS: usize = 5;
/// Number of points over which the table measures times, and for which counts are kept: one minute.
const POINTS_OF_TABLE: usize = 60;
/// Number of points of the plots: three minutes.
const POINTS: usize = 180;
/// Number of panics shown.
const PANICS: usize = 5;

// === the worker ===

/// Error of a job.
#[derive(Debug)]
enum WorkError {
    DiskFull,
    NoConnection,
}

impl fmt::Display for WorkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            WorkError::DiskFull => "the disk is full",
            WorkError::NoConnection => "no connection to the database",
        })
    }
}

impl Error for WorkError {}

async fn process(delivery: Delivery<u64>, started: Instant) -> Result<(), WorkError> {
    let job = *delivery.payload();
    let is_first = delivery.tag().deliveries() == Some(1);
    tokio::time::sleep(Duration::from_millis(job % 7)).await;
    if started.elapsed().as_secs() % 30 >= 27 {
        return Err(WorkError::NoConnection);
    }
    match job % 10 {
        _ if job % 1_000 == 500 && is_first => thread::sleep(Duration::from_secs(1)),
        6 if delivery.tag().redelivered() == Some(false) => {
            Cancellation::current().cancel(CancelReason::Requested);
            pending::<()>().await;
        }
        7 if is_first => return Err(WorkError::DiskFull),
        8 if job % 20 == 8 => panic!("job {job} is poison"),
        8 => drop("a number".parse::<u32>().expect("a number in the body")),
        9 => pending().await,
        _ => {}
    }
    Ok(())
}

/// The jobs' own runtime, so that the limit of a blocking job is punctual.
static JOBS: LazyLock<Runtime> = LazyLock::new(|| {
    let mut jobs = runtime::Builder::new_multi_thread();
    let jobs = jobs.worker_threads(4).enable_time().build();
    jobs.expect("threads for the jobs")
});

/// Starts a worker that works for ever and puts the last panics into `panics`, and returns its handle.
fn work(deliveries: Deliveries<u64>, panics: watch::Sender<VecDeque<LastPanic>>) -> Watch {
    let note = move |report: Report<DeliveryTag<u64>, (), WorkError>| {
        if let Outcome::Panicked(panic) = &report.outcome {
            let last = LastPanic {
                message: panic.message().to_owned(),
                location: panic.location().map(ToString::to_string),
            };
            panics.send_modify(|panics| {
                panics.push_front(last);
                panics.truncate(PANICS);
            });
        }
        report
    };
    let decision = ack_on_success()
        .poison_on_panic()
        .delivery_limit(3)
        .backoff(Duration::from_millis(500)..=Duration::from_secs(5));
    let policy = ServiceBuilder::new()
        .map_request(note)
        .service(SettlePolicy::new(decision));
    let sentinel = SentinelLayer::new(policy)
        .timeout(Duration::from_millis(50))
        .stop_wait(Duration::from_millis(50))
        .runtime(JOBS.handle().clone());
    let started = Instant::now();
    let worker = ServiceBuilder::new()
        .layer(deliveries.gate())
        .layer(sentinel)
        // About a third of the jobs fails even if the database is up.
        .layer(IntensityLayer::new().window(100).threshold(0.8))
        .service_fn(move |delivery| process(delivery, started));
    let consumer = Consumer::new(deliveries, worker).on_error(AfterError::Continue);
    let watch = consumer.watch();
    tokio::spawn(async move {
        if let Err(error) = consumer.await {
            eprintln!("the worker has ended: {error}");
        }
    });
    watch
}

async fn publish(queue: Queue<u64>) {
    let mut pace = interval(PACE);
    for job in 0.. {
        pace.tick().await;
        queue.publish(job);
    }
}

// === the text for Prometheus ===

/// A line of a text for Prometheus: a sample of a metric.
struct Sample<'a> {
    metric: &'a str,
    /// As `name="value"`.
    labels: Vec<&'a str>,
    value: f64,
}

impl<'a> Sample<'a> {
    fn read(line: &'a str) -> Option<Self> {
        let (series, value) = line.rsplit_once(' ')?;
        let (metric, labels) = series.split_once('{').unwrap_or((series, ""));
        let labels = labels.trim_end_matches('}').split(',');
        Some(Self {
            metric,
            labels: labels.collect(),
            value: value.parse().ok()?,
        })
    }
}

struct Samples<'a>(Vec<Sample<'a>>);

impl<'a> Samples<'a> {
    fn read(text: &'a str) -> Self {
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        Self(lines.filter_map(Sample::read).collect())
    }

    /// Returns the sum of the samples of `metric` that have all of `labels`; 0 if there is none.
    fn sum(&self, metric: &str, labels: &[&str]) -> f64 {
        let has_all = |it: &Sample<'_>| labels.iter().all(|label| it.labels.contains(label));
        let samples = self.0.iter().filter(|it| it.metric == metric);
        samples.filter(|it| has_all(it)).map(|it| it.value).sum()
    }

    fn durations(&self, metric: &str, labels: &[&str]) -> Durations {
        let bounds = DURATION_BUCKETS.map(|bound| bound.to_string());
        let bounds = bounds.iter().map(|it| &**it).chain(["+Inf"]);
        let metric = format!("{metric}_bucket");
        let counts = bounds.map(|bound| {
            let bound = format!("le=\"{bound}\"");
            self.sum(&metric, &[labels, &[&*bound]].concat())
        });
        Durations(counts.collect())
    }
}

/// Numbers of durations up to the bound of each bucket, and of all.
#[derive(Clone)]
struct Durations(Vec<f64>);

impl Durations {
    /// Returns a quantile of the durations since `earlier`, in seconds; `None` if there are none.
    fn quantile(&self, quantile: f64, earlier: &Self) -> Option<f64> {
        let counts = self.0.iter().zip(&earlier.0);
        let counts: Vec<f64> = counts.map(|(now, then)| now - then).collect();
        let rank = quantile * counts.last().filter(|all| **all > 0.0)?;
        let bucket = counts.iter().position(|count| *count >= rank)?;
        let Some(high) = DURATION_BUCKETS.get(bucket) else {
            return DURATION_BUCKETS.last().copied();
        };
        let (low, below) = match bucket.checked_sub(1) {
            Some(lower) => (DURATION_BUCKETS[lower], counts[lower]),
            None => (0.0, 0.0),
        };
        // As evenly spread over the bucket, as Prometheus assumes.
        let part = (rank - below) / (counts[bucket] - below);
        Some(low + (high - low) * part)
    }
}

// === the worker's state ===

const KINDS: [OutcomeKind; 5] = [
    OutcomeKind::Completed,
    OutcomeKind::Failed,
    OutcomeKind::Panicked,
    OutcomeKind::TimedOut,
    OutcomeKind::Cancelled,
];

/// Counts at one time.
struct Counts {
    at: Instant,
    /// By outcome.
    jobs: [f64; 5],
    /// By outcome.
    processing: [Durations; 5],
    queued: Durations,
}

impl Counts {
    fn read(samples: &Samples<'_>, at: Instant) -> Self {
        let outcome = |kind: OutcomeKind| format!("outcome=\"{kind}\"");
        Self {
            at,
            jobs: KINDS.map(|kind| samples.sum("tower_sentinel_outcomes", &[&outcome(kind)])),
            processing: KINDS
                .map(|kind| samples.durations("messaging_process_duration", &[&outcome(kind)])),
            queued: samples.durations("tower_sentinel_queue_duration", &[]),
        }
    }

    /// Returns the jobs per second since `earlier`, by outcome.
    fn rates(&self, earlier: &Self) -> [f64; 5] {
        let seconds = (self.at - earlier.at).as_secs_f64();
        let mut rates = self.jobs;
        for (rate, before) in rates.iter_mut().zip(earlier.jobs) {
            *rate = (*rate - before) / seconds;
        }
        rates
    }

    /// Returns the times of all jobs.
    fn all(&self) -> Durations {
        let mut all = self.queued.clone();
        for (place, count) in all.0.iter_mut().enumerate() {
            *count = self.processing.iter().map(|it| it.0[place]).sum();
        }
        all
    }
}

/// State shown by the page.
#[derive(Clone, Debug, Default, Serialize)]
struct State {
    outcomes: Vec<OutcomeRow>,
    consumer: &'static str,
    intensity: &'static str,
    running: f64,
    unsettled: f64,
    abandoned: f64,
    connected: f64,
    reconnects: f64,
    /// Consumers that took no job although there were some, and that connected anew.
    stalled: f64,
    /// Jobs that wait in the queue; `delayed` has those that wait for a retry.
    ready: usize,
    delayed: usize,
    panics: VecDeque<LastPanic>,
    points: VecDeque<Point>,
}

/// Number of jobs with one outcome, and their time in the last minute, in seconds.
#[derive(Clone, Debug, Serialize)]
struct OutcomeRow {
    outcome: &'static str,
    jobs: f64,
    p50: Option<f64>,
    p99: Option<f64>,
}

/// Values of the plots at one time; times in seconds.
#[derive(Clone, Debug, Serialize)]
struct Point {
    /// Seconds since the start.
    at: f64,
    /// Jobs per second, by outcome.
    outcomes: [f64; 5],
    p50: Option<f64>,
    p99: Option<f64>,
    running: f64,
    unsettled: f64,
    abandoned: f64,
    queue_p50: Option<f64>,
    queue_p99: Option<f64>,
}

#[derive(Clone, Debug, Serialize)]
struct LastPanic {
    message: String,
    location: Option<String>,
}

fn name(state: &consumer::State) -> &'static str {
    match state {
        consumer::State::Idle => "idle",
        consumer::State::Connecting { .. } => "connecting",
        consumer::State::Consuming(_) => "consuming",
        consumer::State::Saturated(_) => "saturated",
        consumer::State::Paused {
            by: Pauser::Operator,
            ..
        } => "paused by an operator",
        consumer::State::Paused { .. } => "paused by the service",
        consumer::State::Draining(_) => "draining",
        consumer::State::Ended => "ended",
        _ => "unknown",
    }
}

/// Sources of the state.
struct Sources {
    prometheus: PrometheusHandle,
    queue: Queue<u64>,
    consumer: Watch,
    panics: watch::Receiver<VecDeque<LastPanic>>,
}

impl Sources {
    /// Reads the state without its points, and the counts.
    fn read(&self, at: Instant, past: &VecDeque<Counts>) -> (State, Counts) {
        // Rendering also drains the samples of histograms, as the exporter's own server would do.
        let text = self.prometheus.render();
        let samples = Samples::read(&text);
        let value = |metric: &str| samples.sum(metric, &[]);
        let now = Counts::read(&samples, at);
        let minute_ago = past.front().unwrap_or(&now);
        let outcomes = KINDS.into_iter().enumerate().map(|(place, kind)| {
            let (times, before) = (&now.processing[place], &minute_ago.processing[place]);
            OutcomeRow {
                outcome: kind.as_str(),
                jobs: now.jobs[place],
                p50: times.quantile(0.5, before),
                p99: times.quantile(0.99, before),
            }
        });
        let counts = self.queue.counts();
        let state = State {
            outcomes: outcomes.collect(),
            consumer: name(&self.consumer.state()),
            intensity: match value("tower_sentinel_intensity_state") {
                0.0 => "running",
                1.0 => "probing",
                _ => "paused",
            },
            running: value("tower_sentinel_running"),
            unsettled: value("tower_sentinel_unsettled"),
            abandoned: value("tower_sentinel_abandoned"),
            connected: value("tower_sentinel_connected"),
            reconnects: value("tower_sentinel_reconnects"),
            stalled: value("tower_sentinel_consumer_stalled"),
            ready: counts.ready,
            delayed: counts.delayed,
            panics: self.panics.borrow().clone(),
            points: VecDeque::new(),
        };
        (state, now)
    }
}

impl Point {
    fn new(state: &State, now: &Counts, past: &VecDeque<Counts>, started: Instant) -> Option<Self> {
        let before = past.get(past.len().saturating_sub(POINTS_OF_PLOTS))?;
        let (times, times_before) = (now.all(), before.all());
        Some(Self {
            at: (now.at - started).as_secs_f64(),
            outcomes: now.rates(before),
            p50: times.quantile(0.5, &times_before),
            p99: times.quantile(0.99, &times_before),
            running: state.running,
            unsettled: state.unsettled,
            abandoned: state.abandoned,
            queue_p50: now.queued.quantile(0.5, &before.queued),
            queue_p99: now.queued.quantile(0.99, &before.queued),
        })
    }
}

/// Refreshes `state` for ever.
async fn refresh(sources: Sources, state: watch::Sender<State>) {
    let mut ticks = interval(REFRESH);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let started = Instant::now();
    // One for each point.
    let mut past = VecDeque::new();
    let mut points = VecDeque::new();
    for tick in 0.. {
        let at = ticks.tick().await;
        let (mut new, now) = sources.read(at, &past);
        if tick % PER_POINT == 0 {
            points.extend(Point::new(&new, &now, &past, started));
            past.push_back(now);
            points.drain(..points.len().saturating_sub(POINTS));
            past.drain(..past.len().saturating_sub(POINTS_OF_TABLE));
        }
        new.points.clone_from(&points);
        state.send_replace(new);
    }
}

// === the page ===

/// Installs the recorder of the process, starts the worker, and returns its page.
pub fn app() -> Result<Router, Box<dyn Error + Send + Sync>> {
    // Before any code that looks up metrics.
    let prometheus = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("duration".to_owned()), &DURATION_BUCKETS)?
        .install_recorder()?;
    tower_sentinel::telemetry::describe_metrics();
    panic_hook::install();

    let queue = Broker::new().queue("jobs").declare();
    let (panics, last_panics) = watch::channel(VecDeque::new());
    let (state, states) = watch::channel(State::default());
    let consumer = work(queue.subscribe(PREFETCH)?, panics);
    tokio::spawn(publish(queue.clone()));
    let sources = Sources {
        prometheus: prometheus.clone(),
        queue,
        consumer,
        panics: last_panics,
    };
    tokio::spawn(refresh(sources, state));

    let state = move || async move { Json(states.borrow().clone()) };
    let metrics = move || async move { prometheus.render() };
    Ok(Router::new()
        .route("/", get(Html(PAGE)))
        .route("/state", get(state))
        .route("/metrics", get(metrics)))
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    // The page shows each panic, so it need not go to standard error.
    std::panic::set_hook(Box::new(|_| ()));

    let address = env::args().nth(1);
    let address = address.as_deref().unwrap_or("127.0.0.1:3000");
    let listener = TcpListener::bind(address).await?;
    println!("see http://{}", listener.local_addr()?);
    axum::serve(listener, app()?).await?;
    Ok(())
}

const PAGE: &str = include_str!("dashboard.html");
