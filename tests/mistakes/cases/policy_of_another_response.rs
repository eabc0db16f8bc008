// error[E0631]: type mismatch in closure arguments
use std::{convert::Infallible, future::ready};

use tower::{ServiceBuilder, service_fn};
use tower_sentinel::{
    Consumer, SentinelLayer,
    broker::memory::{Broker, Delivery},
};

#[tokio::main]
async fn main() {
    let jobs = Broker::<u32>::new()
        .queue("jobs")
        .declare()
        .subscribe(1)
        .unwrap();
    let policy = service_fn(|_: tower_sentinel::Report<_, String, Infallible>| {
        ready(Ok::<_, Infallible>(()))
    });
    let service = ServiceBuilder::new()
        .layer(SentinelLayer::new(policy))
        .service_fn(|_: Delivery<u32>| ready(Ok::<_, Infallible>(())));
    Consumer::new(jobs, service).await.unwrap();
}
