// error[E0277]: `u64` is not a tag that can be settled
use std::{convert::Infallible, future::ready};

use tower::ServiceBuilder;
use tower_sentinel::{SentinelLayer, SettlePolicy, ack_on_success};

struct Number(u64);

impl tower_sentinel::Job for Number {
    type Tag = u64;

    fn tag(&self) -> u64 {
        self.0
    }
}

#[tokio::main]
async fn main() {
    let layer = SentinelLayer::new(SettlePolicy::new(ack_on_success()));
    let mut service = ServiceBuilder::new()
        .layer(layer)
        .service_fn(|_: Number| ready(Ok::<_, Infallible>(())));
    tower::Service::call(&mut service, Number(1)).await.unwrap();
}
