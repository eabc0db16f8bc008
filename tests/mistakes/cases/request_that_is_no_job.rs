// error[E0277]: `String` is not a `Job`
use std::{convert::Infallible, future::ready};

use tower::ServiceBuilder;
use tower_sentinel::{SentinelLayer, SettlePolicy, ack_on_success};

#[tokio::main]
async fn main() {
    let layer = SentinelLayer::new(SettlePolicy::new(ack_on_success()));
    let mut service = ServiceBuilder::new()
        .layer(layer)
        .service_fn(|_: String| ready(Ok::<_, Infallible>(())));
    tower::Service::call(&mut service, String::new())
        .await
        .unwrap();
}
