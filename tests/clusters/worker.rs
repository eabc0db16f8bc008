//! A worker in a process of its own, and the jobs that it does.

use std::{fmt, time::Duration};

use tokio::time::sleep;
use tower::service_fn;
use tower_sentinel::{
    Consumer, DecisionExt, Job, SentinelLayer, Verdict, ack_on_success,
    consumer::{Connect, Subscription, connect_fn},
    settle::Settle,
};

use crate::{
    child::{Ledger, asked_to_end, recording, setting},
    nats, rabbitmq, redis,
};

/// The path of the test that is a worker.
pub(crate) const MODULE: &str = module_path!();

pub(crate) const PREFETCH: usize = 32;

/// What becomes of a job, which is a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// It is acked.
    Good,
    /// Its first delivery fails, and is retried after a while.
    Flaky,
    /// It is rejected.
    Bad,
}

impl Kind {
    pub(crate) fn of(job: u32) -> Self {
        match (job % 20, job % 50) {
            (3, _) => Kind::Flaky,
            (_, 7) => Kind::Bad,
            _ => Kind::Good,
        }
    }
}

/// Failure of a job; prints the job.
#[derive(Clone, Debug)]
struct Failure {
    job: String,
    kind: Kind,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.job)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "it is a process that the other tests start"]
async fn worker() {
    let broker = setting("BROKER").expect("it is a process that the other tests start");
    tracing_subscriber::fmt()
        .with_ansi(false)
        .with_writer(std::io::stderr)
        .init();
    let addresses = setting("ADDRESSES").unwrap();
    let addresses = addresses.split(',').map(str::to_owned).collect();
    match broker.as_str() {
        "rabbitmq" => work(rabbitmq::connect::connector(addresses)).await,
        "nats" => work(nats::connect::connector(addresses)).await,
        "sentinel" => work(redis::connect::by_sentinel(addresses)).await,
        "cluster" => work(redis::connect::to_cluster(addresses)).await,
        broker => panic!("no worker for {broker}"),
    }
}

/// Subscribes by `first` at the first time, and by `all` from then on.
pub(crate) fn first_then<C: Connect>(
    first: C,
    mut all: C,
) -> impl Connect<Subscription = C::Subscription, Error = C::Error, Future = C::Future> {
    let mut first = Some(first);
    connect_fn(move |attempt| match first.take() {
        Some(mut first) => first.connect(attempt),
        None => all.connect(attempt),
    })
}

/// Works until the end is requested.
async fn work<C, B>(connect: C)
where
    C: Connect<Subscription = B, Error: fmt::Display + Send, Future: Send> + Send + 'static,
    B: Subscription<Error: fmt::Display + Send> + Send + 'static,
    B::Job: Job<Tag: Settle<Error: Send, Future: Send> + fmt::Debug + Send + Sync>
        + AsRef<[u8]>
        + Send
        + 'static,
{
    let ledger = Ledger::own();
    let time = Duration::from_millis(setting("WORK_MS").unwrap().parse().unwrap());
    let decision = ack_on_success()
        .on_error(|failure: &Failure| match failure.kind {
            Kind::Bad => Verdict::Reject,
            Kind::Good | Kind::Flaky => Verdict::retry(),
        })
        .backoff(Duration::from_millis(500)..=Duration::from_secs(4));
    let policy = recording(decision, ledger.clone());
    let handler = service_fn(move |delivery: B::Job| {
        let ledger = ledger.clone();
        async move {
            let job = String::from_utf8(delivery.as_ref().to_vec()).unwrap();
            ledger.write("run", &job);
            sleep(time).await;
            let kind = Kind::of(job.parse().unwrap());
            let is_first = delivery.tag().deliveries() == Some(1);
            match kind {
                Kind::Flaky if is_first => Err(Failure { job, kind }),
                Kind::Bad => Err(Failure { job, kind }),
                Kind::Good | Kind::Flaky => Ok(job),
            }
        }
    });
    let consumer = Consumer::reconnecting(connect, move |_| handler.clone())
        .sentinel(SentinelLayer::new(policy))
        .with_graceful_shutdown(asked_to_end());
    let summary = consumer
        .run()
        .await
        .unwrap_or_else(|error| panic!("{error}"));
    println!("{summary:?}");
}
