//! Cost of supervision per job, compared with the same job written by hand.
//!
//! Seven ways to run a job and to settle it, each with jobs that complete, fail and panic, with 64 jobs in
//! flight on a runtime of two workers. `cargo bench -p tower-sentinel-benches --bench overhead` prints criterion's figures for each,
//! and at the end the ratios that matter. They are medians over pairs of rounds that ran right after each
//! other, since a machine's speed drifts more than these differ. Nothing subscribes to traces, so the spans
//! that one of them makes should cost nothing.

use std::{
    convert::Infallible,
    fmt,
    future::{Future, Ready, ready},
    hint::black_box,
    panic,
    time::{Duration, Instant},
};

use criterion::{Criterion, Throughput};
use futures_util::{StreamExt, stream::FuturesUnordered};
use tokio::runtime::{Builder, Runtime};
use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
use tower_sentinel::{
    Job, Outcome, Report, SentinelLayer, SettlePolicy, Verdict, ack_on_success,
    settle::{Capabilities, Lease, Messaging, Reason, Settle, Unsettled},
};

const IN_FLIGHT: usize = 64;
const LIMIT: Duration = Duration::from_secs(30);

#[derive(Clone, Copy)]
enum Fate {
    Completes,
    Fails,
    Panics,
}

#[derive(Clone, Copy)]
struct Delivery {
    tag: u64,
    fate: Fate,
}

impl Job for Delivery {
    type Tag = u64;

    fn tag(&self) -> u64 {
        self.tag
    }
}

/// A job whose tag can be settled.
struct Settling(Delivery);

impl Job for Settling {
    type Tag = Acker;

    fn tag(&self) -> Acker {
        Acker(self.0.tag)
    }
}

#[derive(Clone, Copy, Debug)]
struct Acker(u64);

impl Settle for Acker {
    type Error = Infallible;
    type Future = Ready<Result<(), Unsettled<Self, Infallible>>>;

    fn settle(self, verdict: Verdict, _: Reason) -> Self::Future {
        black_box((self.0, verdict));
        ready(Ok(()))
    }

    async fn keep_alive(&self) -> Result<Lease, Infallible> {
        Ok(Lease::Held)
    }

    fn deliveries(&self) -> Option<u32> {
        None
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::none()
    }

    fn messaging(&self) -> Option<Messaging<'_>> {
        Some(Messaging::new("rabbitmq", "orders").delivery_tag(self.0))
    }
}

/// Waits once, as a job that does I/O: its first poll never finds it done.
async fn process(delivery: Delivery) -> Result<u64, &'static str> {
    tokio::task::yield_now().await;
    match delivery.fate {
        Fate::Completes => Ok(delivery.tag),
        Fate::Fails => Err("no"),
        Fate::Panics => panic!("no"),
    }
}

async fn answer(tag: u64, ack: bool) -> Result<(), Infallible> {
    black_box((tag, ack));
    Ok(())
}

#[derive(Clone, Copy)]
enum Contender {
    BareSpawn,
    TimeoutSpawn,
    SentinelWithoutLimit,
    Sentinel,
    SentinelGated,
    Settled,
    SettledInSpans,
}

impl Contender {
    const ALL: [Self; 7] = [
        Self::BareSpawn,
        Self::TimeoutSpawn,
        Self::SentinelWithoutLimit,
        Self::Sentinel,
        Self::SentinelGated,
        Self::Settled,
        Self::SettledInSpans,
    ];

    /// Runs `jobs` jobs and returns the time they took.
    fn run(self, runtime: &Runtime, jobs: u64, fate: Fate) -> Duration {
        let policy = service_fn(|report: Report<u64, u64, &'static str>| {
            answer(report.tag, matches!(report.outcome, Outcome::Completed(_)))
        });
        let sentinel = SentinelLayer::new(policy).timeout(LIMIT);
        match self {
            Self::BareSpawn => time(runtime, jobs, fate, |delivery| async move {
                let joined = tokio::spawn(process(delivery)).await;
                answer(delivery.tag, matches!(joined, Ok(Ok(_)))).await
            }),
            Self::TimeoutSpawn => time(runtime, jobs, fate, |delivery| async move {
                let job = tokio::spawn(process(delivery));
                let joined = tokio::time::timeout(LIMIT, job).await;
                answer(delivery.tag, matches!(joined, Ok(Ok(Ok(_))))).await
            }),
            Self::SentinelWithoutLimit => {
                let mut service = ServiceBuilder::new()
                    .layer(sentinel.no_timeout())
                    .service_fn(process);
                time(runtime, jobs, fate, move |delivery| service.call(delivery))
            }
            Self::Sentinel => {
                let mut service = ServiceBuilder::new().layer(sentinel).service_fn(process);
                time(runtime, jobs, fate, move |delivery| service.call(delivery))
            }
            Self::SentinelGated => {
                let mut service = ServiceBuilder::new()
                    .concurrency_limit(IN_FLIGHT)
                    .layer(sentinel)
                    .service_fn(process);
                wait_for(runtime, async move {
                    let mut running = FuturesUnordered::new();
                    for tag in 0..jobs {
                        if running.len() == IN_FLIGHT {
                            running.next().await;
                        }
                        let ready = service.ready().await.expect("a function is ready");
                        running.push(ready.call(Delivery { tag, fate }));
                    }
                    while running.next().await.is_some() {}
                })
            }
            Self::Settled => {
                let sentinel =
                    SentinelLayer::new(SettlePolicy::new(ack_on_success())).timeout(LIMIT);
                let mut service = ServiceBuilder::new()
                    .layer(sentinel)
                    .service_fn(|Settling(delivery)| process(delivery));
                time(runtime, jobs, fate, move |delivery| {
                    service.call(Settling(delivery))
                })
            }
            Self::SettledInSpans => {
                let sentinel = SentinelLayer::new(SettlePolicy::new(ack_on_success()))
                    .timeout(LIMIT)
                    .process_span();
                let mut service = ServiceBuilder::new()
                    .layer(sentinel)
                    .service_fn(|Settling(delivery)| process(delivery));
                time(runtime, jobs, fate, move |delivery| {
                    service.call(Settling(delivery))
                })
            }
        }
    }
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::BareSpawn => "spawn",
            Self::TimeoutSpawn => "timeout(spawn)",
            Self::SentinelWithoutLimit => "sentinel, no limit",
            Self::Sentinel => "sentinel, 30 s limit",
            Self::SentinelGated => "concurrency_limit(sentinel)",
            Self::Settled => "sentinel, settled",
            Self::SettledInSpans => "sentinel, process_span",
        })
    }
}

fn time<F, Fut>(runtime: &Runtime, jobs: u64, fate: Fate, mut start: F) -> Duration
where
    F: FnMut(Delivery) -> Fut + Send + 'static,
    Fut: Future + Send + 'static,
    Fut::Output: Send,
{
    wait_for(runtime, async move {
        let mut running = FuturesUnordered::new();
        for tag in 0..jobs {
            if running.len() == IN_FLIGHT {
                running.next().await;
            }
            running.push(start(Delivery { tag, fate }));
        }
        while running.next().await.is_some() {}
    })
}

// The wall clock, not tokio's: this is a benchmark.
#[allow(clippy::disallowed_methods)]
fn wait_for(runtime: &Runtime, work: impl Future<Output = ()> + Send + 'static) -> Duration {
    let started = Instant::now();
    runtime
        .block_on(runtime.spawn(work))
        .expect("a driver does not panic");
    started.elapsed()
}

fn runtime() -> Runtime {
    Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime starts")
}

fn figures(criterion: &mut Criterion) {
    let runtime = runtime();
    for (name, fate) in [
        ("completing", Fate::Completes),
        ("failing", Fate::Fails),
        ("panicking", Fate::Panics),
    ] {
        let mut group = criterion.benchmark_group(name);
        group.throughput(Throughput::Elements(1));
        group.measurement_time(Duration::from_secs(2));
        group.warm_up_time(Duration::from_millis(500));
        group.sample_size(30);
        for contender in Contender::ALL {
            group.bench_function(contender.to_string(), |bencher| {
                bencher.iter_custom(|jobs| contender.run(&runtime, jobs, fate));
            });
        }
    }
}

fn ratios() {
    const ROUNDS: usize = 201;
    let runtime = runtime();
    println!("\nmedians of {ROUNDS} paired rounds, and their quartiles");
    for (name, fate, jobs) in [
        ("completing", Fate::Completes, 20_000),
        ("failing", Fate::Fails, 20_000),
        ("panicking", Fate::Panics, 2_000),
    ] {
        for (ours, theirs) in [
            (Contender::Sentinel, Contender::TimeoutSpawn),
            (Contender::SentinelWithoutLimit, Contender::BareSpawn),
            (Contender::SentinelGated, Contender::TimeoutSpawn),
            (Contender::SettledInSpans, Contender::Settled),
        ] {
            let mut ratios: Vec<f64> = (0..ROUNDS)
                .map(|round| {
                    // The two alternate in going first, so that neither always has the warmer caches.
                    let (a, b) = if round % 2 == 0 {
                        let a = ours.run(&runtime, jobs, fate);
                        (a, theirs.run(&runtime, jobs, fate))
                    } else {
                        let b = theirs.run(&runtime, jobs, fate);
                        (ours.run(&runtime, jobs, fate), b)
                    };
                    a.as_secs_f64() / b.as_secs_f64()
                })
                .collect();
            ratios.sort_by(f64::total_cmp);
            let [low, median, high] = [1, 2, 3].map(|quarter| ratios[ROUNDS * quarter / 4]);
            println!("{name:<11} {ours:<28} / {theirs:<17} {median:.3}  ({low:.3} to {high:.3})");
        }
    }
}

fn main() {
    // Unwinding is part of the cost, printing is not.
    panic::set_hook(Box::new(|_| {}));
    let mut criterion = Criterion::default().configure_from_args();
    figures(&mut criterion);
    criterion.final_summary();
    // `cargo test --benches` only wants to know whether this runs.
    if std::env::args().any(|argument| argument == "--bench") {
        ratios();
    }
}
