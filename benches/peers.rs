//! What does a job cost from its queue to its answer, beside a job of apalis?
//!
//! Both take trivial jobs from a queue in memory, 64 at a time, under a limit of 30 s, and survive a
//! panic. apalis runs all jobs inside of one task, unless it is told to `parallelize`; a sentinel
//! gives each a task of its own. `cargo bench --bench peers` prints the medians of rounds that
//! alternate, in nanoseconds for each job, and their ratios.

use std::{
    fmt, panic,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use apalis::prelude::{
    MemoryStorage, ParallelizeExt, TaskSink, WorkerBuilder, WorkerBuilderExt, WorkerError,
};
use futures_util::{StreamExt, stream::FuturesUnordered};
use tokio::{
    runtime::{Builder, Runtime},
    sync::Notify,
};
use tower::ServiceBuilder;
use tower_sentinel::{
    Consumer, Outcome, SentinelLayer, SettlePolicy, Verdict,
    broker::memory::{Broker, Delivery},
};

const IN_FLIGHT: usize = 64;
const LIMIT: Duration = Duration::from_secs(30);
const JOBS: u64 = 20_000;
const ROUNDS: usize = 101;

/// Says when the last job has run.
#[derive(Debug)]
struct Finish {
    left: AtomicU64,
    last: Notify,
}

impl Finish {
    fn after(jobs: u64) -> Arc<Self> {
        Arc::new(Self {
            left: AtomicU64::new(jobs),
            last: Notify::new(),
        })
    }

    fn count(&self) {
        if self.left.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.last.notify_one();
        }
    }
}

/// Waits once, as a job that does I/O.
async fn process(number: u64, panicking: bool, finish: &Finish) {
    tokio::task::yield_now().await;
    finish.count();
    assert!(!panicking || number % 2 == 0, "an odd number");
}

#[derive(Clone, Copy, PartialEq)]
enum Contender {
    /// `timeout(spawn)` and a call, by hand and without a queue.
    ByHand,
    Apalis,
    ApalisParallelized,
    Sentinel,
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ByHand => "timeout(spawn)",
            Self::Apalis => "apalis",
            Self::ApalisParallelized => "apalis, parallelized",
            Self::Sentinel => "tower-sentinel",
        })
    }
}

impl Contender {
    const ALL: [Self; 4] = [
        Self::ByHand,
        Self::Apalis,
        Self::ApalisParallelized,
        Self::Sentinel,
    ];

    /// Runs all jobs, of which half panic if asked to, and returns the time for each.
    fn run(self, runtime: &Runtime, panicking: bool) -> Duration {
        let finish = Finish::after(JOBS);
        let elapsed = match self {
            Self::ByHand => {
                let jobs = async move {
                    let mut running = FuturesUnordered::new();
                    for number in 0..JOBS {
                        if running.len() == IN_FLIGHT {
                            running.next().await;
                        }
                        let finish = Arc::clone(&finish);
                        running.push(async move {
                            let job = async move { process(number, panicking, &finish).await };
                            tokio::time::timeout(LIMIT, tokio::spawn(job)).await
                        });
                    }
                    while running.next().await.is_some() {}
                };
                time(runtime, async move {
                    tokio::spawn(jobs).await.expect("a driver does not panic");
                })
            }
            Self::Apalis | Self::ApalisParallelized => {
                let mut storage = MemoryStorage::new();
                runtime.block_on(async {
                    for number in 0..JOBS {
                        storage.push(number).await.expect("memory has room");
                    }
                });
                let handler = {
                    let finish = Arc::clone(&finish);
                    move |number: u64| {
                        let finish = Arc::clone(&finish);
                        async move { process(number, panicking, &finish).await }
                    }
                };
                let finished = async move {
                    finish.last.notified().await;
                    Ok::<_, WorkerError>(())
                };
                let worker = WorkerBuilder::new("peer")
                    .backend(storage)
                    .concurrency(IN_FLIGHT)
                    .timeout(LIMIT)
                    .catch_panic();
                match self {
                    Self::Apalis => {
                        let worker = worker.build(handler);
                        time(runtime, async {
                            worker.run_until(finished).await.expect("a worker ends");
                        })
                    }
                    _ => {
                        let worker = worker.parallelize(tokio::spawn).build(handler);
                        time(runtime, async {
                            worker.run_until(finished).await.expect("a worker ends");
                        })
                    }
                }
            }
            Self::Sentinel => {
                let broker = Broker::new();
                let queue = broker.queue("jobs").dead_letter("dead").declare();
                (0..JOBS).for_each(|number| queue.publish(number));
                let deliveries = queue.subscribe(IN_FLIGHT).expect("memory is there");
                // A job that panicked would not end if it were given back.
                let decision = |_: &_, outcome: &Outcome<_, _>| match outcome.is_completed() {
                    true => Verdict::Ack,
                    false => Verdict::Reject,
                };
                let policy = SettlePolicy::new(decision);
                let handler = {
                    let finish = Arc::clone(&finish);
                    move |delivery: Delivery<u64>| {
                        let finish = Arc::clone(&finish);
                        async move {
                            process(*delivery.payload(), panicking, &finish).await;
                            Ok::<_, std::convert::Infallible>(())
                        }
                    }
                };
                let service = ServiceBuilder::new()
                    .layer(deliveries.gate())
                    .layer(SentinelLayer::new(policy).timeout(LIMIT))
                    .service_fn(handler);
                let consumer = Consumer::new(deliveries, service)
                    .with_graceful_shutdown(async move { finish.last.notified().await });
                time(runtime, async {
                    let summary = consumer.await.expect("nothing fails");
                    assert_eq!(summary.answered, JOBS);
                })
            }
        };
        elapsed / JOBS as u32
    }
}

// The wall clock, not tokio's: this is a benchmark.
#[allow(clippy::disallowed_methods)]
fn time(runtime: &Runtime, work: impl Future<Output = ()>) -> Duration {
    let started = Instant::now();
    runtime.block_on(work);
    started.elapsed()
}

fn main() {
    // Unwinding is part of the cost, printing is not.
    panic::set_hook(Box::new(|_| {}));
    let runtime = Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime starts");
    // `cargo test --benches` only wants to know whether this runs.
    let rounds = match std::env::args().any(|argument| argument == "--bench") {
        true => ROUNDS,
        false => 1,
    };
    println!("medians of {rounds} rounds of {JOBS} jobs, {IN_FLIGHT} at a time");
    let mut sound = Duration::ZERO;
    for (name, panicking) in [("all complete", false), ("half of them panic", true)] {
        let mut times = Contender::ALL.map(|_| Vec::with_capacity(rounds));
        for round in 0..rounds {
            for turn in 0..Contender::ALL.len() {
                // Each begins a round as often as the others.
                let index = (round + turn) % Contender::ALL.len();
                times[index].push(Contender::ALL[index].run(&runtime, panicking));
            }
        }
        let ours = times[3].clone();
        println!("\n{name}");
        for (contender, theirs) in Contender::ALL.iter().zip(&times) {
            let mut ratios: Vec<f64> = theirs
                .iter()
                .zip(&ours)
                .map(|(theirs, ours)| theirs.as_secs_f64() / ours.as_secs_f64())
                .collect();
            ratios.sort_by(f64::total_cmp);
            let mut sorted = theirs.clone();
            sorted.sort();
            let (median, ratio) = (sorted[rounds / 2], ratios[rounds / 2]);
            let (name, nanos) = (contender.to_string(), median.as_nanos());
            println!("{name:<22} {nanos:>6} ns a job, {ratio:.2} of tower-sentinel's");
            if *contender == Contender::Sentinel {
                match panicking {
                    false => sound = median,
                    true => println!(
                        "tower-sentinel: {:.2} times as long as without panics",
                        median.as_secs_f64() / sound.as_secs_f64()
                    ),
                }
            }
        }
    }
}
