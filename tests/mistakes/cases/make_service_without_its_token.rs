// error[E0593]: closure is expected to take 1 argument, but it takes 0 arguments
use std::{convert::Infallible, future::ready};

use tower::ServiceBuilder;
use tower_sentinel::{
    Consumer, SentinelLayer, SettlePolicy, ack_on_success,
    broker::memory::{Broker, Delivery},
};

#[tokio::main]
async fn main() {
    let queue = Broker::<u32>::new().queue("jobs").declare();
    let layer = SentinelLayer::new(SettlePolicy::new(ack_on_success()));
    let service = ServiceBuilder::new()
        .layer(layer)
        .service_fn(|_: Delivery<u32>| ready(Ok::<_, Infallible>(())));
    Consumer::reconnecting(move || ready(queue.subscribe(1)), move || service.clone())
        .await
        .unwrap();
}
