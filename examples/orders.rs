//! The worker of the README; `worker` is the same with all that a process needs.

use serde::Deserialize;
use std::{error::Error, io, process::ExitCode, time::Duration};
use tokio::signal::ctrl_c;
use tower::ServiceBuilder;
use tower_sentinel::broker::rabbitmq::lapin::{options::QueueDeclareOptions, types::FieldTable};
use tower_sentinel::broker::rabbitmq::{self, Deliveries, Queue};
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

async fn subscribe(orders: Queue) -> Result<Deliveries, Box<dyn Error + Send + Sync>> {
    let connection = rabbitmq::connect("amqp://guest:guest@127.0.0.1:5672/%2f").await?;
    let channel = connection.create_channel().await?;
    for name in ["orders", "orders.dead"] {
        let durable = QueueDeclareOptions::durable();
        channel
            .queue_declare(name.into(), durable, FieldTable::default())
            .await?;
    }
    Ok(orders.subscribe(&connection).await?)
}

async fn run() -> Result<(), Box<dyn Error + Send + Sync>> {
    let second = Duration::from_secs(1);
    let decision = ack_on_success()
        .reject_undecodable() // to `orders.dead`, with the reason
        .backoff(second..=60 * second) // what failed, panicked or hung comes back later
        .delivery_limit(5); // and is rejected in the end
    let orders = Queue::classic("orders")
        .prefetch(64)
        .dead_letter("orders.dead");
    let gate = orders.gate(); // 64 at once: a permit is held until the broker has its answer
    let connect = move || subscribe(orders.clone());
    let interrupted = || async { ctrl_c().await.expect("ctrl-c can be waited for") };
    let summary = Consumer::reconnecting(connect, move |shutdown| {
        let policy = SettlePolicy::new(decision);
        ServiceBuilder::new()
            .layer(gate.clone())
            .layer(
                SentinelLayer::new(policy)
                    .timeout(30 * second)
                    .shutdown(shutdown),
            )
            .layer(DecodeLayer::json())
            .service_fn(process)
    })
    .max_attempts(10) // in a row
    .with_graceful_shutdown(interrupted()) // lets what runs end
    .with_forced_shutdown(interrupted()) // at the second time: stops it, and gives it back
    .run()
    .await?;
    println!("{} orders are settled", summary.answered);
    Ok(())
}

#[tokio::main]
async fn main() -> ExitCode {
    tracing_subscriber::fmt().init(); // from level INFO on: each connect, and why an order failed
    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
