//! Traces of a delivery.

use tower_sentinel::{
    Job,
    broker::nats::async_nats::HeaderMap,
    settle::{Messaging, Settle},
};

use super::{SOON, jobs, next};

const TRACEPARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

#[tokio::test]
async fn a_tag_says_its_stream_the_id_of_the_message_and_the_trace_of_its_sender() {
    let jobs = jobs(SOON).await;
    let mut deliveries = jobs.subscribe(2).await;

    jobs.publish("one").await;
    let job = next(&mut deliveries).await;
    let expected = Messaging::new("nats", "jobs")
        .consumer_group("workers")
        .message_id("1");
    assert_eq!(job.tag().messaging(), Some(expected.clone()));
    assert_eq!(job.messaging(), Some(expected));

    let mut headers = HeaderMap::new();
    // As Go's client writes it.
    headers.insert("Traceparent", TRACEPARENT);
    headers.insert("tracestate", "k=v");
    headers.insert("Nats-Msg-Id", "m-7");
    let ack = jobs
        .context
        .publish_with_headers("jobs", headers, "two".into());
    ack.await.unwrap().await.unwrap();
    let job = next(&mut deliveries).await;
    let expected = Messaging::new("nats", "jobs")
        .consumer_group("workers")
        .message_id("m-7")
        .traceparent(Some(TRACEPARENT))
        .tracestate(Some("k=v"));
    assert_eq!(job.tag().messaging(), Some(expected));
}
