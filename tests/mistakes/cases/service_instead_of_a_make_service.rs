// error[E0277]: expected a `FnMut(tokio_util::sync::cancellation_token::CancellationToken)` closure, found `Sentinel<ServiceFn<{closure@...}>, ...>`
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
    Consumer::reconnecting(move || ready(queue.subscribe(1)), service)
        .await
        .unwrap();
}
