//! Throughput and latency of a supervised consumer, compared with a loop written by hand on the bare client.
//!
//! Both read the same queue of the same broker with the same prefetch, run as many jobs at once, and settle
//! each message. `cargo bench --features nats,rabbitmq,redis --bench brokers` prints the ratios of their
//! throughputs, and of the 99th percentiles of the time from a message's arrival to its settlement. They are
//! medians over pairs of rounds that ran right after each other, since a machine's speed drifts more than
//! these differ. A broker that can't be reached is left out; the addresses are those of the examples:
//! `AMQP_ADDR`, `NATS_ADDR`, `REDIS_ADDR`. Names of brokers on the command line choose among them: `rabbitmq`
//! (a classic queue), `quorum` (RabbitMQ, too), `nats`, `redis`.
//!
//! On the servers of another suite, which are started for it:
//!
//! ```sh
//! .ci/make-suite forky /var/tmp/forky
//! export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER=".ci/in-suite /var/tmp/forky .ci/with-servers"
//! cargo bench --all-features --bench brokers
//! ```

use std::{
    env,
    error::Error,
    fmt::Debug,
    future::{Future, IntoFuture},
    pin::Pin,
    process,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use futures_util::{Stream, StreamExt};
use hdrhistogram::Histogram;
use tokio::{
    sync::Semaphore,
    task::yield_now,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tower::{Service, ServiceBuilder, layer::layer_fn, limit::ConcurrencyLimitLayer};
use tower_sentinel::{
    Consumer, Job, SentinelLayer, SettlePolicy, ack_on_success, consumer::Subscription,
    settle::Settle,
};

#[path = "brokers/nats.rs"]
mod nats;
#[path = "brokers/rabbitmq.rs"]
mod rabbitmq;
#[path = "brokers/redis.rs"]
mod redis;

type BoxError = Box<dyn Error + Send + Sync>;

const PREFETCH: usize = 64;

// === measurements ===

/// Counts the settlements of a round, and how long each took from the arrival of its message.
struct Meter {
    begun: Instant,
    left: AtomicU64,
    latencies: Mutex<Histogram<u64>>,
    done: CancellationToken,
}

#[derive(Clone, Copy)]
struct Figures {
    per_second: f64,
    p99: f64,
}

impl Meter {
    fn new(jobs: u64) -> Arc<Self> {
        Arc::new(Self {
            begun: now(),
            left: AtomicU64::new(jobs),
            latencies: Mutex::new(Histogram::new(3).expect("three digits are supported")),
            done: CancellationToken::new(),
        })
    }

    fn settled(&self, arrived: Instant) {
        let latency = u64::try_from(arrived.elapsed().as_nanos()).expect("no job takes centuries");
        let mut latencies = self.latencies.lock().expect("nobody panics with it");
        latencies.record(latency).expect("it resizes itself");
        drop(latencies);
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.done.cancel();
        }
    }

    async fn figures(&self, jobs: u64) -> Figures {
        self.done.cancelled().await;
        let elapsed = self.begun.elapsed();
        let latencies = self.latencies.lock().expect("nobody panics with it");
        Figures {
            per_second: jobs as f64 / elapsed.as_secs_f64(),
            p99: latencies.value_at_quantile(0.99) as f64 / 1e9,
        }
    }
}

// The wall clock, not tokio's: this is a benchmark.
#[allow(clippy::disallowed_methods)]
fn now() -> Instant {
    Instant::now()
}

/// Waits once, as a job that does I/O.
async fn process() {
    yield_now().await;
}

// === ours ===

/// Measures each call of the service that it wraps.
struct Timed<S> {
    inner: S,
    meter: Arc<Meter>,
}

impl<S, J> Service<J> for Timed<S>
where
    S: Service<J, Response: Send, Error: Send, Future: Send + 'static>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, job: J) -> Self::Future {
        let (arrived, meter) = (now(), Arc::clone(&self.meter));
        let settling = self.inner.call(job);
        Box::pin(async move {
            let settled = settling.await;
            meter.settled(arrived);
            settled
        })
    }
}

/// Consumes until all jobs of a round are settled.
async fn supervised<B, J>(
    deliveries: B,
    gate: ConcurrencyLimitLayer,
    jobs: u64,
) -> Result<Figures, BoxError>
where
    B: Subscription<Job = J, Error: Error + Send + Sync> + Send + 'static,
    J: Job + Send + 'static,
    J::Tag: Settle<Future: 'static> + Debug + Send + 'static,
{
    let meter = Meter::new(jobs);
    let shutdown = CancellationToken::new();
    let timed = Arc::clone(&meter);
    let service = ServiceBuilder::new()
        .layer(gate)
        .layer(layer_fn(move |inner| Timed {
            inner,
            meter: Arc::clone(&timed),
        }))
        .layer(SentinelLayer::new(SettlePolicy::new(ack_on_success())).shutdown(shutdown.clone()))
        .service_fn(|job: J| async move {
            process().await;
            drop(job);
            Ok::<_, BoxError>(())
        });
    let consumer = Consumer::new(deliveries, service)
        .shutdown(shutdown)
        .with_graceful_shutdown(meter.done.clone().cancelled_owned());
    let consumer = tokio::spawn(IntoFuture::into_future(consumer));
    let figures = meter.figures(jobs).await;
    let summary = consumer.await??;
    assert_eq!(summary.answered, jobs, "each was delivered once");
    Ok(figures)
}

// === by hand ===

/// Spawns the work and the `ack` of each message, as many at once as `permits` has.
async fn by_hand<T, E, F>(
    permits: Arc<Semaphore>,
    messages: impl Stream<Item = Result<T, E>>,
    ack: impl Fn(T) -> F + Clone + Send + 'static,
    jobs: u64,
) -> Result<Figures, BoxError>
where
    T: Send + 'static,
    E: Into<BoxError>,
    F: Future<Output = Result<(), BoxError>> + Send,
{
    let meter = Meter::new(jobs);
    let mut messages = std::pin::pin!(messages);
    for _ in 0..jobs {
        let permit = Arc::clone(&permits).acquire_owned().await?;
        let message = messages.next().await.ok_or("the stream ended")?;
        let message = message.map_err(Into::into)?;
        let (arrived, meter, ack) = (now(), Arc::clone(&meter), ack.clone());
        tokio::spawn(async move {
            process().await;
            ack(message).await.expect("an ack is sent");
            meter.settled(arrived);
            drop(permit);
        });
    }
    Ok(meter.figures(jobs).await)
}

// === the rounds ===

/// A broker with its own empty queue.
trait Broker: Sized {
    const NAME: &str;
    /// The variable of its address, and the default.
    const ADDRESS: (&str, &str);
    /// The client's ways to ack.
    const ACKS: &[&str];

    async fn connect(address: &str, name: String) -> Result<Self, BoxError>;
    async fn publish(&self, jobs: u64) -> Result<(), BoxError>;
    async fn ours(&self, jobs: u64) -> Result<Figures, BoxError>;
    async fn bare(&self, ack: &str, jobs: u64) -> Result<Figures, BoxError>;
    async fn delete(self) -> Result<(), BoxError>;
}

#[derive(Clone, Copy)]
struct Size {
    rounds: usize,
    jobs: u64,
}

async fn compare<B: Broker>(size: Size) -> Result<(), BoxError> {
    if !is_wanted(B::NAME) {
        return Ok(());
    }
    let (variable, default) = B::ADDRESS;
    let address = env::var(variable).unwrap_or_else(|_| default.to_owned());
    let name = format!("tower-sentinel-bench-{}", process::id());
    let connecting = timeout(Duration::from_secs(10), B::connect(&address, name));
    let connected = connecting
        .await
        .unwrap_or_else(|elapsed| Err(elapsed.into()));
    let broker = match connected {
        Ok(broker) => broker,
        Err(error) => {
            println!("{:<9} left out: {error}", B::NAME);
            return Ok(());
        }
    };
    for ack in B::ACKS {
        ratios(&broker, ack, size).await?;
    }
    broker.delete().await
}

async fn ratios<B: Broker>(broker: &B, ack: &str, size: Size) -> Result<(), BoxError> {
    let Size { rounds, jobs } = size;
    let (mut pairs, mut ratios) = (Vec::new(), Vec::new());
    for round in 0..=rounds {
        // The two alternate in going first.
        let mut pair = [None; 2];
        for turn in [round % 2, 1 - round % 2] {
            broker.publish(jobs).await?;
            // Time for the broker's work in the background.
            sleep(Duration::from_millis(100)).await;
            pair[turn] = Some(match turn {
                0 => broker.ours(jobs).await?,
                _ => broker.bare(ack, jobs).await?,
            });
        }
        let ([Some(ours), Some(bare)], 1..) = (pair, round) else {
            continue; // the first round warms up
        };
        pairs.push((ours, bare));
        ratios.push((ours.per_second / bare.per_second, ours.p99 / bare.p99));
    }
    let throughput = quartiles(ratios.iter().map(|ratio| ratio.0));
    let p99 = quartiles(ratios.iter().map(|ratio| ratio.1));
    let median = |value: fn(&(Figures, Figures)) -> f64| quartiles(pairs.iter().map(value))[1];
    println!(
        "{:<9} {ack:<11} throughput {} ({:.0} / {:.0} per s)   p99 {} ({:.2} / {:.2} ms)",
        B::NAME,
        show(throughput),
        median(|pair| pair.0.per_second),
        median(|pair| pair.1.per_second),
        show(p99),
        median(|pair| pair.0.p99 * 1e3),
        median(|pair| pair.1.p99 * 1e3),
    );
    Ok(())
}

fn quartiles(values: impl Iterator<Item = f64>) -> [f64; 3] {
    let mut values: Vec<_> = values.collect();
    values.sort_by(f64::total_cmp);
    [1, 2, 3].map(|quarter| values[values.len() * quarter / 4])
}

fn show([low, median, high]: [f64; 3]) -> String {
    format!("{median:.3} [{low:.3} to {high:.3}]")
}

#[tokio::main(worker_threads = 2)]
async fn main() -> Result<(), BoxError> {
    // `cargo test --benches` only wants to know whether this runs.
    let size = match env::args().any(|argument| argument == "--bench") {
        true => Size {
            rounds: 11,
            jobs: 10_000,
        },
        false => Size {
            rounds: 1,
            jobs: 100,
        },
    };
    println!(
        "ours / by hand, {PREFETCH} at once; medians of {} paired rounds of {} jobs [quartiles]",
        size.rounds, size.jobs
    );
    compare::<rabbitmq::Rabbitmq<false>>(size).await?;
    compare::<rabbitmq::Rabbitmq<true>>(size).await?;
    compare::<nats::Nats>(size).await?;
    compare::<redis::Redis>(size).await
}

/// Returns whether `broker` is among the names on the command line, or there are none.
fn is_wanted(broker: &str) -> bool {
    let mut names = env::args()
        .skip(1)
        .filter(|name| !name.starts_with('-'))
        .peekable();
    names.peek().is_none() || names.any(|name| name == broker)
}
