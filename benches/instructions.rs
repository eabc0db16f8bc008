//! Instructions of a job, counted by valgrind.
//!
//! Each benchmark runs [`JOBS`] trivial jobs on one thread, and fails if they take over 3 % more instructions than the
//! count beside it says. What makes a job dearer changes that count, with its reason. The counts are those of Rust 1.95 on x86-64.
//! `cargo bench -p tower-sentinel-benches --bench instructions` wants valgrind and `cargo install gungraun-runner`, of the version in Cargo.lock.
#![allow(missing_docs)] // on what the macros make

use std::{convert::Infallible, hint::black_box, time::Duration};

use futures_util::{FutureExt, StreamExt, stream::FuturesUnordered};
use gungraun::{
    Callgrind, EventKind, LibraryBenchmarkConfig, library_benchmark, library_benchmark_group, main,
};
use tokio::{
    runtime::{Builder, Runtime},
    task::yield_now,
    time::timeout,
};
use tower::{Layer, Service, ServiceBuilder, ServiceExt, service_fn};
use tower_sentinel::{
    Consumer, Job, Report, SentinelLayer, SettlePolicy, Verdict, ack_on_success,
    broker::memory::{Broker, Delivery, Queue},
};

const JOBS: u64 = 1_000;
const IN_FLIGHT: usize = 64;
const LIMIT: Duration = Duration::from_secs(30);

#[derive(Clone, Copy)]
struct Tagged(u64);

impl Job for Tagged {
    type Tag = u64;

    fn tag(&self) -> u64 {
        self.0
    }
}

/// Waits once, as a job that does I/O.
async fn process(job: Tagged) -> Result<u64, Infallible> {
    yield_now().await;
    Ok(job.0)
}

async fn answer(tag: u64) -> Result<(), Infallible> {
    black_box(tag);
    Ok(())
}

/// A runtime whose parts are all in use.
fn warm() -> Runtime {
    let runtime = Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("a runtime starts");
    runtime.block_on(async {
        for job in 0..10 {
            let job = tokio::spawn(timeout(LIMIT, process(Tagged(job))));
            job.await.ok();
        }
    });
    runtime
}

fn queue() -> (Runtime, Queue<u64>) {
    let queue = Broker::new().queue("jobs").declare();
    (0..JOBS).for_each(|job| queue.publish(job));
    (warm(), queue)
}

/// Fails a benchmark whose jobs take over 3 % more instructions than were measured.
fn about(measured: u64) -> LibraryBenchmarkConfig {
    let mut callgrind = Callgrind::default();
    callgrind.hard_limits([(EventKind::Ir, measured * JOBS * 103 / 100)]);
    let mut config = LibraryBenchmarkConfig::default();
    config.tool(callgrind);
    config
}

macro_rules! each {
    ($runtime:expr, |$job:ident| $call:expr) => {{
        $runtime.block_on(async {
            for $job in (0..JOBS).map(Tagged) {
                $call;
            }
        });
        $runtime
    }};
}

macro_rules! policy {
    () => {
        service_fn(|report: Report<u64, u64, Infallible>| answer(report.tag))
    };
}

#[library_benchmark(config = about(4_210))]
#[bench::jobs(warm())]
fn spawn_by_hand(runtime: Runtime) -> Runtime {
    each!(runtime, |job| {
        tokio::spawn(process(job)).await.ok();
        answer(job.0).await.ok()
    })
}

#[library_benchmark(config = about(5_304))]
#[bench::jobs(warm())]
fn timeout_by_hand(runtime: Runtime) -> Runtime {
    each!(runtime, |job| {
        timeout(LIMIT, tokio::spawn(process(job))).await.ok();
        answer(job.0).await.ok()
    })
}

#[library_benchmark(config = about(5_860))]
#[bench::jobs(warm())]
fn sentinel_without_limit(runtime: Runtime) -> Runtime {
    let layer = SentinelLayer::new(policy!()).no_timeout();
    let mut sentinel = layer.layer(service_fn(process));
    each!(runtime, |job| {
        let sentinel = sentinel.ready().await.expect("it is ready");
        sentinel.call(job).await.ok()
    })
}

#[library_benchmark(config = about(6_797))]
#[bench::jobs(warm())]
fn sentinel(runtime: Runtime) -> Runtime {
    let layer = SentinelLayer::new(policy!()).timeout(LIMIT);
    let mut sentinel = layer.layer(service_fn(process));
    each!(runtime, |job| {
        let sentinel = sentinel.ready().await.expect("it is ready");
        sentinel.call(job).await.ok()
    })
}

#[library_benchmark(config = about(6_066))]
#[bench::jobs(warm())]
fn sentinel_under_the_gate(runtime: Runtime) -> Runtime {
    let mut service = ServiceBuilder::new()
        .concurrency_limit(IN_FLIGHT)
        .layer(SentinelLayer::new(policy!()).timeout(LIMIT))
        .service_fn(process);
    runtime.block_on(async {
        let mut calls = FuturesUnordered::new();
        for job in (0..JOBS).map(Tagged) {
            if calls.len() == IN_FLIGHT {
                calls.next().await;
            }
            calls.push(service.ready().await.expect("it is ready").call(job));
        }
        while calls.next().await.is_some() {}
    });
    runtime
}

#[library_benchmark(config = about(9_120))]
#[bench::jobs(queue())]
fn consumer((runtime, queue): (Runtime, Queue<u64>)) -> (Runtime, Queue<u64>) {
    runtime.block_on(async {
        let layer = SentinelLayer::new(SettlePolicy::new(ack_on_success())).timeout(LIMIT);
        let handler = service_fn(|job: Delivery<u64>| process(Tagged(*job.payload())));
        let jobs = queue.subscribe(IN_FLIGHT).expect("memory is there");
        let emptied = queue.clone();
        let consumer = Consumer::new(jobs, handler)
            .sentinel(layer)
            .with_graceful_shutdown(async move { emptied.emptied().await });
        consumer.run().await.expect("nothing fails");
    });
    (runtime, queue)
}

#[library_benchmark(config = about(1_069))]
#[bench::jobs(queue())]
fn settlement((runtime, queue): (Runtime, Queue<u64>)) -> (Runtime, Queue<u64>) {
    runtime.block_on(async {
        let mut jobs = queue.subscribe(IN_FLIGHT).expect("memory is there");
        while let Some(Some(Ok(job))) = jobs.next().now_or_never() {
            let reason = black_box(tower_sentinel::settle::Reason::of(
                &tower_sentinel::Outcome::<(), Infallible>::Completed(()),
                Duration::ZERO,
            ));
            let settling = tower_sentinel::settle::Settle::settle(job.tag(), Verdict::Ack, reason);
            settling.await.expect("memory is there");
        }
    });
    (runtime, queue)
}

library_benchmark_group!(
    name = job,
    benchmarks = [
        spawn_by_hand,
        timeout_by_hand,
        sentinel_without_limit,
        sentinel,
        sentinel_under_the_gate,
        consumer,
        settlement
    ]
);

main!(library_benchmark_groups = job);
