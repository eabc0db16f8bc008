//! Connections, and the errors if they fail.

use tower_sentinel::broker::redis::{ConnectError, ConsumerGroup, redis::Commands};

use super::{GROUP, STREAM, group, server::Server};
use crate::port::free_port;

#[tokio::test]
async fn a_server_that_is_down_is_named() {
    let port = free_port();
    let url = format!("redis://user:hidden@127.0.0.1:{port}");
    let error = group().connect(url).await.unwrap_err();
    assert!(matches!(error, ConnectError::Unreachable { .. }), "{error}");
    let message = format!("{error:#}");
    let start = format!("redis at 127.0.0.1:{port} can't be reached: ");
    assert!(message.starts_with(&start), "{message}");
    assert!(
        !message.contains("hidden") && !message.contains('\n'),
        "{message}"
    );
}

#[tokio::test]
async fn wrong_credentials_are_told_and_not_repeated() {
    let server = Server::with(&["--requirepass", "secret"]);
    let address = server.host();
    for user in ["", ":wrong@"] {
        let url = format!("redis://{user}{address}");
        let error = group().connect(url).await.unwrap_err();
        assert!(matches!(error, ConnectError::Denied { .. }), "{error}");
        let message = format!("{error:#}");
        let start = format!("redis at {address} refuses the credentials: ");
        assert!(message.starts_with(&start), "{message}");
        assert!(
            !message.contains(":wrong") && !message.contains('\n'),
            "{message}"
        );
    }
    let url = format!("redis://:secret@{address}");
    assert!(group().connect(url).await.is_ok());
}

#[tokio::test]
async fn a_key_that_is_no_stream_is_told() {
    let server = Server::start();
    let () = server.inspect().set(STREAM, "text").unwrap();
    let error = group().connect(server.url()).await.unwrap_err();
    assert!(matches!(error, ConnectError::Group { .. }), "{error}");
    let error = group().connect("amqp://127.0.0.1").await.unwrap_err();
    assert!(matches!(error, ConnectError::InvalidAddress(_)), "{error}");
}

#[test]
fn keys_are_in_the_slot_of_their_stream() {
    for (stream, delayed) in [
        ("jobs", "{jobs}:workers:delayed"),
        ("{acme}:jobs", "{acme}:jobs:workers:delayed"),
    ] {
        let group = ConsumerGroup::new(stream, GROUP);
        assert_eq!(group.delayed_key(), delayed);
    }
}
