//! Time in which a consumer settles jobs that hang and all pass their limit at once.
//!
//! The clock is paused: it stands still until all jobs are called, and then advances to their limit. So the times that
//! are printed are those of the calls and of the settlements. `cargo bench --bench herd`, or with a number of jobs
//! `cargo bench --bench herd -- 100000`.

use std::{convert::Infallible, env, fs, future::pending, sync::Arc, time::Duration};

use tokio::{
    runtime::Builder,
    sync::OnceCell,
    time::{self, sleep},
};
use tokio_util::sync::CancellationToken;
use tower::ServiceBuilder;
use tower_sentinel::{
    Consumer, Outcome, SentinelLayer, SettlePolicy, Verdict,
    broker::memory::{Broker, Delivery, DeliveryTag},
    outcome::OutcomeKind,
};

const LIMIT: Duration = Duration::from_secs(3_600);

/// Returns a line of Linux's description of this process, such as its peak of resident memory.
fn status(name: &str) -> String {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    line.unwrap_or(" unknown").trim().to_owned()
}

// The wall clock, not tokio's, which is paused.
#[allow(clippy::disallowed_methods)]
async fn run(jobs: usize) {
    let broker = Broker::new();
    let queue = broker.queue("jobs").declare();
    (0..jobs).for_each(|number| queue.publish(number));
    println!("{jobs} jobs are published: {} resident", status("VmRSS:"));

    let decision = |_: &DeliveryTag<usize>, outcome: &Outcome<(), Infallible>| {
        assert!(matches!(outcome, Outcome::TimedOut(_)));
        Verdict::Reject
    };
    let service = ServiceBuilder::new()
        .concurrency_limit(jobs)
        .layer(SentinelLayer::new(SettlePolicy::new(decision)).timeout(LIMIT))
        .service_fn(|_: Delivery<usize>| pending::<Result<(), Infallible>>());
    let shutdown = CancellationToken::new();
    let deliveries = queue.subscribe(jobs).expect("the broker takes connections");
    let consumer = Consumer::new(deliveries, service)
        .with_graceful_shutdown(shutdown.clone().cancelled_owned());

    let began = std::time::Instant::now();
    let (due, empty) = (Arc::new(OnceCell::new()), queue.clone());
    let noted = Arc::clone(&due);
    // A paused clock advances when nothing else is left to do: all jobs hang then.
    tokio::spawn(async move {
        sleep(LIMIT / 2).await;
        assert_eq!(empty.counts().unacked, jobs);
        noted
            .set((began.elapsed(), status("VmRSS:")))
            .expect("set once");
    });
    tokio::spawn(async move {
        queue.emptied().await;
        shutdown.cancel();
    });
    let summary = consumer.await.expect("the broker goes on");
    let elapsed = began.elapsed();

    assert_eq!(summary.outcomes(OutcomeKind::TimedOut), jobs as u64);
    assert_eq!((summary.called, summary.unanswered), (jobs as u64, 0));
    assert_eq!(broker.queue("jobs").declare().counts().dropped, jobs as u64);
    let (called, held) = due.get().expect("half of the limit is before the limit");
    println!("called in {called:.2?}: {held} resident");
    let settled = elapsed - *called;
    let each = settled.as_nanos() as f64 / jobs as f64;
    println!(
        "timed out and settled in {settled:.2?}, {each:.0} ns each: {} resident at most",
        status("VmHWM:")
    );
}

fn main() {
    let jobs = env::args().skip(1).find_map(|it| it.parse().ok());
    let runtime = Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build();
    let runtime = runtime.expect("a runtime starts");
    let run = run(jobs.unwrap_or(1_000_000));
    let ended = runtime.block_on(async { time::timeout(2 * LIMIT, run).await });
    ended.expect("all jobs pass their limit");
}
