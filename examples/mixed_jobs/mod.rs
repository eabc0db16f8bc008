//! Program shared by the examples `rabbitmq`, `nats` and `redis`.
//!
//! It publishes jobs that complete, fail, panic, hang or make no sense, and consumes them. At the end it
//! compares the counts of the broker with the expected ones. A job that goes wrong is retried once; the
//! second time it becomes a dead letter. `crate` is the example, with its `Broker` and `Delivery`.

use std::{
    collections::BTreeMap,
    env, error,
    fmt::Display,
    future::{self, IntoFuture},
    num::NonZeroU16,
    panic,
    process::{self, ExitCode},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tower::ServiceBuilder;
use tower_sentinel::{
    Consumer, DecisionExt, Job, SentinelLayer, SettlePolicy, Verdict, ack_on_success,
    outcome::OutcomeKind,
    settle::{Settle, Settled},
};

use crate::{ADDRESS, Broker, Delivery};

const JOBS: u32 = 200;
const TIME_LIMIT: Duration = Duration::from_secs(1);

pub(crate) type BoxError = Box<dyn error::Error + Send + Sync>;

// === the jobs ===

/// Returns the payload of the n-th job, which names its work; `nonsense` is unknown work.
fn payload(n: u32) -> &'static str {
    match n % 10 {
        1 | 6 => "fail once",
        3 => "panic once",
        5 => "hang once",
        8 => "nonsense",
        _ => "work",
    }
}

async fn process(delivery: Delivery) -> Result<(), BoxError> {
    sleep(Duration::from_millis(50)).await;
    let is_first = delivery.tag().deliveries() == Some(1);
    match (delivery.as_ref(), is_first) {
        (b"work", _) | (b"fail once" | b"panic once" | b"hang once", false) => Ok(()),
        (b"fail once", true) => Err("a connection was reset".into()),
        (b"panic once", true) => panic!("index out of bounds"),
        (b"hang once", true) => future::pending().await,
        (other, _) => Err(format!("unknown work: {}", other.escape_ascii()).into()),
    }
}

// === the consumer ===

/// Number of settlements by outcome and verdict.
type Tally = BTreeMap<(OutcomeKind, &'static str), u32>;

async fn run(broker: Broker, prefetch: u16) -> Result<(), BoxError> {
    for n in 0..JOBS {
        broker.publish(payload(n)).await?;
    }

    let deliveries = broker.subscribe(prefetch.into()).await?;
    println!(
        "consuming {JOBS} jobs from {}, {prefetch} at a time",
        broker.name()
    );

    let shutdown = CancellationToken::new();
    let (settlements, mut settled) = mpsc::unbounded_channel();
    let decision = ack_on_success().delivery_limit(2);
    let service = ServiceBuilder::new()
        .layer(deliveries.gate()) // at most the prefetch, until a job is settled
        .map_response(move |settled: Settled| {
            // Fails after the end, when nobody counts any more.
            settlements.send((settled.kind, settled.verdict)).ok();
            settled
        })
        .layer(
            SentinelLayer::new(SettlePolicy::new(decision))
                .timeout(TIME_LIMIT)
                .shutdown(shutdown.clone()),
        )
        .service_fn(process);
    let done = CancellationToken::new();
    let consumer = Consumer::new(deliveries, service)
        .shutdown(shutdown)
        .with_graceful_shutdown(done.clone().cancelled_owned());
    let consumer = tokio::spawn(consumer.into_future());

    let mut tally = Tally::new();
    let mut left = JOBS;
    while left > 0 {
        // None: the consumer ended too early, and its error is returned below.
        let Some((kind, verdict)) = settled.recv().await else {
            break;
        };
        *tally.entry((kind, verdict.as_str())).or_default() += 1;
        left -= u32::from(matches!(verdict, Verdict::Ack | Verdict::Reject));
    }
    let ready = broker.ready().await?;
    done.cancel();
    consumer.await??;
    for ((kind, verdict), count) in &tally {
        println!("{count:>5} {kind}: {verdict}");
    }

    // Jobs that the consumer left unsettled when it ended. `ready` was counted before that.
    let unacked = broker.unsettled().await? - ready;
    let dead_lettered = broker.dead_lettered().await?;
    broker.delete().await?;

    let poison = (0..JOBS).filter(|&n| payload(n) == "nonsense").count();
    println!(
        "the broker counts: ready = {ready}, unacked = {unacked}, \
         dead-lettered = {dead_lettered}; poison jobs = {poison}"
    );
    match (ready, unacked, dead_lettered == poison as u64) {
        (0, 0, true) => Ok(()),
        _ => Err("the broker's counts are not the expected ones".into()),
    }
}

// === the start ===

/// Returns a name that is unique to this run.
fn unique_name() -> Result<String, BoxError> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos();
    Ok(format!("tower-sentinel-example-{}-{now}", process::id()))
}

/// Connects within 10 s.
async fn connect(address: &str) -> Result<Broker, BoxError> {
    let connecting = Broker::connect(address, unique_name()?);
    let Ok(connected) = timeout(Duration::from_secs(10), connecting).await else {
        // Without its user and password.
        let place = address.rsplit(['@', '/']).find(|part| part.contains(':'));
        let place = place.unwrap_or("its address");
        return Err(format!("no connection to the broker at {place} within 10 s").into());
    };
    connected.map_err(|error| one_line(&error).into())
}

fn one_line(error: &dyn Display) -> String {
    format!("{error:#}").replace('\n', " ")
}

async fn start() -> Result<(), BoxError> {
    let (variable, default) = ADDRESS;
    let address = env::var(variable);
    let address = address.as_deref().unwrap_or(default);
    let prefetch = match env::var("PREFETCH") {
        Ok(prefetch) => match prefetch.parse::<NonZeroU16>() {
            Ok(prefetch) => prefetch.get(),
            Err(error) => return Err(format!("PREFETCH={prefetch}: {error}").into()),
        },
        Err(_) => 10,
    };
    run(connect(address).await?, prefetch).await
}

/// Runs the program against the broker at the example's `ADDRESS`.
pub(crate) async fn main() -> ExitCode {
    // Each panic is counted by its settlement, so it need not go to standard error.
    panic::set_hook(Box::new(|_| ()));

    match start().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
