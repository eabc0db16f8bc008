// error[E0277]: the trait bound `Handler: Clone` is not satisfied
use std::{convert::Infallible, future::ready};

use tower_sentinel::{
    Consumer, SentinelLayer, SettlePolicy, ack_on_success,
    broker::memory::{Broker, Delivery},
};

struct Handler;

impl tower::Service<Delivery<u32>> for Handler {
    type Response = ();
    type Error = Infallible;
    type Future = std::future::Ready<Result<(), Infallible>>;

    fn poll_ready(
        &mut self,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Result<(), Infallible>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Delivery<u32>) -> Self::Future {
        ready(Ok(()))
    }
}

#[tokio::main]
async fn main() {
    let jobs = Broker::<u32>::new()
        .queue("jobs")
        .declare()
        .subscribe(1)
        .unwrap();
    let layer = SentinelLayer::new(SettlePolicy::new(ack_on_success()));
    Consumer::new(jobs, Handler).sentinel(layer).await.unwrap();
}
