// error[E0277]: `OnError<AckOnSuccess, {closure@src/bin/decision_for_another_error.rs:18:46: 18:66}>` is not a `Decision` for the tag `DeliveryTag<u32>` and `Outcome<(), Infallible>`
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
    use tower_sentinel::{DecisionExt, Verdict};
    let decision = ack_on_success().on_error(|_: &std::io::Error| Verdict::Reject);
    let service = ServiceBuilder::new()
        .layer(SentinelLayer::new(SettlePolicy::new(decision)))
        .service_fn(|_: Delivery<u32>| ready(Ok::<_, Infallible>(())));
    Consumer::new(jobs, service).await.unwrap();
}
