//! Connections and subscriptions, and the errors if they fail.

use tower_sentinel::broker::nats::{
    ConnectError, Pull, SubscriptionError,
    async_nats::jetstream::consumer::{self, pull},
    connect,
};

use super::{SOON, jobs, server::Server};
use crate::port::free_port;

#[tokio::test]
async fn a_consumer_that_wants_no_answers_is_refused() {
    let jobs = jobs(SOON).await;
    let config = pull::Config {
        durable_name: Some("all".into()),
        ack_policy: consumer::AckPolicy::All,
        ..pull::Config::default()
    };
    let consumer = jobs.context.create_consumer_on_stream(config, "dead");
    consumer.await.unwrap();
    let subscribing = Pull::new("dead", "all").subscribe(&jobs.context);
    let error = subscribing.await.unwrap_err();
    assert!(matches!(error, SubscriptionError::NotExplicit), "{error}");
}

#[tokio::test]
async fn a_server_that_is_down_at_the_start_is_named() {
    let port = free_port();
    let error = connect(&format!("nats://user:secret@127.0.0.1:{port}")).await;
    let error = error.unwrap_err();
    assert!(
        matches!(error, ConnectError::Unreachable { .. }),
        "{error:?}"
    );
    let message = format!("{error:#}");
    let start = format!("nats at 127.0.0.1:{port} can't be reached: ");
    assert!(message.starts_with(&start), "{message}");
    assert!(
        !message.contains("secret") && !message.contains('\n'),
        "{message}"
    );
}

#[tokio::test]
async fn wrong_credentials_are_told_from_a_server_that_is_down() {
    let server = Server::start_with(&["--user", "worker", "--pass", "r@ght"]);
    let address = server.address();
    for login in ["worker:wrong@", ""] {
        let error = connect(&format!("nats://{login}{address}")).await;
        let error = error.unwrap_err();
        assert!(matches!(error, ConnectError::Denied { .. }), "{error:?}");
        let message = format!("{error:#}");
        let start = format!("nats at {address} refuses the credentials: ");
        assert!(message.starts_with(&start), "{message}");
        assert!(!message.contains("wrong"), "{message}");
    }
    connect(&format!("nats://worker:r%40ght@{address}"))
        .await
        .unwrap();
}
