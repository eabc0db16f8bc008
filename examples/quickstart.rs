//! A worker for a queue of jobs that complete, fail, panic and hang. No job is lost.
//!
//! ```sh
//! cargo run --example quickstart
//! ```

use std::{error::Error, future, io, panic, process::ExitCode, time::Duration};

use tokio::time::sleep;
use tower::service_fn;
use tower_sentinel::{
    Consumer, DecisionExt, SentinelLayer, SettlePolicy, ack_on_success,
    broker::memory::{Broker, Delivery},
    outcome::OutcomeKind,
};

const JOBS: u64 = 1_000;
const PREFETCH: usize = 32;

/// The work: one in ten fails, one panics and one hangs, each time it is delivered.
async fn process(delivery: Delivery<u64>) -> io::Result<()> {
    let job = delivery.into_payload();
    sleep(Duration::from_millis(job % 7)).await;
    match job % 10 {
        7 => Err(io::Error::other("the disk is full")),
        8 => panic!("job {job} is poison"),
        9 => future::pending().await,
        _ => Ok(()),
    }
}

#[tokio::main]
async fn main() -> Result<ExitCode, Box<dyn Error>> {
    // The decision gets each panic, so it need not go to standard error.
    panic::set_hook(Box::new(|_| ()));

    // An embedded broker takes the place of RabbitMQ, JetStream or Redis.
    let queue = Broker::new().queue("jobs").dead_letter("dead").declare();
    (0..JOBS).for_each(|job| queue.publish(job));

    // Verdicts: ack, or retry after a growing pause. The third delivery is the last one; for a job that
    // panics, the first.
    let pauses = Duration::from_millis(10)..=Duration::from_millis(100);
    let decision = ack_on_success()
        .poison_on_panic()
        .backoff(pauses)
        .delivery_limit(3);

    // The prefetch is the number of jobs that may be unsettled at a time.
    let jobs = queue.subscribe(PREFETCH)?;
    let layer = SentinelLayer::new(SettlePolicy::new(decision)).timeout(Duration::from_millis(50));

    // It runs until a shutdown is requested: here when the queue is empty, in a service by `ctrl_c`.
    let emptied = queue.clone();
    let summary = Consumer::new(jobs, service_fn(process))
        .sentinel(layer)
        .with_graceful_shutdown(async move { emptied.emptied().await })
        .run()
        .await?;

    // A job counts as settled if it is acked or a dead letter, and as lost if it is neither.
    let letters = queue.dead_letters();
    let died = |kind| {
        letters
            .iter()
            .filter(|it| it.death.reason.kind == kind)
            .count()
    };
    let completed = summary.outcomes(OutcomeKind::Completed);
    let counts = queue.counts();
    let settled = counts.acked + letters.len() as u64;
    let lost = JOBS.saturating_sub(settled);
    println!(
        "{} deliveries, of which {} were retried",
        summary.called, summary.charged
    );
    println!(
        "settled {settled} of {JOBS} jobs: {completed} completed, {} failed, {} panicked, \
         {} timed out; lost {lost}",
        died(OutcomeKind::Failed),
        died(OutcomeKind::Panicked),
        died(OutcomeKind::TimedOut),
    );
    Ok(match (counts.acked == completed, settled) {
        (true, JOBS) => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}
