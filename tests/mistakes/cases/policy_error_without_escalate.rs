// error[E0277]: a `Consumer` can't tell from `Lost` whether the delivery is settled
use std::{convert::Infallible, future::ready};

use tower::{ServiceBuilder, service_fn};
use tower_sentinel::{
    Consumer, SentinelLayer,
    broker::memory::{Broker, Delivery},
};

#[derive(Debug)]
struct Lost;

impl std::fmt::Display for Lost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("lost")
    }
}

#[tokio::main]
async fn main() {
    let jobs = Broker::<u32>::new()
        .queue("jobs")
        .declare()
        .subscribe(1)
        .unwrap();
    let policy =
        service_fn(|_: tower_sentinel::Report<_, (), Infallible>| ready(Err::<(), _>(Lost)));
    let service = ServiceBuilder::new()
        .layer(SentinelLayer::new(policy))
        .service_fn(|_: Delivery<u32>| ready(Ok::<_, Infallible>(())));
    Consumer::new(jobs, service).run().await.unwrap();
}
