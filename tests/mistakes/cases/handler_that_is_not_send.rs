// error[E0277]: `Rc<i32>` cannot be sent between threads safely
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
    let shared = std::rc::Rc::new(0);
    let service = ServiceBuilder::new()
        .layer(layer)
        .service_fn(move |_: Delivery<u32>| {
            let _ = &shared;
            ready(Ok::<_, Infallible>(()))
        });
    Consumer::new(jobs, service).await.unwrap();
}
