//! Connecting, with an error that names the address.

use std::sync::Arc;

use async_nats::{Client, ConnectErrorKind, ConnectOptions, ServerAddr};

use super::ConnectError;

/// Connects to the server at `address`, such as `nats://user:password@127.0.0.1:4222`.
///
/// The client reconnects by itself once it was connected.
///
/// # Errors
///
/// [`ConnectError`], if the address is not valid, nobody answers there, or the credentials are
/// refused. It is not tried again.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// use tower_sentinel::broker::nats::{ConnectError, connect};
///
/// let error = connect("nats://user:secret@127.0.0.1:1").await.unwrap_err();
/// assert!(matches!(error, ConnectError::Unreachable { .. }));
/// assert!(error.to_string().starts_with("nats at 127.0.0.1:1 can't be reached: "));
/// # }
/// ```
pub async fn connect(address: &str) -> Result<Client, ConnectError> {
    connect_with(ConnectOptions::new(), address).await
}

/// Connects as [`connect`] does, with `options`: a token, TLS, the pause between reconnects.
///
/// # Errors
///
/// As for [`connect`]; and with
/// [`retry_on_initial_connect`](ConnectOptions::retry_on_initial_connect) none but an invalid
/// address.
pub async fn connect_with(options: ConnectOptions, address: &str) -> Result<Client, ConnectError> {
    let server = address.parse::<ServerAddr>();
    let server = server.map_err(|error| ConnectError::InvalidAddress(error.into()))?;
    let address = format!("{}:{}", server.host(), server.port());
    options.connect(server).await.map_err(|error| {
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
