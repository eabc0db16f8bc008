//! Many jobs of mixed fates. Memory and file descriptors must stay flat.

use std::{
    error::Error,
    fmt, fs, future,
    process::ExitCode,
    time::{Duration, Instant},
};

use tokio::{
    task::{JoinSet, yield_now},
    time::{interval, sleep},
};
use tokio_util::sync::CancellationToken;
use tower::{Service, ServiceBuilder};
use tower_sentinel::{
    Consumer, Outcome, SentinelError, SentinelLayer, SettlePolicy, Verdict,
    broker::memory::{Broker, Delivery, DeliveryError, DeliveryTag, Queue},
    cancel::Cancellation,
    cancelled,
    consumer::AfterError,
    outcome::{CancelReason, OutcomeKind},
    settle::{SettleError, Settled},
};

use crate::{Failed, MS};

const CONSUMERS: usize = 4;
const PREFETCH: usize = 256;

/// Number of jobs kept in the queue.
const BACKLOG: usize = 4_000;

/// Time between two losses of all connections, which drop all calls.
const BETWEEN_LOSSES: Duration = Duration::from_secs(2);

/// Of a thousand jobs 50 return an error, 50 panic, 50 cancel themselves and one hangs.
async fn process(delivery: Delivery<u64>) -> Result<(), Failed> {
    let number = *delivery.payload();
    if number % 2 == 0 {
        yield_now().await;
    }
    match number % 1_000 {
        0 => future::pending().await,
        1..=50 => Err(Failed),
        51..=100 => panic!("on purpose"),
        101..=150 => {
            Cancellation::current().cancel(CancelReason::Requested);
            cancelled().await;
            Err(Failed)
        }
        _ => Ok(()),
    }
}

/// Rejects what has not completed. A job that is given back for the loss of its channel comes again.
fn decide(_: &DeliveryTag<u64>, outcome: &Outcome<(), Failed>) -> Verdict {
    match outcome.is_completed() {
        true => Verdict::Ack,
        false => Verdict::Reject,
    }
}

type CallError = SentinelError<Failed, SettleError<DeliveryError>>;

fn service(
    shutdown: CancellationToken,
) -> impl Service<Delivery<u64>, Response = Settled, Error = CallError, Future: Send + 'static>
+ Send
+ 'static {
    let sentinel = SentinelLayer::new(SettlePolicy::new(decide)).timeout(MS(20));
    ServiceBuilder::new()
        .concurrency_limit(PREFETCH)
        .layer(sentinel.shutdown(shutdown))
        .service_fn(process)
}

/// What this process holds.
#[derive(Clone, Copy)]
struct Held {
    kilobytes: u64,
    files: usize,
}

impl Held {
    /// Asks Linux.
    fn now() -> Result<Self, Box<dyn Error>> {
        let status = fs::read_to_string("/proc/self/status")?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let number = line.and_then(|line| line.split_whitespace().next());
        Ok(Self {
            kilobytes: number.ok_or("no resident set")?.parse()?,
            files: fs::read_dir("/proc/self/fd")?.count(),
        })
    }
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} kB resident, {} files open",
            self.kilobytes, self.files
        )
    }
}

fn settled(queue: &Queue<u64>) -> u64 {
    let counts = queue.counts();
    counts.acked + counts.dropped
}

async fn publish(queue: Queue<u64>, jobs: u64) {
    let mut next = 0;
    while next < jobs {
        let waiting = queue.counts().ready;
        for _ in waiting..BACKLOG.min(waiting + (jobs - next) as usize) {
            queue.publish(next);
            next += 1;
        }
        sleep(MS(1)).await;
    }
}

/// Prints what is held after each tenth of the jobs.
// The wall clock, since the rate is printed.
#[allow(clippy::disallowed_methods)]
async fn sample(queue: Queue<u64>, jobs: u64) -> Result<Vec<Held>, Box<dyn Error>> {
    let start = Instant::now();
    let mut samples = Vec::new();
    for tenth in 1..=10 {
        let until = jobs * tenth / 10;
        while settled(&queue) < until {
            sleep(MS(5)).await;
        }
        let held = Held::now()?;
        let rate = settled(&queue) as f64 / start.elapsed().as_secs_f64();
        println!("{:3} %: {held}, {rate:.0} jobs/s", tenth * 10);
        samples.push(held);
    }
    Ok(samples)
}

/// Returns whether all but the first of the samples differ by less than a twentieth.
fn is_flat(samples: &[Held]) -> bool {
    let samples = &samples[1..];
    let sizes = || samples.iter().map(|held| held.kilobytes);
    let (least, most) = (sizes().min().unwrap_or(0), sizes().max().unwrap_or(0));
    let are_files_flat = samples.iter().all(|held| held.files == samples[0].files);
    (most - least) * 20 <= least && are_files_flat
}

pub(crate) async fn run(jobs: u64) -> Result<ExitCode, Box<dyn Error>> {
    let broker = Broker::new();
    let queue = broker.queue("jobs").declare();
    let shutdown = CancellationToken::new();
    let mut consumers = JoinSet::new();
    for _ in 0..CONSUMERS {
        let (jobs, signal) = (queue.clone(), shutdown.clone());
        let consumer =
            Consumer::reconnecting(move || future::ready(jobs.subscribe(PREFETCH)), service)
                .backoff(MS(1)..=MS(5))
                .drain_timeout(MS(5))
                .on_error(AfterError::Continue)
                .with_graceful_shutdown(async move { signal.cancelled().await });
        consumers.spawn(async move { consumer.await });
    }
    let losses = tokio::spawn(async move {
        let mut ticks = interval(BETWEEN_LOSSES);
        loop {
            ticks.tick().await;
            broker.drop_connections();
        }
    });
    let publishing = tokio::spawn(publish(queue.clone(), jobs));
    let samples = sample(queue.clone(), jobs).await?;
    publishing.await?;
    losses.abort();
    queue.emptied().await;
    shutdown.cancel();

    let kinds = [
        OutcomeKind::Completed,
        OutcomeKind::Failed,
        OutcomeKind::Panicked,
        OutcomeKind::TimedOut,
        OutcomeKind::Cancelled,
    ];
    let mut outcomes = kinds.map(|kind| (kind, 0));
    let (mut called, mut unanswered) = (0, 0);
    while let Some(ended) = consumers.join_next().await {
        let summary = ended??;
        called += summary.called;
        unanswered += summary.unanswered;
        for (kind, n) in &mut outcomes {
            *n += summary.outcomes(*kind);
        }
    }
    println!("{called} deliveries, {unanswered} left unsettled");
    for (kind, n) in outcomes {
        println!("{kind:?}: {n}");
    }
    let counts = queue.counts();
    let adds_up = settled(&queue) == jobs && counts.unacked == 0 && counts.ready == 0;
    println!(
        "{jobs} published: {} acked, {} rejected",
        counts.acked, counts.dropped
    );
    Ok(match (adds_up, is_flat(&samples)) {
        (true, true) => ExitCode::SUCCESS,
        (adds_up, is_flat) => {
            println!("the ledger adds up: {adds_up}; memory and files are flat: {is_flat}");
            ExitCode::FAILURE
        }
    })
}
