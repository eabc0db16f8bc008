//! Several addresses: their order, their limits, their credentials and their errors.

use std::time::Duration;

use tokio::{
    net::TcpListener,
    time::{sleep, timeout},
};
use tower_sentinel::broker::nats::{
    ConnectError,
    async_nats::{Client, ConnectOptions, Request, connection::State},
    connect, connect_with,
};

use super::{SOON, server::Server};
use crate::port::free_port;

const REFUSED: &str = "nats://us3r:s3cr3t@127.0.0.1:9";

fn all_of(error: &ConnectError) -> String {
    format!("{error} {error:#} {error:?}")
}

async fn connected(client: &Client) {
    let connecting = async {
        while client.connection_state() != State::Connected {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(SOON, connecting).await.unwrap();
}

/// Waits for a response of a server, over the connection that the client has now.
async fn responds(client: &Client) {
    // One that is sent as a server is killed has no response.
    let request = || Request::new().timeout(Some(Duration::from_millis(500)));
    let responding = async {
        let subject = "$JS.API.INFO";
        while client.send_request(subject, request()).await.is_err() {}
    };
    timeout(SOON, responding).await.unwrap();
}

#[tokio::test]
async fn the_address_that_works_is_found() {
    let server = Server::start();
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let silent = format!("nats://{}", listener.local_addr().unwrap());
    let works = server.url();
    responds(&connect([REFUSED, &works]).await.unwrap()).await;
    responds(&connect(format!("{REFUSED}, {works}")).await.unwrap()).await;
    // A silent one costs its limit, and no more.
    responds(&connect(vec![silent.clone(), works.clone()]).await.unwrap()).await;
    let options = ConnectOptions::new().connection_timeout(Duration::from_millis(200));
    let client = connect_with(options, [silent, works]).await.unwrap();
    responds(&client).await;
}

#[tokio::test]
async fn the_error_has_each_address_with_its_reason_and_no_credentials() {
    let server = Server::start_with(&["--user", "worker", "--pass", "right"]);
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let silent = listener.local_addr().unwrap();
    let denied = server.address();
    let options = || ConnectOptions::new().connection_timeout(Duration::from_millis(200));
    let list = format!("{REFUSED},nats://us3r:s3cr3t@{silent},nats://{denied}");
    let error = connect_with(options(), list).await.unwrap_err();
    let ConnectError::AllFailed { errors } = &error else {
        panic!("{error:?}");
    };
    assert_eq!(errors.len(), 3);
    let text = all_of(&error);
    for part in [
        "nats at 127.0.0.1:9 can't be reached: ",
        &format!("nats at {silent} can't be reached: timed out"),
        &format!("nats at {denied} refuses the credentials: "),
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(!text.contains("s3cr3t") && !text.contains("us3r"), "{text}");
    assert!(!error.to_string().contains('\n'), "{error}");
}

#[tokio::test]
async fn one_that_is_invalid_is_refused_before_any_is_tried() {
    let server = Server::start();
    let works = server.url();
    for list in [
        vec![works.clone(), "nats://us3r:s3/cr3t@host".to_owned()],
        // Separated by a sign that is none.
        vec![format!("{works};nats://us3r:s3cr3t@host")],
        vec![format!("{works} nats://us3r:s3cr3t@host")],
        vec![],
    ] {
        let error = connect(&list).await.unwrap_err();
        assert!(
            matches!(error, ConnectError::InvalidAddress(_)),
            "{list:?}: {error}"
        );
        let text = all_of(&error);
        assert!(!text.contains("s3") && !text.contains("cr3t"), "{text}");
    }
}

#[tokio::test]
async fn the_credentials_of_one_address_are_used_for_all() {
    let server = Server::start_with(&["--user", "worker", "--pass", "r@ght"]);
    let address = server.address();
    let first = "nats://worker:r%40ght@127.0.0.1:9";
    connect([first, &format!("nats://{address}")])
        .await
        .unwrap();
    connect([first, &format!("nats://worker:r%40ght@{address}")])
        .await
        .unwrap();
    let other = format!("nats://other:s3cr3t@{address}");
    let error = connect([first, &other]).await.unwrap_err();
    assert!(
        matches!(error, ConnectError::DifferentCredentials),
        "{error}"
    );
    let text = all_of(&error);
    assert!(!text.contains("s3cr3t") && !text.contains("ght"), "{text}");
}

#[tokio::test]
async fn each_record_of_a_name_is_tried() {
    let server = Server::start();
    let port = server.port();
    // It is not the address that the server listens at.
    let other = TcpListener::bind(("::1", port)).await;
    let options = ConnectOptions::new().connection_timeout(Duration::from_millis(300));
    let client = connect_with(options, format!("nats://localhost:{port}"))
        .await
        .unwrap();
    responds(&client).await;
    drop(other);
    connect(format!("nats://localhost:{port}")).await.unwrap();
}

#[tokio::test]
async fn a_client_reconnects_to_another_address() {
    let mut servers = [Server::start(), Server::start()];
    let client = connect([servers[0].url(), servers[1].url()]).await.unwrap();
    for nth in [0, 1, 0] {
        servers[nth].kill();
        responds(&client).await;
        servers[nth].restart();
    }
    connected(&client).await;
}

#[tokio::test]
async fn a_client_that_needs_no_connection_at_first_knows_all_addresses() {
    let port = free_port();
    let options = ConnectOptions::new().retry_on_initial_connect();
    let list = format!("nats://127.0.0.1:9,nats://127.0.0.1:{port}");
    let client = timeout(SOON, connect_with(options, list))
        .await
        .unwrap()
        .unwrap();
    assert_ne!(client.connection_state(), State::Connected);
    let _server = Server::start_at(port);
    connected(&client).await;
}
