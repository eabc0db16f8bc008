//! The worker of the README; `worker` is the same with all that a process needs.

use serde::Deserialize;
use std::{io, process::ExitCode, time::Duration};
use tokio::signal::ctrl_c;
use tower::{Layer, service_fn};
use tower_sentinel::broker::rabbitmq::Queue;
use tower_sentinel::{
    Consumer, DecisionExt, DecodeLayer, SentinelLayer, SettlePolicy, ack_on_success,
};

#[derive(Deserialize)]
struct Order {
    id: u64,
}

async fn process(order: Order) -> io::Result<()> {
    println!("order {}", order.id);
    Ok(())
}

#[tokio::main]
async fn main() -> ExitCode {
    tracing_subscriber::fmt().init(); // from level INFO on: each connect, and why an order failed
    let decision = ack_on_success()
        .reject_undecodable() // to `orders.dead`, with the reason
        .backoff(Duration::from_secs(1)..=Duration::from_secs(60)) // failures come back later
        .delivery_limit(5); // and are rejected in the end
    let orders = Queue::quorum("orders") // 64 at once: its default prefetch
        .dead_letter("orders.dead")
        .connector("amqp://guest:guest@127.0.0.1:5672/%2f") // one address, or those of a cluster
        .declare_queues();
    let interrupted = || async { ctrl_c().await.expect("ctrl-c can be waited for") };
    Consumer::reconnecting(orders, |_| DecodeLayer::json().layer(service_fn(process)))
        .sentinel(SentinelLayer::new(SettlePolicy::new(decision))) // for 30 s each by default
        .with_graceful_shutdown(interrupted()) // lets what runs end
        .with_forced_shutdown(interrupted()) // at the second time: stops it, and gives it back
        .run()
        .await
        .inspect_err(|error| eprintln!("error: {error:#}"))
        .map_or(ExitCode::FAILURE, |_| ExitCode::SUCCESS)
}
