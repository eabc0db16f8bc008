//! Traces of a delivery.

use std::time::{Duration, SystemTime};

use tower_sentinel::{
    Job, Verdict,
    broker::redis::{ConsumerGroup, redis::Commands},
    settle::{Messaging, Settle},
};

use super::{GROUP, STREAM, add, group, next, server::Server, settle};

const TRACEPARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

#[tokio::test]
async fn a_tag_says_its_stream_the_id_of_the_entry_and_the_trace_of_its_sender() {
    let server = Server::start();
    let mut connection = server.inspect();
    let without = add(&mut connection, "one");
    let fields = [
        ("payload", &b"two"[..]),
        ("traceparent", TRACEPARENT.as_bytes()),
        ("tracestate", b"\xff"),
    ];
    let with: String = connection.xadd(STREAM, "*", &fields).unwrap();
    let mut deliveries = group().connect(server.url()).await.unwrap();

    let delivery = next(&mut deliveries).await;
    let expected = Messaging::new("redis", STREAM)
        .consumer_group(GROUP)
        .message_id(without);
    assert_eq!(delivery.tag().messaging(), Some(expected.clone()));
    assert_eq!(delivery.messaging(), Some(expected));

    let delivery = next(&mut deliveries).await;
    let expected = Messaging::new("redis", STREAM)
        .consumer_group(GROUP)
        .message_id(with)
        .traceparent(Some(TRACEPARENT));
    assert_eq!(delivery.tag().messaging(), Some(expected));
    assert_eq!(delivery.payload(), Some(&b"two"[..]));
}

#[tokio::test]
async fn a_message_is_published_when_its_entry_is_added_also_after_a_retry() {
    let server = Server::start();
    let mut connection = server.inspect();
    let before = SystemTime::now();
    add(&mut connection, "one");
    let after = SystemTime::now();
    let mut deliveries = group().connect(server.url()).await.unwrap();

    let delivery = next(&mut deliveries).await;
    let published = delivery.tag().published_at().unwrap();
    // An id has whole milliseconds.
    assert!(before - Duration::from_millis(1) <= published && published <= after);
    assert_eq!(delivery.queued_since(), Some(published));
    for verdict in [
        Verdict::retry(),
        Verdict::retry_after(Duration::from_millis(20)),
        Verdict::Ack,
    ] {
        let delivery = match verdict == Verdict::retry() {
            true => delivery.clone(),
            false => next(&mut deliveries).await,
        };
        assert_eq!(delivery.tag().published_at(), Some(published));
        let is_first = verdict == Verdict::retry();
        assert_eq!(delivery.queued_since().is_some(), is_first, "{verdict}");
        settle(&delivery, verdict).await.unwrap();
    }

    // An id that somebody else made is no time.
    let _: String = connection
        .xadd("other", "5-1", &[("payload", "two")])
        .unwrap();
    let group = ConsumerGroup::new("other", GROUP);
    let mut deliveries = group.connect(server.url()).await.unwrap();
    let delivery = next(&mut deliveries).await;
    assert_eq!(delivery.tag().published_at(), None);
    assert_eq!(delivery.queued_since(), None);
}
