// error[E0277]: `Silent` doesn't implement `std::fmt::Display`
use std::future::ready;

use tower::ServiceBuilder;
use tower_sentinel::{
    Consumer, SentinelLayer, SettlePolicy, ack_on_success,
    broker::memory::{Broker, Delivery},
};

struct Silent;

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
        .service_fn(|_: Delivery<u32>| ready(Err::<(), _>(Silent)));
    Consumer::new(jobs, service).await.unwrap();
}
