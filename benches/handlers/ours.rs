//! A consumer as in the README.

use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tower::{Layer, service_fn};
use tower_sentinel::{
    Consumer, DecisionExt, DecodeLayer, SentinelLayer, SettlePolicy, ack_on_success,
    broker::rabbitmq::Queue,
};

use crate::handler_NUMBER::process;

pub async fn consume(shutdown: CancellationToken) -> Result<(), crate::BoxError> {
    let decision = ack_on_success()
        .reject_undecodable()
        .backoff(Duration::from_secs(1)..=Duration::from_secs(60))
        .delivery_limit(5);
    let jobs = Queue::quorum("jobs-NUMBER")
        .dead_letter("jobs-NUMBER.dead")
        .connector("amqp://127.0.0.1:5672/%2f");
    Consumer::reconnecting(jobs, |_| DecodeLayer::json().layer(service_fn(process)))
        .sentinel(SentinelLayer::new(SettlePolicy::new(decision)))
        .with_graceful_shutdown(shutdown.cancelled_owned())
        .run()
        .await?;
    Ok(())
}
