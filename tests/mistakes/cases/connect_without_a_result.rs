// error[E0271]: expected `Ready<Deliveries<u32>>` to be a future that resolves to `Result<_, _>`, but it resolves to `Deliveries<u32>`
use std::{convert::Infallible, future::ready};

use tower::ServiceBuilder;
use tower_sentinel::{
    Consumer, SentinelLayer, SettlePolicy, ack_on_success,
    broker::memory::{Broker, Delivery},
};

#[tokio::main]
async fn main() {
    let queue = Broker::<u32>::new().queue("jobs").declare();
    let connect = move || ready(queue.subscribe(1).unwrap());
    Consumer::reconnecting(connect, |shutdown| {
        ServiceBuilder::new()
            .layer(SentinelLayer::new(SettlePolicy::new(ack_on_success())).shutdown(shutdown))
            .service_fn(|_: Delivery<u32>| ready(Ok::<_, Infallible>(())))
    })
    .run()
    .await
    .unwrap();
}
