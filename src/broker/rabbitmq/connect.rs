//! [`connect`]: a connection, or one line that says why there is none.

use std::time::Duration;

use lapin::{Connection, ConnectionProperties, uri::AMQPUri};
use tokio::time::timeout;

use super::{ConnectError, half_made::HalfMade};

const LIMIT: Duration = Duration::from_secs(10);

/// Connects to `address`, as in `amqp://user:password@host:5672/%2f`.
///
/// lapin's recovery of connections is off: a subscription ends with its connection, and whoever reads
/// it starts over.
///
/// It takes no longer than 10 s, or than `?connection_timeout=<milliseconds>` in the address says:
/// for the name, TCP and AMQP's handshake together.
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
/// Cancel safe: a connection that is half made is closed.
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
    let limit = uri.query.connection_timeout.map(Duration::from_millis);
    let limit = limit.unwrap_or(LIMIT);
    let half_made = HalfMade::new();
    match timeout(limit, half_made.connect(uri, properties)).await {
        Ok(connected) => connected.map_err(|error| ConnectError::new(place, vhost, error)),
        Err(_) => Err(ConnectError::TimedOut {
            address: place,
            limit,
        }),
    }
}
