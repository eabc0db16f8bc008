// error[E0631]: type mismatch in closure arguments
use std::{convert::Infallible, future::ready};

use tower::ServiceBuilder;
use tower_sentinel::{
    Consumer, SentinelLayer, SettlePolicy, ack_on_success,
    broker::memory::{Broker, Delivery},
};

#[tokio::main]
async fn main() {
    let jobs = Broker::<u32>::new()
        .queue("jobs")
        .declare()
        .subscribe(1)
        .unwrap();
    let layer = SentinelLayer::new(SettlePolicy::new(ack_on_success()));
    let service = ServiceBuilder::new()
        .layer(layer)
        .service_fn(|_: Delivery<String>| ready(Ok::<_, Infallible>(())));
    Consumer::new(jobs, service).await.unwrap();
}
