//! A queue of jobs that complete, fail, panic and hang: each gets its one answer.
//!
//! ```sh
//! cargo run --example quickstart
//! ```

use std::{
    collections::{BTreeMap, BTreeSet},
    error::Error,
    future, io, panic,
    process::ExitCode,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use tokio::task::JoinSet;
use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
use tower_sentinel::{Job, OutcomeKind, Report, SentinelLayer};

const JOBS: u64 = 1_000;
const PREFETCH: usize = 32;

#[derive(Clone, Copy)]
struct Delivery(u64);

impl Job for Delivery {
    type Tag = u64;

    fn tag(&self) -> u64 {
        self.0
    }
}

async fn process(Delivery(job): Delivery) -> io::Result<()> {
    tokio::time::sleep(Duration::from_millis(job % 7)).await;
    match job % 10 {
        7 => Err(io::Error::other("the disk is full")),
        8 => panic!("job {job} is poison"),
        9 => future::pending().await,
        _ => Ok(()),
    }
}

/// The broker's side: which deliveries have no answer yet.
#[derive(Clone, Default)]
struct Unanswered(Arc<Mutex<BTreeSet<u64>>>);

impl Unanswered {
    fn lock(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.0.lock().expect("nobody panics with the lock")
    }

    fn deliver(&self, tag: u64) -> Delivery {
        self.lock().insert(tag);
        Delivery(tag)
    }

    fn answer(&self, tag: u64) -> io::Result<()> {
        match self.lock().remove(&tag) {
            true => Ok(()),
            false => Err(io::Error::other(format!("no such delivery: {tag}"))),
        }
    }
}

#[tokio::main]
async fn main() -> Result<ExitCode, Box<dyn Error>> {
    // The policy hears of each panic; standard error need not.
    panic::set_hook(Box::new(|_| ()));

    let unanswered = Unanswered::default();
    let broker = unanswered.clone();
    let policy = service_fn(move |report: Report<u64, (), io::Error>| {
        let answer = broker.answer(report.tag);
        future::ready(answer.map(|()| report.outcome.kind()))
    });
    let mut handler = ServiceBuilder::new()
        .concurrency_limit(PREFETCH)
        .layer(SentinelLayer::new(policy).timeout(Duration::from_millis(50)))
        .service_fn(process);

    let mut answers = JoinSet::new();
    for tag in 0..JOBS {
        let handler = handler.ready().await?;
        answers.spawn(handler.call(unanswered.deliver(tag)));
    }
    let mut kinds = BTreeMap::new();
    while let Some(answer) = answers.join_next().await {
        match answer? {
            Ok(kind) => *kinds.entry(kind).or_default() += 1,
            Err(error) => eprintln!("error: {error}"),
        }
    }

    let count = |kind| kinds.get(&kind).copied().unwrap_or(0);
    let settled = kinds.values().sum::<u64>();
    let lost = unanswered.lock().len();
    println!(
        "settled {settled} of {JOBS} jobs: {} completed, {} failed, {} panicked, {} timed out; \
         lost {lost}",
        count(OutcomeKind::Completed),
        count(OutcomeKind::Failed),
        count(OutcomeKind::Panicked),
        count(OutcomeKind::TimedOut),
    );
    Ok(match (settled, lost) {
        (JOBS, 0) => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}
