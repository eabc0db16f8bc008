//! Workers under injected faults, on the real clock, whose ledger must add up at the end.
//!
//! ```sh
//! cargo run --release --example soak -- --seconds 30 --faults 20
//! ```
//!
//! Several consumers share a queue. Their jobs complete, fail, panic and hang. Connections break or are
//! refused, and settlements fail or are slow. When the time is over, the faults end and the rest of the queue
//! is processed. Then each job must be acked once or be a dead letter once.
//!
//! With `--jobs 10000000` so many jobs of mixed fates are run instead, and memory and file descriptors must stay flat.

mod many;

use std::{
    error::Error,
    future, panic,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::Duration,
};

use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::{
    task::{JoinSet, yield_now},
    time::{Instant, interval, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tower::{Service, ServiceBuilder};
use tower_sentinel::{
    Consumer, DecisionExt, SentinelError, SentinelLayer, SettlePolicy, ack_on_success,
    broker::memory::{Broker, Delivery, DeliveryError, DeliveryTag, Queue, SettleFault},
    consumer::AfterError,
    outcome::OutcomeKind,
    settle::{SettleError, Settled, decision::Decision},
};

const CONSUMERS: usize = 4;
const PREFETCH: usize = 32;

/// Number of jobs kept in the queue.
const BACKLOG: usize = 500;

const MS: fn(u64) -> Duration = Duration::from_millis;

#[derive(Parser)]
struct Args {
    /// Time during which faults are injected.
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Number of faults per second.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(..=1_000))]
    faults: u32,
    /// Number of jobs to run instead, without faults but a loss of all connections now and then.
    #[arg(long, value_parser = clap::value_parser!(u64).range(10..))]
    jobs: Option<u64>,
}

/// A job, and the number of times that it completed: more than once if an ack was lost.
#[derive(Clone)]
struct Work(Arc<(u64, AtomicU32)>);

#[derive(Debug)]
struct Failed;

impl std::fmt::Display for Failed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("failed")
    }
}

impl Error for Failed {}

type Jobs = Queue<Work>;

async fn process(delivery: Delivery<Work>) -> Result<(), Failed> {
    let work = delivery.into_payload();
    match fastrand::u32(0..100) {
        0..5 => return Err(Failed),
        5..10 => panic!("at once"),
        10..12 => future::pending().await,
        12..40 => yield_now().await,
        _ => sleep(MS(fastrand::u64(1..20))).await,
    }
    if fastrand::u32(0..100) < 5 {
        panic!("after an await");
    }
    work.0.1.fetch_add(1, Relaxed);
    Ok(())
}

type CallError = SentinelError<Failed, SettleError<DeliveryError>>;

fn service(
    shutdown: CancellationToken,
) -> impl Service<Delivery<Work>, Response = Settled, Error = CallError, Future: Send + 'static>
+ Send
+ 'static {
    let policy = SettlePolicy::new(decision())
        .try_timeout(MS(100))
        .retry_backoff(MS(5)..=MS(50));
    let sentinel = SentinelLayer::new(policy).timeout(MS(100)).grace(MS(10));
    ServiceBuilder::new()
        .concurrency_limit(PREFETCH)
        .layer(sentinel.shutdown(shutdown))
        .service_fn(process)
}

fn decision() -> impl Decision<DeliveryTag<Work>, (), Failed> + Clone + Send + Sync + 'static {
    ack_on_success().backoff(MS(5)..=MS(100)).delivery_limit(4)
}

/// Publishes until the time is over, and returns every job.
async fn publish(queue: Jobs, until: Instant) -> Vec<Work> {
    let mut published = Vec::new();
    while Instant::now() < until {
        let counts = queue.counts();
        for _ in counts.ready + counts.delayed..BACKLOG {
            let number = published.len() as u64;
            let work = Work(Arc::new((number, AtomicU32::new(0))));
            published.push(work.clone());
            queue.publish(work);
        }
        sleep(MS(1)).await;
    }
    published
}

/// Injects faults at this rate, and returns their number.
async fn disturb(broker: Broker<Work>, queue: Jobs, per_second: u32, until: Instant) -> u64 {
    let mut faults = 0;
    if per_second > 0 {
        let mut ticks = interval(Duration::from_secs(1) / per_second);
        while Instant::now() < until {
            ticks.tick().await;
            faults += 1;
            let n = fastrand::u32(1..5);
            match fastrand::u32(0..6) {
                0 => broker.drop_connections(),
                1 => broker.refuse_connections(n),
                2 => queue.fail_settlements(n, SettleFault::Last),
                3 => queue.delay_settlements(MS(fastrand::u64(1..150))),
                4 => queue.delay_settlements(Duration::ZERO),
                _ => queue.fail_settlements(n, SettleFault::Again),
            }
        }
    }
    broker.refuse_connections(0);
    queue.delay_settlements(Duration::ZERO);
    faults
}

async fn show(queue: Jobs, seconds: u64) {
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} s  {msg}");
    let bar = ProgressBar::new(seconds).with_style(style.unwrap_or_else(|_| {
        // The default has no message, and is good enough.
        ProgressStyle::default_bar()
    }));
    for second in 0.. {
        let counts = queue.counts();
        bar.set_position(second.min(seconds));
        bar.set_message(format!(
            "{} acked, {} dead, {} unacked",
            counts.acked, counts.dead, counts.unacked
        ));
        if counts.unacked > CONSUMERS * PREFETCH {
            bar.println(format!("{} jobs are unacked", counts.unacked));
        }
        sleep(Duration::from_secs(1)).await;
    }
}

#[tokio::main]
async fn main() -> Result<ExitCode, Box<dyn Error>> {
    // Thousands of jobs panic on purpose.
    panic::set_hook(Box::new(|_| ()));
    let Args {
        seconds,
        faults,
        jobs,
    } = Args::parse();
    if let Some(jobs) = jobs {
        return many::run(jobs).await;
    }
    let broker = Broker::new();
    let queue = broker.queue("jobs").dead_letter("dead").declare();
    let until = Instant::now() + Duration::from_secs(seconds);

    let shutdown = CancellationToken::new();
    let mut consumers = JoinSet::new();
    for _ in 0..CONSUMERS {
        let (jobs, signal) = (queue.clone(), shutdown.clone());
        let consumer =
            Consumer::reconnecting(move || future::ready(jobs.subscribe(PREFETCH)), service)
                .backoff(MS(5)..=MS(100))
                .drain_timeout(MS(200))
                .on_error(AfterError::Continue)
                .with_graceful_shutdown(async move { signal.cancelled().await });
        consumers.spawn(async move { consumer.await });
    }
    let progress = tokio::spawn(show(queue.clone(), seconds));
    let faults = tokio::spawn(disturb(broker.clone(), queue.clone(), faults, until));
    let published = publish(queue.clone(), until).await;
    let faults = faults.await?;

    let is_empty = timeout(Duration::from_secs(60), queue.emptied())
        .await
        .is_ok();
    shutdown.cancel();
    let (mut called, mut unanswered) = (0, 0);
    let mut outcomes = [
        OutcomeKind::Completed,
        OutcomeKind::Failed,
        OutcomeKind::Panicked,
        OutcomeKind::TimedOut,
        OutcomeKind::Cancelled,
    ]
    .map(|kind| (kind, 0));
    while let Some(ended) = consumers.join_next().await {
        let summary = ended??;
        called += summary.called;
        unanswered += summary.unanswered;
        for (kind, n) in &mut outcomes {
            *n += summary.outcomes(*kind);
        }
    }
    progress.abort();

    let counts = queue.counts();
    let mut dead = vec![0; published.len()];
    for letter in queue.dead_letters() {
        dead[letter.payload.0.0 as usize] += 1;
    }
    let is_dead_once = dead.iter().all(|&times| times <= 1);
    // Each job must be dead or have completed at least once, since only completed jobs are acked.
    let missing = published
        .iter()
        .filter(|work| dead[work.0.0 as usize] == 0 && work.0.1.load(Relaxed) == 0);
    let missing = missing.count();
    let settled = counts.acked + counts.dead;
    let adds_up = is_empty
        && outcomes[0] == (OutcomeKind::Completed, counts.acked)
        && is_dead_once
        && missing == 0
        && settled == published.len() as u64
        && counts.unacked == 0
        && counts.dropped == 0;
    println!("{faults} faults, {called} deliveries, {unanswered} left unsettled");
    for (kind, n) in outcomes {
        println!("{kind:?}: {n}");
    }
    println!(
        "{} published: {} acked, {} dead, {} left, {missing} neither completed nor dead",
        published.len(),
        counts.acked,
        counts.dead,
        counts.ready + counts.delayed + counts.unacked,
    );
    println!(
        "{}",
        if adds_up {
            "the ledger adds up"
        } else {
            "the ledger does NOT add up"
        }
    );
    Ok(if adds_up {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
