//! [`Server`] of a consumer group, and the connections to it.

use std::{convert::Infallible, io, time::Duration};

use ::redis::{
    AsyncConnectionConfig, Client, ConnectionAddr, ConnectionInfo, ErrorKind, ProtocolVersion,
    PushInfo, PushKind, RedisError, aio::MultiplexedConnection, parse_redis_url,
};
use tokio_util::sync::CancellationToken;

use super::ConnectError;
use crate::broker::address::{SPLIT, is_split, place};

/// Port of a server by default.
pub(super) const PORT: u16 = 6_379;

/// A server, with its name for errors.
#[derive(Clone)]
pub(super) struct Server {
    client: Client,
    pub(super) place: String,
}

impl Server {
    /// Reads an address.
    ///
    /// No error repeats any part of an invalid address: it may belong to the password.
    ///
    /// Its port is `port` by default.
    pub(super) fn parse(address: &str, port: u16) -> Result<Self, ConnectError> {
        let url = parse_redis_url(address);
        let has_host = url.as_ref().is_some_and(|url| url.has_host());
        // The path of a socket may contain any sign.
        if has_host && is_split(address) {
            return Err(ConnectError::invalid(SPLIT));
        }
        if let Some(url) = &url {
            let is_encrypted = matches!(url.scheme(), "rediss" | "valkeys");
            if is_encrypted && !has_tls() {
                let host = url.host_str().unwrap_or_default();
                let port = url.port().map_or(String::new(), |port| format!(":{port}"));
                let address = format!("{host}{port}");
                return Err(ConnectError::NoTls { address });
            }
        }
        let client = Client::open(address).map_err(|error| {
            // The client repeats the value of the protocol's version, which may be any part of the address.
            match error.detail() {
                None => ConnectError::InvalidAddress(error),
                Some(_) => ConnectError::invalid("a parameter of it is not valid"),
            }
        })?;
        let server = Self::new(&client)?;
        match url.is_some_and(|url| url.has_host() && url.port().is_none()) {
            true => server.moved(None, port),
            false => Ok(server),
        }
    }

    /// Creates it from the address and the certificates of a client.
    pub(super) fn new(client: &Client) -> Result<Self, ConnectError> {
        let info = client.get_connection_info().clone();
        let place = match info.addr() {
            ConnectionAddr::Tcp(host, port) | ConnectionAddr::TcpTls { host, port, .. } => {
                place(host, *port)
            }
            other => other.to_string(),
        };
        // With version 3 of the protocol the client reports the loss of a connection, also of one without an
        // open request.
        let settings = info.redis_settings().clone();
        let info = info.set_redis_settings(settings.set_protocol(ProtocolVersion::RESP3));
        let client = with_roots(info).map_err(ConnectError::InvalidAddress)?;
        Ok(Self { client, place })
    }

    /// Returns its host and its port, unless it is a socket.
    pub(super) fn host(&self) -> Option<(&str, u16)> {
        match self.client.get_connection_info().addr() {
            ConnectionAddr::Tcp(host, port) | ConnectionAddr::TcpTls { host, port, .. } => {
                Some((host, *port))
            }
            _ => None,
        }
    }

    /// Returns the server at another place, as a cluster or a sentinel names it, with the same credentials and the same
    /// kind of connection.
    ///
    /// A place without a host, or with the host `?`, is on the same host.
    pub(super) fn at(&self, place: &str) -> Option<Self> {
        let (host, port) = place.rsplit_once(':')?;
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let host = Some(host).filter(|host| !matches!(*host, "" | "?"));
        self.moved(host, port.parse().ok()?).ok()
    }

    /// Returns the server with another port, and another host if there is one.
    fn moved(&self, host: Option<&str>, port: u16) -> Result<Self, ConnectError> {
        let own = self.host().map(|(host, _)| host);
        let host = host.or(own).unwrap_or("localhost").to_owned();
        let info = self.client.get_connection_info().clone();
        let address = match info.addr().clone() {
            ConnectionAddr::TcpTls {
                insecure,
                tls_params,
                ..
            } => ConnectionAddr::TcpTls {
                host,
                port,
                insecure,
                tls_params,
            },
            _ => ConnectionAddr::Tcp(host, port),
        };
        let client = Client::open(info.set_addr(address)).map_err(ConnectError::InvalidAddress)?;
        Self::new(&client)
    }

    /// Returns the place that a `MOVED` names.
    pub(super) fn owner(&self, error: &RedisError) -> String {
        let named = error.redirect_node().map_or("", |(place, _)| place);
        self.at(named)
            .map_or_else(|| named.to_owned(), |owner| owner.place)
    }

    /// Opens a connection that waits at most `patience` for a reply, and cancels `lost` when it is lost.
    pub(super) async fn open(
        &self,
        patience: Duration,
        lost: &CancellationToken,
    ) -> Result<MultiplexedConnection, ConnectError> {
        let lost = lost.clone();
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(patience))
            .set_response_timeout(Some(patience))
            .set_push_sender(move |push: PushInfo| {
                if push.kind == PushKind::Disconnection {
                    lost.cancel();
                }
                Ok::<_, Infallible>(())
            });
        let client = &self.client;
        let opened = client.get_multiplexed_async_connection_with_config(&config);
        opened.await.map_err(|error| self.refusal(error))
    }

    /// Returns the error of a server that does not respond in time.
    pub(super) fn timed_out(&self) -> ConnectError {
        self.refusal(io::Error::from(io::ErrorKind::TimedOut).into())
    }

    pub(super) fn refusal(&self, error: RedisError) -> ConnectError {
        let address = self.place.clone();
        let denied = error.kind() == ErrorKind::AuthenticationFailed
            || matches!(error.code(), Some("WRONGPASS" | "NOAUTH"));
        match denied {
            true => ConnectError::Denied { address, error },
            false => ConnectError::Unreachable { address, error },
        }
    }
}

#[cfg(not(all(feature = "rustls", feature = "native-tls")))]
fn with_roots(info: ConnectionInfo) -> Result<Client, RedisError> {
    Client::open(info)
}

/// Returns a client that trusts the authorities of the system.
///
/// If the client is built with both rustls and native-tls, it uses rustls, and trusts nobody by default.
#[cfg(all(feature = "rustls", feature = "native-tls"))]
fn with_roots(info: ConnectionInfo) -> Result<Client, RedisError> {
    use ::redis::TlsCertificates;
    use base64::{Engine, prelude::BASE64_STANDARD};

    let has_none = matches!(
        info.addr(),
        ConnectionAddr::TcpTls {
            insecure: false,
            tls_params: None,
            ..
        }
    );
    if !has_none {
        return Client::open(info);
    }
    let mut roots = String::new();
    for root in rustls_native_certs::load_native_certs().certs {
        let root = BASE64_STANDARD.encode(root);
        roots += &format!("-----BEGIN CERTIFICATE-----\n{root}\n-----END CERTIFICATE-----\n");
    }
    let certificates = TlsCertificates {
        client_tls: None,
        root_cert: Some(roots.into_bytes()),
    };
    Client::build_with_tls(info, certificates)
}

/// Returns whether the client is built with TLS.
fn has_tls() -> bool {
    let encrypted = ConnectionAddr::TcpTls {
        host: String::new(),
        port: 0,
        insecure: false,
        tls_params: None,
    };
    encrypted.is_supported()
}

#[cfg(test)]
mod tests {
    use super::{PORT, Server};

    fn place_of(address: &str, place: &str) -> Option<String> {
        let server = Server::parse(address, PORT).unwrap();
        server.at(place).map(|server| server.place)
    }

    #[test]
    fn a_server_at_another_place_is_reached_in_the_same_way() {
        let server = Server::parse("redis://me:secret@seed:1/2", PORT).unwrap();
        let other = server.at("owner:3").unwrap();
        assert_eq!(other.place, "owner:3");
        let (own, others) = (
            server.client.get_connection_info(),
            other.client.get_connection_info(),
        );
        let (own, others) = (own.redis_settings(), others.redis_settings());
        assert_eq!(
            (own.username(), own.password(), own.db()),
            (others.username(), others.password(), others.db())
        );
        assert_eq!(others.password(), Some("secret"));
    }

    #[test]
    fn a_place_may_have_no_host_of_its_own() {
        let named = |place| place_of("redis://seed:1", place);
        assert_eq!(named(":3").as_deref(), Some("seed:3"));
        assert_eq!(named("?:3").as_deref(), Some("seed:3"));
        assert_eq!(named("::1:3").as_deref(), Some("[::1]:3"));
        assert_eq!(named("[::1]:3").as_deref(), Some("[::1]:3"));
        for nonsense in ["", "owner", "owner:x", "owner:70000"] {
            assert_eq!(named(nonsense), None, "{nonsense}");
        }
        assert_eq!(
            place_of("unix:///run/redis", ":3").as_deref(),
            Some("localhost:3")
        );
    }

    #[cfg(any(feature = "rustls", feature = "native-tls"))]
    #[test]
    fn a_server_at_another_place_is_encrypted_if_this_one_is() {
        use ::redis::ConnectionAddr;

        let server = Server::parse("rediss://seed", PORT).unwrap();
        let other = server.at("owner:3").unwrap();
        let info = other.client.get_connection_info();
        assert!(matches!(
            info.addr(),
            ConnectionAddr::TcpTls { host, port: 3, insecure: false, .. } if host == "owner"
        ));
    }

    #[test]
    fn a_port_has_a_default() {
        let place = |address, port| Server::parse(address, port).unwrap().place;
        assert_eq!(place("redis://host", 26_379), "host:26379");
        assert_eq!(place("redis://host:1", 26_379), "host:1");
        assert_eq!(place("redis://[::1]", PORT), "[::1]:6379");
    }
}
