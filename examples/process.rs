//! Jobs that take their process down. No job is lost, and the worker goes on.
//!
//! ```sh
//! cargo run --features json,process --example process
//! ```

use std::{
    collections::BTreeMap,
    error::Error,
    process::{ExitCode, abort, exit, id},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tower::ServiceBuilder;
use tower_sentinel::{
    Consumer, DecisionExt, DecodeLayer, SentinelLayer, SettlePolicy, ack_on_success,
    broker::memory::Broker,
    decode::DecodeError,
    process::{self, ProcessPool},
};

const JOBS: usize = 200;
const PROCESSES: usize = 2;

/// What a job does; one in ten does one of the bad things.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
enum Deed {
    Work,
    Abort,
    Overflow,
    Allocate,
    Spin,
    Exit,
}

impl Deed {
    fn of(job: usize) -> Self {
        match job % 50 {
            9 => Deed::Abort,
            19 => Deed::Overflow,
            29 => Deed::Allocate,
            39 => Deed::Spin,
            49 => Deed::Exit,
            _ => Deed::Work,
        }
    }
}

// === in the child ===

async fn run(deed: Deed) -> Result<u32, String> {
    match deed {
        Deed::Work => Ok(id()),
        Deed::Abort => abort(),
        Deed::Overflow => Ok(overflow(1)),
        Deed::Allocate => {
            // Not all of the machine's, if nobody stops it.
            let kept = Vec::from_iter((0..2_000).map(|_| vec![1_u8; 1 << 20]));
            Ok(kept.len() as u32)
        }
        Deed::Spin => loop {
            std::hint::spin_loop();
        },
        Deed::Exit => exit(3),
    }
}

#[expect(unconditional_recursion, reason = "its end is the point")]
fn overflow(depth: u32) -> u32 {
    let kept = std::hint::black_box([depth; 1_000]);
    overflow(depth + 1) + kept[0]
}

fn main() -> Result<ExitCode, Box<dyn Error>> {
    // The first call of `main`: in a child it serves jobs, and does not return.
    let service = ServiceBuilder::new()
        .map_err(|error: DecodeError<serde_json::Error, String>| error.to_string())
        .layer(DecodeLayer::json())
        .service_fn(run);
    process::serve_json(service);
    work()
}

// === in the worker ===

#[tokio::main]
async fn work() -> Result<ExitCode, Box<dyn Error>> {
    let pid = id();
    let queue = Broker::new().queue("jobs").dead_letter("dead").declare();
    for job in 0..JOBS {
        queue.publish(serde_json::to_vec(&Deed::of(job))?);
    }

    // A job that takes its process down does so again, and is a dead letter at its second delivery, and one
    // that passes its time limit at its third.
    let decision = ack_on_success().crash_limit(2).delivery_limit(3);
    let layer = SentinelLayer::new(SettlePolicy::new(decision)).timeout(Duration::from_secs(1));
    let pool = ProcessPool::json::<u32, String>(PROCESSES).memory(256 << 20);

    let emptied = queue.clone();
    let jobs = queue.subscribe(PROCESSES)?;
    Consumer::new(jobs, pool)
        .sentinel(layer)
        .with_graceful_shutdown(async move { emptied.emptied().await })
        .run()
        .await?;

    let letters = queue.dead_letters();
    let mut reasons = BTreeMap::new();
    for letter in &letters {
        let reason = letter.death.reason.message.as_deref();
        let reason = reason.unwrap_or("the job was stopped at its time limit");
        *reasons.entry(reason.to_owned()).or_insert(0) += 1;
    }
    for (reason, number) in &reasons {
        println!("{number} dead letters: {reason}");
    }
    let acked = queue.counts().acked as usize;
    let lost = JOBS.saturating_sub(acked + letters.len());
    println!(
        "settled {} of {JOBS} jobs: {acked} completed, {} dead letters; lost {lost}; the worker is still process {pid}",
        acked + letters.len(),
        letters.len(),
    );
    Ok(match (lost, id() == pid) {
        (0, true) => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}
