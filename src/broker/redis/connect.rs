//! [`Server`] of a consumer group, and the connections to it.

use std::{convert::Infallible, time::Duration};

use ::redis::{
    AsyncConnectionConfig, Client, ConnectionAddr, ConnectionInfo, ErrorKind, ProtocolVersion,
    PushInfo, PushKind, RedisError, aio::MultiplexedConnection, parse_redis_url,
};
use tokio_util::sync::CancellationToken;

use super::error::ConnectError;
use crate::broker::address::{SPLIT, is_split, place};

/// A server, with its name for errors.
pub(super) struct Server {
    client: Client,
    pub(super) place: String,
}

impl Server {
    /// Reads an address.
    ///
    /// No error repeats any part of an invalid address: it may belong to the password.
    pub(super) fn parse(address: &str) -> Result<Self, ConnectError> {
        let invalid = |text| RedisError::from((ErrorKind::InvalidClientConfig, text));
        let url = parse_redis_url(address);
        let has_host = url.as_ref().is_some_and(|url| url.has_host());
        // The path of a socket may contain any sign.
        if has_host && is_split(address) {
            return Err(ConnectError::InvalidAddress(invalid(SPLIT)));
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
            let is_bare = error.detail().is_none();
            let text = "a parameter of it is not valid";
            ConnectError::InvalidAddress(if is_bare { error } else { invalid(text) })
        })?;
        Self::new(&client)
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
