//! Connections and subscriptions, and the errors if they fail.

use std::time::Duration;

use tokio::{
    io::AsyncReadExt,
    net::TcpListener,
    time::{Instant, timeout},
};
use tower_sentinel::{
    Job, Verdict,
    broker::rabbitmq::{
        self, ConnectError, Queue, QueueKind, SubscriptionError, lapin::ConnectionProperties,
    },
    settle::Settle,
};

use super::{
    KINDS, Scene, next,
    server::{Server, shared},
    settle,
};
use crate::{conformance::eventually, proxy::Proxy};

#[tokio::test]
async fn a_server_that_is_silent_is_given_up_on() {
    let silent = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let address = silent.local_addr().unwrap();
    let accepted = tokio::spawn(async move { silent.accept().await.unwrap().0 });
    let connecting = format!("amqp://guest:secret@{address}/%2f?connection_timeout=300");
    let started = Instant::now();
    let error = rabbitmq::connect(&connecting).await.unwrap_err();
    let limit = Duration::from_millis(300);
    assert!(started.elapsed() >= limit);
    assert!(
        matches!(error, ConnectError::TimedOut { limit: found, .. } if found == limit),
        "{error:?}"
    );
    let line = format!("rabbitmq at {address} did not respond within 300ms");
    assert_eq!(error.to_string(), line);
    // Nothing is left behind: lapin's thread would wait for as long as the server does.
    let mut server_side = accepted.await.unwrap();
    let mut sent = Vec::new();
    let end = timeout(Duration::from_secs(5), server_side.read_to_end(&mut sent));
    end.await.expect("the connection is closed").unwrap();
}

#[tokio::test]
async fn a_subscription_that_is_not_answered_is_given_up_on() {
    for kind in KINDS {
        let test = "a_subscription_that_is_not_answered_is_given_up_on";
        let scene = Scene::new(test, kind).await;
        let proxy = Proxy::start(shared().host()).await;
        let address = format!("amqp://guest:guest@{}/%2f", proxy.address());
        let connection = rabbitmq::connect(&address).await.unwrap();
        proxy.stall();
        let limit = Duration::from_millis(300);
        let queue = scene.queue().subscribe_timeout(limit);
        let started = Instant::now();
        let error = queue.subscribe(&connection).await.unwrap_err();
        assert!(started.elapsed() >= limit);
        let is_late =
            matches!(&error, SubscriptionError::TimedOut { limit: found, .. } if *found == limit);
        assert!(is_late, "{error:?}");
        let line = format!("no subscription to \"{}\" within 300ms", scene.name);
        assert_eq!(error.to_string(), line);
    }
}

#[tokio::test]
async fn wrong_credentials_are_told_in_a_line() {
    let address = shared().address_of("guest", "secret");
    let error = rabbitmq::connect(&address).await.unwrap_err();
    assert!(matches!(error, ConnectError::Denied { .. }), "{error:?}");
    let line = error.to_string();
    assert!(line.starts_with("rabbitmq at 127.0.0.1:"), "{line}");
    assert!(line.ends_with("refuses the credentials"), "{line}");

    let address = shared().address().replace("%2f", "nowhere");
    let error = rabbitmq::connect(&address).await.unwrap_err();
    assert!(
        matches!(error, ConnectError::NoVirtualHost { .. }),
        "{error:?}"
    );

    for address in ["amqp:guest:secret", "http://guest:secret@x", "secret"] {
        let error = rabbitmq::connect(address).await.unwrap_err();
        assert!(
            matches!(error, ConnectError::InvalidAddress { .. }),
            "{error:?}"
        );
        assert!(
            !format!("{error} {error:?}").contains("secret"),
            "{error:?}"
        );
    }
}

#[tokio::test]
async fn a_queue_that_does_not_exist_is_refused() {
    let connection = rabbitmq::connect(&shared().address()).await.unwrap();
    let error = Queue::classic("no such queue").subscribe(&connection).await;
    let error = error.unwrap_err();
    assert!(
        matches!(error, SubscriptionError::Refused { .. }),
        "{error:?}"
    );
    let error = Queue::classic("x".repeat(250)).subscribe(&connection).await;
    let error = error.unwrap_err();
    assert!(
        matches!(error, SubscriptionError::NameTooLong { .. }),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_classic_queue_taken_for_a_quorum_queue_tells_no_count() {
    // With a name so long that the server's text has no room for the type.
    let scene = Scene::new(&"q".repeat(200), QueueKind::Classic).await;
    let queue = Queue::quorum(&scene.name);
    let mut jobs = queue.subscribe(&scene.connection).await.unwrap();
    scene.publish("one").await;
    settle(next(&mut jobs).await.tag(), Verdict::retry())
        .await
        .unwrap();
    let job = next(&mut jobs).await;
    assert_eq!(job.tag().deliveries(), None);
    assert_eq!(job.tag().redelivered(), Some(true));
    settle(job.tag(), Verdict::Ack).await.unwrap();
    scene.assert_empty(jobs).await;
}

/// Waits until the server has a connection with this name and heartbeat.
async fn has_heartbeat(server: &Server, name: &str, seconds: u16) {
    let code = format!(
        r#"Has = fun([{{timeout, Found}}, {{client_properties, Properties}}]) ->
            Found =:= {seconds} andalso lists:member({{<<"connection_name">>, longstr, <<"{name}">>}}, Properties)
        end,
        lists:any(Has, rabbit_networking:connection_info_all([timeout, client_properties]))"#
    );
    eventually(Some("true".to_owned()), async || server.eval(&code).await).await;
}

#[tokio::test]
async fn a_silent_server_is_noticed_by_its_missing_heartbeats() {
    let server = shared();
    for (parameter, seconds) in [("", 10), ("?heartbeat=7", 7), ("?heartbeat=0", 60)] {
        let name = format!("heartbeats.{seconds}");
        let properties = ConnectionProperties::default().with_connection_name(name.as_str().into());
        let address = format!("amqp://{}/%2f{parameter}", server.host());
        let connected = rabbitmq::connect_with(properties, Default::default(), &address).await;
        let connection = connected.unwrap();
        assert_eq!(connection.configuration().heartbeat(), seconds);
        has_heartbeat(server, &name, seconds).await;
    }
}

#[tokio::test]
async fn the_connection_that_publishes_has_the_same_heartbeat() {
    let test = "the_connection_that_publishes_has_the_same_heartbeat";
    let scene = Scene::new(test, QueueKind::Classic).await;
    let address = format!("amqp://{}/%2f?heartbeat=9", shared().host());
    let connection = rabbitmq::connect(&address).await.unwrap();
    let _jobs = scene.queue().subscribe(&connection).await.unwrap();
    let name = "tower-sentinel: retries and dead letters";
    has_heartbeat(shared(), name, 9).await;
}
