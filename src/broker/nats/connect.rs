//! [`connect`] and [`connect_with`], which connect a client or return an error of one line.

use std::{
    io::{Error, ErrorKind},
    sync::Arc,
};

use async_nats::{Client, ConnectErrorKind, ConnectOptions, ServerAddr, connection::State};
use percent_encoding::percent_decode_str;

use super::error::ConnectError;
use crate::{
    broker::address::{SPLIT, is_split, place},
    outcome::guard,
};

/// Connects to the server at `address`, such as `nats://user:password@127.0.0.1:4222`.
///
/// With `tls` instead of `nats` it sends nothing before the connection is encrypted; see
/// [TLS](crate::_guide::nats#tls). A user without a password is a token. The signs `/`, `?`, `#`, `@`, `:`
/// and `%` are percent-encoded in a user, a password and a token: `nats://me:p%40ss%2Fw@host`. IPv6 has
/// brackets: `nats://[::1]:4222`.
///
/// The client reconnects by itself once it was connected.
///
/// # Errors
///
/// [`ConnectError`], if the address is not valid, no server responds there, or the credentials are refused.
/// It is not tried again.
///
/// # Cancel safety
///
/// Cancel safe: a connection that is half made is closed.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// use tower_sentinel::broker::nats::{ConnectError, connect};
///
/// let error = connect("nats://user:secret@127.0.0.1:1").await.unwrap_err();
/// assert!(matches!(error, ConnectError::Unreachable { .. }));
/// assert_eq!(error.to_string(), "nats at 127.0.0.1:1 can't be reached");
/// assert!(format!("{error:#}").starts_with("nats at 127.0.0.1:1 can't be reached: "));
/// # }
/// ```
pub async fn connect(address: &str) -> Result<Client, ConnectError> {
    connect_with(ConnectOptions::new(), address).await
}

/// Connects like [`connect`], with `options`, such as a certificate authority, credentials that are renewed,
/// or the pause between reconnects.
///
/// # Errors
///
/// The errors of [`connect`]. With [`retry_on_initial_connect`](ConnectOptions::retry_on_initial_connect)
/// only an invalid address is an error.
///
/// # Cancel safety
///
/// The same as for [`connect`].
pub async fn connect_with(options: ConnectOptions, address: &str) -> Result<Client, ConnectError> {
    let (options, server) = without_credentials(options, parse(address)?);
    let address = place(server.host(), server.port());
    let connected = options.connect(server).await;
    // With `retry_on_initial_connect` there is a client before there is a connection.
    let is_connected = |client: &Client| client.connection_state() == State::Connected;
    if connected.as_ref().is_ok_and(is_connected) {
        guard(|| tracing::info!(address, "connected to nats"));
    }
    connected.map_err(|error| {
        let kind = error.kind();
        let error = Arc::new(error);
        match kind {
            ConnectErrorKind::Authentication | ConnectErrorKind::AuthorizationViolation => {
                ConnectError::Denied { address, error }
            }
            _ => ConnectError::Unreachable { address, error },
        }
    })
}

/// Returns the parts of an address.
///
/// No error repeats any part of the address: if it has a mistake, any part may belong to the password.
fn parse(address: &str) -> Result<ServerAddr, ConnectError> {
    let invalid = |reason: &str| {
        ConnectError::InvalidAddress(Arc::new(Error::new(ErrorKind::InvalidInput, reason)))
    };
    if is_split(address) {
        return Err(invalid(SPLIT));
    }
    let server: ServerAddr = address
        .parse()
        .map_err(|_| invalid("it is not one of nats:// or tls://"))?;
    // Without WebSockets the client would speak to such a port in plain text, also with `wss`.
    if server.is_websocket() && cfg!(not(feature = "websockets")) {
        let address = place(server.host(), server.port());
        return Err(ConnectError::NoWebSockets { address });
    }
    Ok(server)
}

/// Moves the credentials out of the address, since the client repeats the address in its events.
fn without_credentials(
    options: ConnectOptions,
    server: ServerAddr,
) -> (ConnectOptions, ServerAddr) {
    let decoded = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
    let options = match (server.username(), server.password()) {
        (None, None) => return (options, server),
        (Some(token), None) => options.token(decoded(token)),
        (user, password) => options.user_and_password(
            decoded(user.unwrap_or_default()),
            decoded(password.unwrap_or_default()),
        ),
    };
    let mut bare = server.clone().into_inner();
    // Both fail only for an address without a host, which has no credentials.
    let is_bare = bare.set_username("").is_ok() && bare.set_password(None).is_ok();
    debug_assert!(is_bare, "an address with credentials has a host");
    let bare = ServerAddr::from_url(bare).unwrap_or(server);
    (options, bare)
}

#[cfg(test)]
mod tests {
    use async_nats::ConnectOptions;

    #[cfg(not(feature = "websockets"))]
    use super::ConnectError;
    use super::{parse, without_credentials};

    #[test]
    fn the_client_gets_no_credentials_in_the_address() {
        for address in [
            "nats://us3r:s3cret@host:4223",
            "us3r:s3cret@host:4223",
            "nats://s3cret@host:4223",
            "tls://:s3cret@host:4223",
        ] {
            let server = parse(address).unwrap();
            let (options, server) = without_credentials(ConnectOptions::new(), server);
            let printed = format!("{server:?} {options:?} {}", server.as_url_str());
            assert!(!printed.contains("s3cret"), "{printed}");
            assert!(!printed.contains("us3r"), "{printed}");
            assert_eq!((server.host(), server.port()), ("host", 4223));
        }
    }

    #[test]
    #[cfg(not(feature = "websockets"))]
    fn websockets_are_not_spoken_to_in_plain_text() {
        for address in [
            "wss://us3r:s3cret@[::1]:4223",
            "ws://us3r:s3cret@[::1]:4223",
        ] {
            let error = parse(address).unwrap_err();
            assert!(matches!(error, ConnectError::NoWebSockets { .. }));
            let line = "no websocket to nats at [::1]:4223: \
                        turn on the feature `websockets` of tower-sentinel";
            assert_eq!(error.to_string(), line);
        }
    }
}
