//! Memory that a job in flight holds, compared with the same job written by hand.
//!
//! Jobs that hang, from 1 to 1 000 000 of them, each polled once by its caller, under the same limit; then
//! the allocations of a job from its call to its settlement. `cargo bench -p tower-sentinel-benches --bench memory`.

use std::{
    alloc::System,
    convert::Infallible,
    fmt,
    future::{Future, pending},
    hint::black_box,
    time::{Duration, Instant},
};

use futures_util::{FutureExt, StreamExt, stream::FuturesUnordered};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, Stats, StatsAlloc};
use tokio::runtime::Builder;
use tower::{Service, service_fn};
use tower_layer::Layer;
use tower_sentinel::{Job, Report, SentinelLayer};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const LIMIT: Duration = Duration::from_secs(3600);

struct Delivery {
    tag: u64,
    hangs: bool,
}

impl Job for Delivery {
    type Tag = u64;

    fn tag(&self) -> u64 {
        self.tag
    }
}

async fn process(delivery: Delivery) -> Result<u64, Infallible> {
    tokio::task::yield_now().await;
    if delivery.hangs {
        pending::<()>().await;
    }
    Ok(delivery.tag)
}

async fn answer(tag: u64) -> Result<(), Infallible> {
    black_box(tag);
    Ok(())
}

fn by_hand(delivery: Delivery) -> impl Future<Output = Result<(), Infallible>> {
    let tag = delivery.tag;
    let job = tokio::spawn(process(delivery));
    async move {
        let _joined = tokio::time::timeout(LIMIT, job).await;
        answer(tag).await
    }
}

struct Held {
    bytes: f64,
    allocations: f64,
    nanoseconds: f64,
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            bytes,
            allocations,
            nanoseconds,
        } = self;
        write!(
            f,
            "{bytes:4.0} B {allocations:4.2} allocs {nanoseconds:5.0} ns"
        )
    }
}

fn net(stats: Stats) -> (isize, isize) {
    let bytes = stats.bytes_allocated as isize - stats.bytes_deallocated as isize;
    // Growing in place is counted in bytes, and is no allocation.
    let blocks = stats.allocations as isize - stats.deallocations as isize;
    (bytes + stats.bytes_reallocated.min(0), blocks)
}

// The wall clock, not tokio's: this is a benchmark.
#[allow(clippy::disallowed_methods)]
async fn hold<F: Future>(jobs: u64, mut call: impl FnMut(Delivery) -> F) -> Held {
    let region = Region::new(ALLOCATOR);
    let started = Instant::now();
    let mut in_flight = FuturesUnordered::new();
    for tag in 0..jobs {
        in_flight.push(call(Delivery { tag, hangs: true }));
    }
    assert!(in_flight.next().now_or_never().is_none(), "hung jobs hang");
    let elapsed = started.elapsed();
    // Each job is at its await once the tasks had their turn.
    tokio::time::sleep(Duration::from_millis(50)).await;
    let (bytes, blocks) = net(region.change());
    drop(in_flight);
    Held {
        bytes: bytes as f64 / jobs as f64,
        allocations: blocks as f64 / jobs as f64,
        nanoseconds: elapsed.as_nanos() as f64 / jobs as f64,
    }
}

async fn allocations_of_a_life<F: Future>(mut call: impl FnMut(Delivery) -> F) -> f64 {
    const JOBS: u64 = 10_000;
    let region = Region::new(ALLOCATOR);
    for tag in 0..JOBS {
        call(Delivery { tag, hangs: false }).await;
    }
    region.change().allocations as f64 / JOBS as f64
}

/// Waits for the end of the last round's work in the background.
async fn settle() {
    tokio::time::sleep(Duration::from_millis(500)).await;
}

fn main() {
    let runtime = Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime starts");
    let largest: u64 = match std::env::args().any(|argument| argument == "--bench") {
        true => 1_000_000,
        // `cargo test --benches` only wants to know whether this runs.
        false => 1_000,
    };
    let policy = service_fn(|report: Report<u64, u64, Infallible>| answer(report.tag));
    let mut sentinel = SentinelLayer::new(policy)
        .timeout(LIMIT)
        .layer(service_fn(process));

    runtime.block_on(async {
        let theirs = allocations_of_a_life(by_hand).await;
        let ours = allocations_of_a_life(|delivery| sentinel.call(delivery)).await;
        println!("allocations of a job, call to answer: {theirs:.2} by hand, {ours:.2} supervised");
        // The runtime's own allocations, made once for its timers, must not count.
        hold(1, by_hand).await;
        hold(1, |delivery| sentinel.call(delivery)).await;
        settle().await;

        println!("\nin flight |     timeout(spawn), by hand |        sentinel, same limit | ratio");
        for jobs in [1, 1_000, 100_000, 1_000_000] {
            if jobs > largest {
                break;
            }
            let theirs = hold(jobs, by_hand).await;
            settle().await;
            let ours = hold(jobs, |delivery| sentinel.call(delivery)).await;
            settle().await;
            let ratio = ours.bytes / theirs.bytes;
            println!("{jobs:>9} | {theirs} | {ours} | {ratio:5.2}");
        }
    });
}
