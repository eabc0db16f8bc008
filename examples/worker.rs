//! A worker to start from: supervised JSON jobs from RabbitMQ, on a connection that is renewed if it is lost.
//!
//! ```sh
//! cargo run --features json,rabbitmq --example worker -- --queue orders
//! ```
//!
//! It declares a quorum queue `orders`, and `orders.dead` for its dead letters. Publish orders such as
//! `{"article": "tea", "quantity": 2}`. After SIGTERM or Ctrl-C it takes no more jobs, and running jobs may
//! finish. A second signal stops them. In both cases each of them is settled. The signals are those of Unix.
//!
//! Replace `Order`, `OrderError` and `process` by your own.

use std::{
    error::Error,
    fmt,
    future::Future,
    io::{self, IsTerminal},
    net::SocketAddr,
    process::ExitCode,
    time::Duration,
};

use axum::{Router, http::StatusCode, routing::get};
use clap::Parser;
use serde::Deserialize;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    time::sleep,
};
use tokio_util::sync::CancellationToken;
use tower::ServiceBuilder;
use tower_sentinel::{
    Consumer, DecisionExt, DecodeLayer, IntensityLayer, SentinelLayer, SettlePolicy, Verdict,
    ack_on_success,
    broker::rabbitmq::{Connector, Queue},
    consumer::Watch,
    decode::DecodeError,
    panic_hook,
};
use tracing_subscriber::{EnvFilter, filter::LevelFilter};

type BoxError = Box<dyn Error + Send + Sync>;

// === the configuration ===

/// Processes orders from a RabbitMQ queue. `RUST_LOG` sets the log filter.
#[derive(Clone, Debug, Parser)]
struct Options {
    /// Address of the broker, or those of its nodes, separated by commas
    #[arg(
        long,
        env,
        default_value = "amqp://127.0.0.1:5672/%2f",
        hide_env_values = true
    )]
    amqp_addr: String,

    /// Queue of the jobs; rejected jobs go to the queue of this name with `.dead` appended
    #[arg(long, env, default_value = "orders")]
    queue: String,

    /// Number of jobs in flight at once
    #[arg(long, env, default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..))]
    prefetch: u16,

    /// Seconds that one job may take
    #[arg(long, env, default_value_t = 30)]
    time_limit: u64,

    /// Number of deliveries after which a job is a dead letter
    #[arg(long, env, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    delivery_limit: u32,

    /// Where `/livez` and `/readyz` are served; nowhere by default
    #[arg(long, env)]
    probe_addr: Option<SocketAddr>,

    /// Seconds that running jobs may take to finish after the first signal
    #[arg(long, env, default_value_t = 30)]
    drain_timeout: u64,
}

impl Options {
    /// Returns what connects, declares the queues and subscribes, at the start and after each lost connection.
    fn connector(&self) -> Connector {
        Queue::quorum(&self.queue)
            .prefetch(self.prefetch.into())
            .dead_letter(format!("{}.dead", self.queue))
            .connector(&self.amqp_addr)
            .declare_queues()
    }
}

// === the jobs ===

#[derive(Debug, Deserialize)]
struct Order {
    article: String,
    quantity: u32,
}

#[derive(Debug)]
enum OrderError {
    /// A retry does not help.
    Empty,
    /// Not the fault of the job.
    #[allow(dead_code)] // until `process` calls something that can be down
    WarehouseDown(BoxError),
}

impl fmt::Display for OrderError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            OrderError::Empty => f.write_str("the order is empty"),
            OrderError::WarehouseDown(error) => write!(f, "the warehouse is down: {error}"),
        }
    }
}

/// Placeholder for the work. A job may run more than once, so it should be idempotent.
async fn process(order: Order) -> Result<(), OrderError> {
    if order.quantity == 0 {
        return Err(OrderError::Empty);
    }
    sleep(Duration::from_millis(100)).await;
    tracing::info!(order.article, order.quantity, "sent");
    Ok(())
}

// === the worker ===

async fn run(options: Options) -> Result<(), BoxError> {
    let seconds = Duration::from_secs;
    let (time_limit, drain_timeout) = (seconds(options.time_limit), seconds(options.drain_timeout));
    let delivery_limit = options.delivery_limit;

    let decision = ack_on_success()
        .on_error(|error: &DecodeError<_, OrderError>| match error {
            DecodeError::Inner(OrderError::Empty) => Verdict::Reject,
            _ => Verdict::retry(),
        })
        .reject_undecodable()
        .backoff(seconds(1)..=seconds(60))
        .delivery_limit(delivery_limit);
    // Made once, so that it stays paused while the consumer reconnects.
    let intensity = IntensityLayer::new();

    let (first_signal, second_signal) = signals()?;
    let layer = SentinelLayer::new(SettlePolicy::new(decision))
        .timeout(time_limit)
        // For jobs that take the process down: they have no outcome to decide on.
        .delivery_limit(2 * delivery_limit)
        .process_span();
    let consumer = Consumer::reconnecting(options.connector(), move |_| {
        ServiceBuilder::new()
            .layer(intensity.clone())
            .layer(DecodeLayer::json())
            .service_fn(process)
    })
    .sentinel(layer) // with the prefetch as its limit
    .with_graceful_shutdown(first_signal)
    .with_forced_shutdown(second_signal)
    .drain_timeout(drain_timeout)
    .watchdog(seconds(10), seconds(60));
    if let Some(address) = options.probe_addr {
        let listener = TcpListener::bind(address).await?;
        let probes = probes(consumer.watch());
        tokio::spawn(async move { axum::serve(listener, probes).await });
    }
    let summary = consumer.run().await?;
    tracing::info!(
        summary.answered,
        summary.failed,
        summary.abandoned,
        "worker ended on request"
    );
    Ok(())
}

// === the process ===

/// Returns the probes of Kubernetes. An outage of the broker makes the worker unready, and is no reason to restart it.
fn probes(watch: Watch) -> Router {
    fn status(is_well: bool) -> StatusCode {
        match is_well {
            true => StatusCode::OK,
            false => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
    let (live, ready) = (watch.clone(), watch);
    Router::new()
        .route("/livez", get(async move || status(live.is_live())))
        .route("/readyz", get(async move || status(ready.is_ready())))
}

/// Returns two futures, which resolve at the first and at the second SIGTERM or SIGINT.
///
/// After this call a signal does not end the process by itself.
fn signals() -> io::Result<(
    impl Future<Output = ()> + Send + 'static,
    impl Future<Output = ()> + Send + 'static,
)> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let [first, second] = [(); 2].map(|()| CancellationToken::new());
    let tokens = [first.clone(), second.clone()];
    tokio::spawn(async move {
        for token in tokens {
            tokio::select! {
                _ = terminate.recv() => tracing::info!("SIGTERM"),
                _ = interrupt.recv() => tracing::info!("SIGINT"),
            }
            token.cancel();
        }
    });
    Ok((first.cancelled_owned(), second.cancelled_owned()))
}

#[tokio::main]
async fn main() -> ExitCode {
    let options = Options::parse();
    let filter = EnvFilter::builder()
        .with_default_directive(LevelFilter::INFO.into())
        .from_env_lossy();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .init();
    panic_hook::install();

    match run(options).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "worker failed");
            ExitCode::FAILURE
        }
    }
}
