// error[E0277]: the trait bound `SentinelLayer<SettlePolicy>: tower_service::Service<Delivery<u32>>` is not satisfied
use tower_sentinel::{
    Consumer, SentinelLayer, SettlePolicy, ack_on_success, broker::memory::Broker,
};

#[tokio::main]
async fn main() {
    let jobs = Broker::<u32>::new()
        .queue("jobs")
        .declare()
        .subscribe(1)
        .unwrap();
    let layer = SentinelLayer::new(SettlePolicy::new(ack_on_success()));
    Consumer::new(jobs, layer).await.unwrap();
}
