//! TLS with the listeners of real servers.
#![cfg(feature = "rustls")]

use std::{
    env, fs,
    net::TcpStream,
    path::Path,
    process::{Command, Output},
    thread,
    time::Duration,
};

use tower_sentinel::broker::{
    nats::{self, async_nats::ConnectOptions},
    rabbitmq::{
        self,
        lapin::tcp::{OwnedIdentity, OwnedTLSConfig},
    },
    redis::{
        ConsumerGroup,
        redis::{Client, ClientTlsConfig, TlsCertificates},
    },
};

use super::{
    BROKERS, Broker, all_of,
    certificates::{Authority, Certificate},
    folder::Folder,
};
use crate::{
    child::setting, nats::server::Server as Nats, port::free_port,
    rabbitmq::server::Server as RabbitMq, redis::server::Server as Redis,
};

/// A server with a listener for TLS.
enum Server {
    RabbitMq(RabbitMq, u16),
    Nats(Nats),
    Redis(
        #[expect(dead_code, reason = "it is killed when it is dropped")] Redis,
        u16,
    ),
}

impl Server {
    /// Starts a server that takes clients of `authority`, or anyone.
    fn start(broker: Broker, own: &Certificate, authority: Option<&Path>) -> Self {
        let file = |path: &Path| path.to_str().unwrap().to_owned();
        let (cert, key) = (file(&own.file), file(&own.key));
        let ca = authority.map(file);
        let port = free_port();
        let server = match broker {
            Broker::RabbitMq => {
                let mut options = format!(r#"{{certfile, "{cert}"}}, {{keyfile, "{key}"}}"#);
                if let Some(ca) = ca {
                    options += &format!(
                        r#", {{cacertfile, "{ca}"}}, {{verify, verify_peer}},
                        {{fail_if_no_peer_cert, true}}"#
                    );
                }
                let settings = format!(
                    r#"{{ssl_listeners, [{{"127.0.0.1", {port}}}]}}, {{ssl_options, [{options}]}}"#
                );
                Server::RabbitMq(RabbitMq::start(&settings), port)
            }
            Broker::Nats => {
                let mut options = vec!["--tls", "--tlscert", &cert, "--tlskey", &key];
                if let Some(ca) = &ca {
                    options.extend(["--tlscacert", ca, "--tlsverify"]);
                }
                Server::Nats(Nats::start_with(&options))
            }
            Broker::Redis => {
                let options = [
                    ["--tls-port", &port.to_string()],
                    ["--tls-cert-file", &cert],
                    ["--tls-key-file", &key],
                    // It wants a file in any case.
                    ["--tls-ca-cert-file", ca.as_deref().unwrap_or(&cert)],
                    [
                        "--tls-auth-clients",
                        if ca.is_some() { "yes" } else { "no" },
                    ],
                ];
                Server::Redis(Redis::with(options.as_flattened()), port)
            }
        };
        for _ in 0..600 {
            if TcpStream::connect(("127.0.0.1", server.port())).is_ok() {
                return server;
            }
            thread::sleep(Duration::from_millis(50));
        }
        panic!("no listener for tls of {broker:?}");
    }

    fn port(&self) -> u16 {
        match self {
            Server::RabbitMq(_, port) | Server::Redis(_, port) => *port,
            Server::Nats(server) => server
                .address()
                .rsplit(':')
                .next()
                .unwrap()
                .parse()
                .unwrap(),
        }
    }
}

/// Connects by TLS to `host`.
async fn connect(
    broker: Broker,
    host: &str,
    port: u16,
    authority: Option<&Path>,
    own: Option<&Certificate>,
) -> Result<(), String> {
    let user = if broker == Broker::RabbitMq {
        "guest:guest@"
    } else {
        ""
    };
    let address = broker.address(true, &format!("{user}{host}:{port}"));
    match broker {
        Broker::RabbitMq => {
            let tls = OwnedTLSConfig {
                identity: own.map(|own| OwnedIdentity::PKCS8 {
                    pem: fs::read(&own.file).unwrap(),
                    key: fs::read(&own.key).unwrap(),
                }),
                cert_chain: authority.map(|file| fs::read_to_string(file).unwrap()),
            };
            let connected = rabbitmq::connect_with(Default::default(), tls, &address).await;
            let connection = connected.map_err(|error| all_of(&error))?;
            let channel = connection.create_channel().await;
            channel.map(drop).map_err(|error| all_of(&error))
        }
        Broker::Nats => {
            let mut options = ConnectOptions::new();
            if let Some(file) = authority {
                options = options.add_root_certificates(file.to_owned());
            }
            if let Some(own) = own {
                options = options.add_client_certificate(own.file.clone(), own.key.clone());
            }
            let connected = nats::connect_with(options, &address).await;
            let client = connected.map_err(|error| all_of(&error))?;
            client.flush().await.map_err(|error| all_of(&error))
        }
        Broker::Redis => {
            let group = ConsumerGroup::new("jobs", "workers");
            if authority.is_none() && own.is_none() {
                let connected = group.connect(&address).await;
                return connected.map(drop).map_err(|error| all_of(&error));
            }
            let certificates = TlsCertificates {
                client_tls: own.map(|own| ClientTlsConfig {
                    client_cert: fs::read(&own.file).unwrap(),
                    client_key: fs::read(&own.key).unwrap(),
                }),
                root_cert: authority.map(|file| fs::read(file).unwrap()),
            };
            let client = Client::build_with_tls(&*address, certificates).unwrap();
            let connected = group.connect_with(&client).await;
            connected.map(drop).map_err(|error| all_of(&error))
        }
    }
}

/// Runs a test of this file in a process for which `authority` is that of the system.
///
/// A process has one environment for all of its threads.
fn run(test: &str, authority: &Path, settings: &[(&str, &str)]) -> Output {
    let (_, module) = module_path!().split_once("::").unwrap();
    let settings = settings
        .iter()
        .map(|(name, value)| (format!("TOWER_SENTINEL_TEST_{name}"), value));
    Command::new(env::current_exe().unwrap())
        .args(["--exact", &format!("{module}::{test}")])
        .envs(settings)
        .env("SSL_CERT_FILE", authority)
        .env_remove("SSL_CERT_DIR")
        .output()
        .unwrap()
}

#[test]
fn a_connection_by_tls_is_made_with_the_right_certificates_alone() {
    let test = "a_connection_by_tls_is_made_with_the_right_certificates_alone";
    if setting("UNRELATED").is_none() {
        // Trees of servers may have no authority at all, and lapin wants one.
        let folder = Folder::new();
        let unrelated = Authority::new(&folder, "unrelated");
        let output = run(test, &unrelated.file, &[("UNRELATED", "yes")]);
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{said}");
        return;
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        for broker in BROKERS {
            right_certificates_alone(broker).await;
        }
    });
}

async fn right_certificates_alone(broker: Broker) {
    let folder = Folder::new();
    let authority = Authority::new(&folder, "authority");
    let other = Authority::new(&folder, "other");
    let certificate = authority.issue("server", "localhost", true);
    let client = authority.issue("client", "client", true);
    let foreign = other.issue("foreign", "client", true);
    let server = Server::start(broker, &certificate, Some(&authority.file));
    let port = server.port();

    let (right, own) = (Some(&*authority.file), Some(&client));
    connect(broker, "localhost", port, right, own)
        .await
        .unwrap();

    let refused = async |host, authority, own, reason: &str| {
        let error = connect(broker, host, port, authority, own)
            .await
            .unwrap_err();
        let line = error.lines().next().unwrap();
        assert!(line.contains(&format!(" at {host}:{port} ")), "{line}");
        assert!(
            error.contains(reason),
            "{broker:?} and not {reason}: {error}"
        );
    };
    refused("localhost", Some(&*other.file), own, "UnknownIssuer").await;
    refused("127.0.0.1", right, own, "NotValidForName").await;
    // The server closes the connection, or says so in an alert: when, is a matter of chance.
    refused("localhost", right, None, "").await;
    refused("localhost", right, Some(&foreign), "").await;

    let server = match server {
        Server::RabbitMq(server, port) => {
            // It takes a minute less than a second server.
            authority.issue("server", "localhost", false);
            server.eval("ssl:clear_pem_cache()").await.unwrap();
            Server::RabbitMq(server, port)
        }
        Server::Nats(_) | Server::Redis(..) => {
            let expired = authority.issue("expired", "localhost", false);
            Server::start(broker, &expired, Some(&authority.file))
        }
    };
    let expired = connect(broker, "localhost", server.port(), right, own).await;
    let error = expired.unwrap_err();
    assert!(error.contains("Expired"), "{broker:?}: {error}");
}

#[test]
fn the_authorities_of_the_system_are_trusted() {
    let test = "the_authorities_of_the_system_are_trusted";
    if let Some(port) = setting("PORT") {
        let name = setting("BROKER").unwrap();
        let mut brokers = BROKERS.into_iter();
        let broker = brokers
            .find(|broker| format!("{broker:?}") == name)
            .unwrap();
        let connecting = connect(broker, "localhost", port.parse().unwrap(), None, None);
        let runtime = tokio::runtime::Runtime::new().unwrap();
        return runtime.block_on(connecting).unwrap();
    }
    for broker in BROKERS {
        let folder = Folder::new();
        let authority = Authority::new(&folder, "authority");
        let other = Authority::new(&folder, "other");
        let certificate = authority.issue("server", "localhost", true);
        let server = Server::start(broker, &certificate, None);
        for (file, is_right) in [(&authority.file, true), (&other.file, false)] {
            let (name, port) = (format!("{broker:?}"), server.port().to_string());
            let output = run(test, file, &[("BROKER", &name), ("PORT", &port)]);
            let said = String::from_utf8_lossy(&output.stdout);
            assert_eq!(output.status.success(), is_right, "{broker:?}: {said}");
            assert!(is_right || said.contains("UnknownIssuer"), "{said}");
        }
    }
}
