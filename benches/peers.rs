//! Cost of a job from its queue to its settlement, compared with a job of apalis.
//!
//! Both take trivial jobs from a queue in memory, 64 at a time, under a limit of 30 s, and survive a panic.
//! apalis runs all jobs inside of one task, unless it is set to `parallelize`; a sentinel gives each its own
//! task. The consumer runs on one task, or on as many as there are workers, with an equal part of the 64
//! each, by hand or wired by itself. `cargo bench -p tower-sentinel-benches --bench peers` prints the medians of rounds that alternate,
//! in nanoseconds for each job, and their ratios: of the whole way of a job, and of the part after its
//! publishing.

use std::{
    convert::Infallible,
    fmt, iter, panic,
    sync::atomic::{AtomicU64, Ordering},
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
use tower::{ServiceBuilder, service_fn};
use tower_sentinel::{
    Consumer, Outcome, SentinelLayer, SettlePolicy, Verdict,
    broker::memory::{Broker, Delivery},
};

const IN_FLIGHT: usize = 64;
const WORKERS: usize = 2;
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
    /// Leaked, so that the counter of the jobs is no part of their cost.
    fn after(jobs: u64) -> &'static Self {
        Box::leak(Box::new(Self {
            left: AtomicU64::new(jobs),
            last: Notify::new(),
        }))
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
    /// With this many tasks, and a limit and a sentinel for each by hand.
    Sentinel(usize),
    /// With a sentinel of the consumer's own.
    Supervised,
}

/// Time of a job.
#[derive(Clone, Copy)]
struct Times {
    publishing: Duration,
    running: Duration,
}

impl Times {
    fn whole(self) -> Duration {
        self.publishing + self.running
    }
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ByHand => "timeout(spawn)",
            Self::Apalis => "apalis",
            Self::ApalisParallelized => "apalis, parallelized",
            Self::Sentinel(1) => "tower-sentinel",
            Self::Sentinel(_) => "tower-sentinel, tasks",
            Self::Supervised => "tower-sentinel, wired",
        })
    }
}

impl Contender {
    const ALL: [Self; 6] = [
        Self::ByHand,
        Self::Apalis,
        Self::ApalisParallelized,
        Self::Sentinel(1),
        Self::Supervised,
        Self::Sentinel(WORKERS),
    ];

    /// Runs all jobs, of which half panic if `panicking`, and returns the time for each.
    fn run(self, runtime: &Runtime, panicking: bool) -> Times {
        let finish = Finish::after(JOBS);
        let mut publishing = Duration::ZERO;
        let running = match self {
            Self::ByHand => {
                let jobs = async move {
                    let mut running = FuturesUnordered::new();
                    for number in 0..JOBS {
                        if running.len() == IN_FLIGHT {
                            running.next().await;
                        }
                        running.push(async move {
                            let job = process(number, panicking, finish);
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
                publishing = time(runtime, async {
                    for number in 0..JOBS {
                        storage.push(number).await.expect("memory has room");
                    }
                });
                let handler = move |number: u64| process(number, panicking, finish);
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
            Self::Sentinel(_) | Self::Supervised => {
                let broker = Broker::new();
                let queue = broker.queue("jobs").dead_letter("dead").declare();
                publishing = time(runtime, async {
                    (0..JOBS).for_each(|number| queue.publish(number));
                });
                let deliveries = queue.subscribe(IN_FLIGHT).expect("memory is there");
                // A job that panicked would not end if it were given back.
                let decision = |_: &_, outcome: &Outcome<_, _>| match outcome.is_completed() {
                    true => Verdict::Ack,
                    false => Verdict::Reject,
                };
                let layer = SentinelLayer::new(SettlePolicy::new(decision)).timeout(LIMIT);
                let handler = service_fn(move |delivery: Delivery<u64>| async move {
                    process(*delivery.payload(), panicking, finish).await;
                    Ok::<_, Infallible>(())
                });
                let finished = async move { finish.last.notified().await };
                let consuming = match self {
                    Self::Sentinel(tasks) => {
                        let stack = || {
                            ServiceBuilder::new()
                                .concurrency_limit(IN_FLIGHT / tasks)
                                .layer(layer.clone())
                                .service(handler)
                        };
                        let services = iter::repeat_with(stack).take(tasks);
                        let consumer = Consumer::parallel(deliveries, services);
                        consumer.with_graceful_shutdown(finished).run()
                    }
                    _ => {
                        let consumer = Consumer::new(deliveries, handler).sentinel(layer);
                        consumer.with_graceful_shutdown(finished).run()
                    }
                };
                time(runtime, async {
                    let summary = consuming.await.expect("nothing fails");
                    assert_eq!(summary.answered, JOBS);
                })
            }
        };
        Times {
            publishing: publishing / JOBS as u32,
            running: running / JOBS as u32,
        }
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
        .worker_threads(WORKERS)
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
        println!("\n{name:<24} published and answered   answered alone");
        let [.., ours] = &times;
        for (contender, theirs) in Contender::ALL.iter().zip(&times) {
            let [whole, running] =
                [Times::whole, |times: Times| times.running].map(|of| {
                    let ratios = theirs.iter().zip(ours);
                    (
                        median(theirs.iter().map(|times| of(*times))).as_nanos(),
                        median(ratios.map(|(theirs, ours)| {
                            of(*theirs).as_secs_f64() / of(*ours).as_secs_f64()
                        })),
                    )
                });
            let name = contender.to_string();
            println!(
                "{name:<24} {:>9} ns {:>8.2} {:>11} ns {:>8.2}",
                whole.0, whole.1, running.0, running.1
            );
        }
        let ours = median(ours.iter().map(|times| times.whole()));
        match panicking {
            false => sound = ours,
            true => println!(
                "tower-sentinel, tasks: {:.2} times as long as without panics",
                ours.as_secs_f64() / sound.as_secs_f64()
            ),
        }
    }
}

fn median<T: PartialOrd + Copy>(values: impl Iterator<Item = T>) -> T {
    let mut values = Vec::from_iter(values);
    values.sort_by(|one, other| one.partial_cmp(other).expect("no time is NaN"));
    values[values.len() / 2]
}
