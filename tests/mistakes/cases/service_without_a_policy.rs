// error[E0277]: a `Consumer` can't tell from `std::io::Error` whether the delivery is settled
use std::future::ready;

use tower::service_fn;
use tower_sentinel::{
    Consumer,
    broker::memory::{Broker, Delivery},
};

#[tokio::main]
async fn main() {
    let jobs = Broker::<u32>::new()
        .queue("jobs")
        .declare()
        .subscribe(1)
        .unwrap();
    let service = service_fn(|_: Delivery<u32>| ready(Err::<(), _>(std::io::Error::other("down"))));
    Consumer::new(jobs, service).run().await.unwrap();
}
