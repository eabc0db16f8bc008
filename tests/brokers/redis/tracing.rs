//! Traces of a delivery.

use tower_sentinel::{
    Job,
    broker::redis::redis::Commands,
    settle::{Messaging, Settle},
};

use super::{STREAM, add, group, next, server::Server};

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
    let expected = Messaging::new("redis", STREAM).message_id(without);
    assert_eq!(delivery.tag().messaging(), Some(expected));

    let delivery = next(&mut deliveries).await;
    let expected = Messaging::new("redis", STREAM)
        .message_id(with)
        .traceparent(Some(TRACEPARENT));
    assert_eq!(delivery.tag().messaging(), Some(expected));
    assert_eq!(delivery.payload(), Some(&b"two"[..]));
}
