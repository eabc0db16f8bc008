// error[E0277]: `futures_util::stream::Empty<Result<Delivery<u32>, Infallible>>` is not a `Subscription`
use std::{convert::Infallible, future::ready};

use tower::ServiceBuilder;
use tower_sentinel::{
    Consumer, SentinelLayer, SettlePolicy, ack_on_success, broker::memory::Delivery,
};

#[tokio::main]
async fn main() {
    let jobs = futures_util::stream::empty::<Result<Delivery<u32>, Infallible>>();
    let layer = SentinelLayer::new(SettlePolicy::new(ack_on_success()));
    let service = ServiceBuilder::new()
        .layer(layer)
        .service_fn(|_: Delivery<u32>| ready(Ok::<_, Infallible>(())));
    Consumer::new(jobs, service).await.unwrap();
}
