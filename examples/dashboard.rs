//! A worker with a page that shows its metrics live, and with the text for Prometheus.
//!
//! ```sh
//! cargo run --example dashboard --features metrics -- 127.0.0.1:3000
//! ```
//!
//! The load is like that of the quickstart, but endless: jobs complete, fail, panic, hang and cancel
//! themselves. Some block their thread. Every 30 s their database is down for 3 s, so that the worker pauses.
//!
//! - `/` is the page, which polls `/state`.
//! - `/metrics` is the text for Prometheus; `grafana.json` beside this file is a dashboard for it.
//!
//! ![The page: throughput, jobs in flight, outcomes and the last panics](dashboard.png)

use std::{
    collections::{HashMap, VecDeque},
    env,
    error::Error,
    fmt,
    future::pending,
    sync::LazyLock,
    thread,
    time::Duration,
};

use axum::{Json, Router, response::Html, routing::get};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
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
    consumer::AfterError,
    outcome::{CancelReason, OutcomeKind},
    panic_hook,
    settle::Settle,
};

const PREFETCH: usize = 32;
/// Time between two published jobs.
const PACE: Duration = Duration::from_millis(5);
/// Time between two refreshes of the state.
const REFRESH: Duration = Duration::from_millis(250);
/// Number of refreshes over which the throughput is measured: 5 s.
const REFRESHES: usize = 20;
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

/// Works for ever, and puts the last panics into `panics`.
async fn work(deliveries: Deliveries<u64>, panics: watch::Sender<VecDeque<LastPanic>>) {
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
    let end = Consumer::new(deliveries, worker)
        .on_error(AfterError::Continue)
        .await;
    if let Err(error) = end {
        eprintln!("the worker has ended: {error}");
    }
}

async fn publish(queue: Queue<u64>) {
    let mut pace = interval(PACE);
    for job in 0.. {
        pace.tick().await;
        queue.publish(job);
    }
}

// === its state ===

/// State shown by the page.
#[derive(Clone, Debug, Default, Serialize)]
struct State {
    /// Outcomes per second.
    throughput: f64,
    outcomes: Vec<OutcomeRow>,
    running: f64,
    unsettled: f64,
    abandoned: f64,
    intensity: &'static str,
    /// Jobs that wait in the queue; `delayed` has those that wait for a retry.
    ready: usize,
    delayed: usize,
    panics: VecDeque<LastPanic>,
}

/// Number of jobs with one outcome, and their time in the last minute, in seconds.
#[derive(Clone, Debug, Serialize)]
struct OutcomeRow {
    outcome: &'static str,
    jobs: f64,
    p50: f64,
    p99: f64,
}

#[derive(Clone, Debug, Serialize)]
struct LastPanic {
    message: String,
    location: Option<String>,
}

/// Returns the value of each line of a text for Prometheus, by the part of the line before it.
fn samples(text: &str) -> HashMap<&str, f64> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .filter_map(|line| line.rsplit_once(' '))
        .filter_map(|(series, value)| Some((series, value.parse().ok()?)))
        .collect()
}

impl State {
    /// Reads a state, without the throughput.
    fn read(text: &str, queue: &Queue<u64>, panics: VecDeque<LastPanic>) -> Self {
        let samples = samples(text);
        let value = |series: &str| samples.get(series).copied().unwrap_or_default();
        let row = |kind: OutcomeKind| {
            let outcome = kind.as_str();
            let quantile = |quantile| {
                let labels = format!("outcome=\"{outcome}\",quantile=\"{quantile}\"");
                value(&format!("messaging_process_duration{{{labels}}}"))
            };
            OutcomeRow {
                outcome,
                jobs: value(&format!("tower_sentinel_outcomes{{outcome=\"{outcome}\"}}")),
                p50: quantile("0.5"),
                p99: quantile("0.99"),
            }
        };
        let kinds = [
            OutcomeKind::Completed,
            OutcomeKind::Failed,
            OutcomeKind::Panicked,
            OutcomeKind::TimedOut,
            OutcomeKind::Cancelled,
        ];
        let counts = queue.counts();
        Self {
            throughput: 0.0,
            outcomes: kinds.map(row).into(),
            running: value("tower_sentinel_running"),
            unsettled: value("tower_sentinel_unsettled"),
            abandoned: value("tower_sentinel_abandoned"),
            intensity: match value("tower_sentinel_intensity_state") {
                0.0 => "running",
                1.0 => "probing",
                _ => "paused",
            },
            ready: counts.ready,
            delayed: counts.delayed,
            panics,
        }
    }

    fn jobs(&self) -> f64 {
        self.outcomes.iter().map(|row| row.jobs).sum()
    }
}

/// Refreshes `state` for ever.
async fn refresh(
    prometheus: PrometheusHandle,
    queue: Queue<u64>,
    panics: watch::Receiver<VecDeque<LastPanic>>,
    state: watch::Sender<State>,
) {
    let mut ticks = interval(REFRESH);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut past = VecDeque::new();
    loop {
        let now = ticks.tick().await;
        // Rendering also drains the samples of histograms, as the exporter's own server would do.
        let mut new = State::read(&prometheus.render(), &queue, panics.borrow().clone());
        past.push_back((now, new.jobs()));
        let (then, jobs) = past[0];
        if now > then {
            new.throughput = (new.jobs() - jobs) / (now - then).as_secs_f64();
        }
        if past.len() > REFRESHES {
            past.pop_front();
        }
        state.send_replace(new);
    }
}

// === the page ===

/// Installs the recorder of the process, starts the worker, and returns its page.
pub fn app() -> Result<Router, Box<dyn Error + Send + Sync>> {
    // Before any code that looks up metrics.
    let prometheus = PrometheusBuilder::new().install_recorder()?;
    tower_sentinel::telemetry::describe_metrics();
    panic_hook::install();

    let queue = Broker::new().queue("jobs").declare();
    let (panics, last_panics) = watch::channel(VecDeque::new());
    let (state, states) = watch::channel(State::default());
    tokio::spawn(work(queue.subscribe(PREFETCH)?, panics));
    tokio::spawn(publish(queue.clone()));
    tokio::spawn(refresh(prometheus.clone(), queue, last_panics, state));

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

const PAGE: &str = r#"<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>tower-sentinel</title>
<style>
  :root { color-scheme: light dark; --quiet: #8888; --ok: #2a9d5c; --busy: #d08a00; --bad: #d64545 }
  body { font: 15px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem }
  h1 { font-size: 1.3rem }
  h2 { font-size: 1rem; margin: 2rem 0 .5rem }
  small { font-weight: normal; opacity: .7 }
  dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(7rem, 1fr)); gap: .75rem; margin: 0 }
  dl div { border: 1px solid var(--quiet); border-radius: .5rem; padding: .5rem .75rem }
  dt { opacity: .7; font-size: .85rem }
  dd { margin: 0; font-size: 1.4rem; font-variant-numeric: tabular-nums }
  table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
  th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--quiet) }
  th { font-weight: normal; opacity: .7 }
  th:first-child, td:first-child, #panics td { text-align: left }
  #panics td + td { font-family: monospace; white-space: nowrap }
  [data-state=running] { color: var(--ok) }
  [data-state=probing] { color: var(--busy) }
  [data-state=paused], #lost { color: var(--bad) }
</style>
<h1>tower-sentinel <small id="lost" hidden>no response</small></h1>
<dl>
  <div><dt>jobs / s<dd id="throughput">–</div>
  <div><dt>intensity<dd id="intensity">–</div>
  <div><dt>running<dd id="running">–</div>
  <div><dt>unsettled<dd id="unsettled">–</div>
  <div><dt>abandoned<dd id="abandoned">–</div>
  <div><dt>in the queue<dd id="ready">–</div>
  <div><dt>to be retried<dd id="delayed">–</div>
</dl>
<h2>Outcomes <small>and how long the jobs took, in the last minute</small></h2>
<table>
  <thead><tr><th>outcome<th>jobs<th>p50<th>p99</thead>
  <tbody id="outcomes"></tbody>
</table>
<h2>Last panics</h2>
<table><tbody id="panics"></tbody></table>
<script>
  const at = id => document.getElementById(id);
  const ms = seconds => (1000 * seconds).toFixed(1) + ' ms';
  function cell(text, id) {
    const cell = document.createElement('td');
    cell.textContent = text;
    cell.id = id;
    return cell;
  }
  function row(...cells) {
    const row = document.createElement('tr');
    row.append(...cells);
    return row;
  }
  function show(state) {
    at('throughput').textContent = state.throughput.toFixed(1);
    for (const id of ['intensity', 'running', 'unsettled', 'abandoned', 'ready', 'delayed'])
      at(id).textContent = state[id];
    at('intensity').dataset.state = state.intensity;
    at('outcomes').replaceChildren(...state.outcomes.map(it => row(
      cell(it.outcome, it.outcome + '-name'), cell(it.jobs, it.outcome),
      cell(ms(it.p50), it.outcome + '-p50'), cell(ms(it.p99), it.outcome + '-p99'))));
    at('panics').replaceChildren(...state.panics.map((it, nth) => row(
      cell(it.message, 'panic-' + nth), cell(it.location ?? 'unknown', 'location-' + nth))));
  }
  async function poll() {
    try {
      show(await (await fetch('/state')).json());
      at('lost').hidden = true;
    } catch {
      at('lost').hidden = false;
    }
    setTimeout(poll, 500);
  }
  poll();
</script>
"#;
