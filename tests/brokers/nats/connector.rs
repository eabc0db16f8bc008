//! [`Connector`]: its client, its declarations and its errors.

use std::time::Duration;

use tokio::time::timeout;
use tower_sentinel::{
    broker::nats::{
        ConnectError, Connector, ConnectorError, Deliveries, Pull, SubscriptionError,
        async_nats::{
            ConnectOptions,
            jetstream::{self, consumer::pull, stream},
        },
        connect,
    },
    consumer::Connect,
};

use super::{SOON, closed, next, server::Server};
use crate::proxy::Proxy;

fn stream(name: &str) -> stream::Config {
    stream::Config {
        name: name.into(),
        ..stream::Config::default()
    }
}

fn declaring(connector: Connector) -> Connector {
    let config = pull::Config {
        ack_wait: Duration::from_secs(7),
        ..pull::Config::default()
    };
    let connector = connector.stream(stream("jobs")).stream(stream("dead"));
    connector.consumer(config)
}

fn pull() -> Pull {
    Pull::new("jobs", "workers").dead_letter("dead")
}

async fn session(connector: &mut Connector) -> Result<Deliveries, ConnectorError> {
    timeout(SOON, connector.connect(1)).await.unwrap()
}

async fn publish(address: &str, payload: &'static str) {
    let context = jetstream::new(connect(address).await.unwrap());
    let publishing = context.publish("jobs", payload.into()).await;
    publishing.unwrap().await.unwrap();
}

#[tokio::test]
async fn it_declares_what_is_missing_and_changes_nothing() {
    let server = Server::start();
    let mut connector = declaring(pull().connector(server.url()));
    drop(session(&mut connector).await.unwrap());
    let context = jetstream::new(connect(server.url()).await.unwrap());
    let consumer = context.get_consumer_from_stream::<pull::Config, _, _>("workers", "jobs");
    let config = consumer.await.unwrap().cached_info().config.clone();
    assert_eq!(config.ack_wait, Duration::from_secs(7));
    assert_eq!(config.durable_name.as_deref(), Some("workers"));

    let other = pull::Config::default();
    let mut connector = pull()
        .connector(server.url())
        .stream(stream("jobs"))
        .consumer(other);
    publish(&server.url(), "a").await;
    let mut deliveries = session(&mut connector).await.unwrap();
    assert_eq!(next(&mut deliveries).await.payload(), b"a");
    let consumer = context.get_consumer_from_stream::<pull::Config, _, _>("workers", "jobs");
    let config = consumer.await.unwrap().cached_info().config.clone();
    assert_eq!(config.ack_wait, Duration::from_secs(7));
}

#[tokio::test]
async fn by_default_it_declares_nothing() {
    let server = Server::start();
    let mut connector = pull().connector(server.url());
    let error = session(&mut connector).await.unwrap_err();
    assert!(
        matches!(
            error,
            ConnectorError::Subscribe(SubscriptionError::StreamDeleted)
        ),
        "{error:?}"
    );
    assert_eq!(error.to_string(), "the stream does not exist");
}

#[tokio::test]
async fn the_sessions_share_a_client_while_it_is_connected() {
    let server = Server::start();
    let proxy = Proxy::start(server.address()).await;
    let mut connector = declaring(pull().connector(format!("nats://{}", proxy.address())));
    for _ in 0..3 {
        drop(session(&mut connector).await.unwrap());
        drop(session(&mut connector.clone()).await.unwrap());
    }
    assert_eq!(proxy.taken(), 1);
}

#[tokio::test]
async fn a_session_does_not_wait_for_a_client_that_is_not_connected() {
    let mut servers = [Server::start(), Server::start()];
    let addresses = [servers[0].url(), servers[1].url()];
    // The client would pause for an hour.
    let options = ConnectOptions::new().reconnect_delay_callback(|attempt| match attempt {
        0 | 1 => Duration::ZERO,
        _ => SOON * 360,
    });
    let connector = pull()
        .reconnect_limit(Duration::from_secs(1))
        .connector(addresses.clone());
    let mut connector = declaring(connector.connect_options(options));
    let mut deliveries = session(&mut connector).await.unwrap();
    for server in &mut servers {
        server.kill();
    }
    closed(&mut deliveries).await.unwrap_err();
    servers[1].restart();
    // A subscription by the client that was kept would take 5 s to fail.
    let soon = Duration::from_secs(4);
    let connecting = timeout(soon, connector.connect(1)).await;
    let mut deliveries = connecting.unwrap().unwrap();
    publish(&addresses[1], "b").await;
    assert_eq!(next(&mut deliveries).await.payload(), b"b");
}

#[tokio::test]
async fn a_consumer_that_was_deleted_is_declared_anew() {
    let server = Server::start();
    let mut connector = declaring(pull().connector(server.url()));
    let mut deliveries = session(&mut connector).await.unwrap();
    let context = jetstream::new(connect(server.url()).await.unwrap());
    context.delete_stream("jobs").await.unwrap();
    closed(&mut deliveries).await.unwrap_err();
    let mut deliveries = session(&mut connector).await.unwrap();
    publish(&server.url(), "a").await;
    assert_eq!(next(&mut deliveries).await.payload(), b"a");
}

#[tokio::test]
async fn its_errors_and_its_debug_have_no_credentials() {
    let address = "nats://us3r:s3cr3t@127.0.0.1:9";
    for addresses in [vec![address], vec![address, "nats://127.0.0.1:11"]] {
        let mut connector = pull().connector(addresses);
        let error = session(&mut connector).await.unwrap_err();
        assert!(matches!(error, ConnectorError::Connect(_)), "{error:?}");
        let text = format!("{error} {error:#} {error:?} {connector:?}");
        assert!(
            text.contains("nats at 127.0.0.1:9 can't be reached: "),
            "{text}"
        );
        assert!(!text.contains("us3r") && !text.contains("s3cr3t"), "{text}");
    }
    let mut connector = pull().connector(format!("{address};{address}"));
    let error = session(&mut connector).await.unwrap_err();
    assert!(
        matches!(
            error,
            ConnectorError::Connect(ConnectError::InvalidAddress(_))
        ),
        "{error:?}"
    );
    let text = format!("{error:#} {error:?} {connector:?}");
    assert!(!text.contains("s3cr3t"), "{text}");
}
