//! Passwords and names with signs that have a meaning in an address.

use std::time::Duration;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};
use tower_sentinel::broker::{
    nats,
    rabbitmq::{self, ConnectError},
    redis::ConsumerGroup,
};

use super::{BROKERS, Broker};
use crate::{
    nats::server::Server as Nats, rabbitmq::server::shared as shared_rabbitmq,
    redis::server::Server as Redis,
};

const PASSWORD: &str = "p@ss/w?r#d:%&=+ \u{e4}";
const ENCODED: &str = "p%40ss%2Fw%3Fr%23d%3A%25&=+%20%C3%A4";

#[tokio::test]
async fn a_password_and_a_virtual_host_may_have_any_sign() {
    let server = shared_rabbitmq();
    let vhost = "a/b@c:d #?%\u{e4}";
    server.ctl(&["add_user", "any sign@", PASSWORD]);
    server.ctl(&["add_vhost", vhost]);
    server.ctl(&[
        "set_permissions",
        "-p",
        vhost,
        "any sign@",
        ".*",
        ".*",
        ".*",
    ]);
    let host = server.host();
    let address = format!("amqp://any%20sign%40:{ENCODED}@{host}/a%2Fb%40c%3Ad%20%23%3F%25%C3%A4");
    rabbitmq::connect(&address).await.unwrap();
    // `/` as a virtual host, in each of its forms.
    for path in ["", "/%2f", "//"] {
        let address = format!("amqp://guest:guest@{host}{path}");
        rabbitmq::connect(&address).await.unwrap();
    }
    let address = format!("amqp://guest:guest@{host}/");
    let error = rabbitmq::connect(&address).await.unwrap_err();
    assert!(matches!(error, ConnectError::NoVirtualHost { vhost, .. } if vhost.is_empty()));

    let server = Nats::start_with(&["--user", "any sign@", "--pass", PASSWORD]);
    let address = format!("nats://any%20sign%40:{ENCODED}@{}", server.address());
    nats::connect(&address).await.unwrap();
    let server = Nats::start_with(&["--auth", "a t/k@n"]);
    let address = format!("nats://a%20t%2Fk%40n@{}", server.address());
    nats::connect(&address).await.unwrap();

    let server = Redis::with(&["--requirepass", PASSWORD]);
    let group = ConsumerGroup::new("jobs", "workers");
    let address = format!("redis://:{ENCODED}@127.0.0.1:{}", server.port);
    drop(group.connect(address).await.unwrap());
}

#[tokio::test]
async fn a_password_with_a_bare_sign_is_not_repeated() {
    for broker in BROKERS {
        for sign in ['/', '?', '#'] {
            for rest in [
                format!("us3r:4711{sign}s3cr3t@127.0.0.1:9"),
                format!("4711{sign}s3cr3t@127.0.0.1:9"),
                format!("us3r:s3@4711{sign}cr3t@127.0.0.1:9"),
            ] {
                let error = broker.connect(&broker.address(false, &rest)).await;
                let error = error.unwrap_err();
                assert!(error.contains("is not valid"), "{error}");
                assert!(error.contains("%2F"), "no mend: {error}");
                for part in ["4711", "s3", "cr3t", "us3r"] {
                    assert!(!error.contains(part), "{rest}: {error}");
                }
            }
        }
        // Other addresses that are none.
        for address in [
            "s3cr3t",
            "s3cr3t:s3cr3t@",
            "s3cr3t://s3cr3t",
            "x:s3cr3t@host:port",
        ] {
            let error = broker.connect(address).await.unwrap_err();
            let is_host = broker == Broker::Nats && address == "s3cr3t";
            assert!(is_host || !error.contains("s3cr3t"), "{address}: {error}");
        }
        // A second `@` belongs to the password.
        let address = broker.address(false, "us3r:s3@cr3t@127.0.0.1:9");
        let error = broker.connect(&address).await.unwrap_err();
        assert!(error.contains(" at 127.0.0.1:9 "), "{error}");
        assert!(!error.contains("cr3t"), "{error}");
    }
}

/// A server without TLS gets no part of the credentials from a client that has to use it.
#[tokio::test]
async fn nothing_is_said_in_plain_text_where_tls_is_asked_for() {
    for broker in BROKERS {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let place = listener.local_addr().unwrap();
        let recording = tokio::spawn(async move {
            let (mut client, _) = listener.accept().await.unwrap();
            if broker == Broker::Nats {
                let info = br#"INFO {"server_id":"x","version":"2.9.0","max_payload":1048576}"#;
                client.write_all(info).await.unwrap();
                client.write_all(b"\r\n").await.unwrap();
            }
            let mut said = Vec::new();
            client.read_buf(&mut said).await.unwrap();
            // Not a word that a server of TLS would say.
            client.write_all(b"AMQP\0\0\x09\x01-ERR\r\n").await.unwrap();
            drop(client.shutdown().await);
            drop(client.read_to_end(&mut said).await);
            said
        });
        let address = broker.address(true, &format!("user:s3cr3t@{place}"));
        let error = broker.connect(&address).await.unwrap_err();
        assert!(error.contains(&format!(" at {place}")), "{error}");
        assert!(!error.contains("s3cr3t"), "{error}");
        // For a client that did not even connect.
        drop(TcpStream::connect(place).await);
        let said = timeout(Duration::from_secs(20), recording);
        let said = said.await.expect("the connection is closed").unwrap();
        // Nothing, or a record of TLS: a handshake.
        assert!(
            said.is_empty() || said[..2] == [0x16, 3],
            "{broker:?}: {said:?}"
        );
        let said = String::from_utf8_lossy(&said);
        assert!(!said.contains("s3cr3t"), "{said}");
    }
}
