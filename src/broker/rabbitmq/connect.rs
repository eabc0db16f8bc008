//! [`connect`]: a connection, or one line that says why there is none.

use lapin::{Connection, ConnectionProperties, uri::AMQPUri};

use super::ConnectError;

/// Connects to `address`, as in `amqp://user:password@host:5672/%2f`.
///
/// lapin's recovery of connections is off: a subscription ends with its connection, and whoever reads
/// it starts over.
///
/// ```
/// use tower_sentinel::broker::rabbitmq;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// let error = rabbitmq::connect("amqp://me:secret@127.0.0.1:9/%2f").await.unwrap_err();
/// assert!(error.to_string().starts_with("rabbitmq at 127.0.0.1:9 can't be reached: "));
/// # }
/// ```
///
/// # Errors
///
/// [`ConnectError`], which names the address without its credentials.
///
/// # Panics
///
/// Panics if it is not polled within a tokio runtime.
///
/// # Cancel safety
///
/// Cancel safe: a connection that is half made is closed. There is no time limit but
/// `?connection_timeout=<milliseconds>` in the address, which covers TCP only.
pub async fn connect(address: &str) -> Result<Connection, ConnectError> {
    connect_with(ConnectionProperties::default(), address).await
}

/// Connects to `address` with `properties`, such as a name for the connection.
///
/// # Errors
///
/// As those of [`connect`].
///
/// # Panics
///
/// Panics if it is not polled within a tokio runtime.
///
/// # Cancel safety
///
/// As that of [`connect`].
pub async fn connect_with(
    properties: ConnectionProperties,
    address: &str,
) -> Result<Connection, ConnectError> {
    let uri: AMQPUri = address.parse().map_err(|error: String| {
        // The parser may repeat the address, and so the password.
        let is_safe = !error.contains(address);
        let reason = if is_safe { error } else { "not a URL".into() };
        ConnectError::InvalidAddress { reason }
    })?;
    let place = format!("{}:{}", uri.authority.host, uri.authority.port);
    let vhost = uri.vhost.clone();
    let connected = Connection::connect_uri(uri, properties).await;
    connected.map_err(|error| ConnectError::new(place, vhost, error))
}
