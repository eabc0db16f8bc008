//! Connections that break at each request.

use std::time::Duration;

use tokio::time::timeout;
use tower_sentinel::broker::nats::{Pull, SubscriptionError, async_nats::jetstream, connect};

use super::{SOON, jobs};
use crate::{log::Log, proxy::Proxy};

#[tokio::test]
async fn connections_that_break_at_each_request_end_the_stream() {
    let (log, _guard) = Log::start();
    let jobs = jobs(SOON).await;
    let proxy = Proxy::without(b".MSG.NEXT.", jobs.server.address()).await;
    let context = jetstream::new(connect(&proxy.address()).await.unwrap());
    let pull = Pull::new("jobs", "workers").idle_heartbeat(Duration::from_millis(250));
    // Silence alone would end it much later.
    let pull = pull.reconnect_limit(100 * SOON);
    let mut deliveries = pull.subscribe(&context).await.unwrap();
    let next = timeout(3 * SOON, futures_util::StreamExt::next(&mut deliveries)).await;
    let error = next.expect("an end").unwrap().unwrap_err();
    assert!(
        matches!(error, SubscriptionError::Breaking { times: 5 }),
        "{error}"
    );
    let is_said = |line: &String| line.contains("connection broken right after a request");
    assert!(log.lines().iter().any(is_said), "{:?}", log.lines());
}
