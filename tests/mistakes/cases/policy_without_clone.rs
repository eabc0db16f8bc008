// error[E0277]: the trait bound `std::sync::Mutex<i32>: Clone` is not satisfied in `{closure@src/bin/policy_without_clone.rs:18:29: 18:80}`
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
    let once = std::sync::Mutex::new(0);
    let policy = service_fn(move |_: tower_sentinel::Report<_, (), Infallible>| {
        *once.lock().unwrap() += 1;
        ready(Ok::<_, Infallible>(()))
    });
    let service = ServiceBuilder::new()
        .layer(SentinelLayer::new(policy))
        .service_fn(|_: Delivery<u32>| ready(Ok::<_, Infallible>(())));
    Consumer::new(jobs, service).await.unwrap();
}
