// error: future cannot be sent between threads safely
use std::convert::Infallible;

use tower::ServiceBuilder;
use tower_sentinel::{
    Consumer, SentinelLayer, SettlePolicy, ack_on_success,
    broker::memory::{Broker, Delivery},
};

async fn work(_: Delivery<u32>) -> Result<(), Infallible> {
    let shared = std::rc::Rc::new(0);
    tokio::task::yield_now().await;
    drop(shared);
    Ok(())
}

#[tokio::main]
async fn main() {
    let jobs = Broker::<u32>::new()
        .queue("jobs")
        .declare()
        .subscribe(1)
        .unwrap();
    let layer = SentinelLayer::new(SettlePolicy::new(ack_on_success()));
    let service = ServiceBuilder::new().layer(layer).service_fn(work);
    Consumer::new(jobs, service).await.unwrap();
}
