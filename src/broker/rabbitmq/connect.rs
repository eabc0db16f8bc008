//! [`connect`] and [`connect_with`], which open a connection or return an error of one line.

use lapin::{ConnectionProperties, tcp::OwnedTLSConfig, uri::AMQPUri};
use url::{Host, Url};

use super::{connection::Connection, endpoint::Endpoint, error::ConnectError};
use crate::broker::{
    address::{SPLIT, is_split},
    addresses::{Rotation, ToAddresses, round_error},
};

/// Time between two heartbeats in seconds, if the address has none.
const HEARTBEAT: u16 = 10;

/// Connects to an address, as in `amqp://user:password@host:5672/%2f`, or with `amqps` by TLS.
///
/// Of [several](ToAddresses), as those of a cluster, it tries one after the other without a pause, and uses the first that
/// works.
///
/// In a user, a password and a virtual host the signs `/`, `?`, `#`, `@`, `:` and `%` are
/// percent-encoded: `amqp://me:p%40ss%2Fw@host/%2fsome`. The virtual host `/` is `%2f`, or left out
/// with its slash; a slash with nothing after it is the virtual host without a name. IPv6 has
/// brackets: `amqp://[::1]:5672`.
///
/// `amqps` needs the feature `rustls` or `native-tls`; see [TLS](crate::_guide::rabbitmq#tls).
///
/// lapin's recovery of connections is off: a subscription ends with its connection, and its reader connects
/// anew.
///
/// It takes at most 10 s, or 3 s for each one if there are several addresses, or several records of a name in DNS.
/// `?connection_timeout=<milliseconds>` of an address sets another limit. It covers TCP and the handshake of AMQP
/// together, and so much is the look-up of the name allowed to take.
///
/// A server that is silent for 20 s is given up, as each side sends a heartbeat every 10 s at least.
/// `?heartbeat=<seconds>` sets another time, of which the server may choose a shorter one; zero leaves it to the
/// server, which has 60 s by default. See [heartbeats](crate::_guide::rabbitmq#heartbeats).
///
/// ```
/// use tower_sentinel::broker::rabbitmq;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// let error = rabbitmq::connect("amqp://me:secret@127.0.0.1:9/%2f").await.unwrap_err();
/// assert_eq!(error.to_string(), "rabbitmq at 127.0.0.1:9 can't be reached");
/// assert!(format!("{error:#}").starts_with("rabbitmq at 127.0.0.1:9 can't be reached: "));
///
/// let nodes = ["amqp://me:secret@127.0.0.1:9", "amqp://me:secret@127.0.0.1:11"];
/// let error = rabbitmq::connect(nodes).await.unwrap_err();
/// assert!(error.to_string().starts_with("none of 2 addresses of rabbitmq works: rabbitmq at 127.0.0.1:"));
/// # }
/// ```
///
/// # Errors
///
/// [`ConnectError`], which names each address without its credentials.
///
/// # Panics
///
/// Panics if it is not polled within a tokio runtime.
///
/// # Cancel safety
///
/// Cancel safe: a connection that is half made is closed.
pub async fn connect(addresses: impl ToAddresses) -> Result<Connection, ConnectError> {
    connect_with(
        ConnectionProperties::default(),
        OwnedTLSConfig::default(),
        addresses,
    )
    .await
}

/// Connects with `properties`, such as a name for the connection, and with `tls`, such as your own certificate authority
/// and certificate.
///
/// `tls` is used if an address begins with `amqps`; [TLS](crate::_guide::rabbitmq#tls) has a recipe.
///
/// # Errors
///
/// The errors of [`connect`].
///
/// # Panics
///
/// Panics if it is not polled within a tokio runtime.
///
/// # Cancel safety
///
/// The same as for [`connect`].
pub async fn connect_with(
    properties: ConnectionProperties,
    tls: OwnedTLSConfig,
    addresses: impl ToAddresses,
) -> Result<Connection, ConnectError> {
    let endpoints = endpoints(&properties, &tls, &addresses.to_addresses());
    let endpoints = endpoints.map_err(|reason| ConnectError::InvalidAddress { reason })?;
    let mut errors = Vec::new();
    for endpoint in endpoints.round() {
        match endpoint.open().await {
            Ok(connection) => return Ok(Connection::new(connection, endpoint.clone())),
            Err(error) => errors.push(error),
        }
    }
    Err(round_error(errors, |errors| ConnectError::AllFailed {
        errors,
    }))
}

/// Reads `addresses` and brings them into an order, or returns a description of the mistake in one.
pub(super) fn endpoints(
    properties: &ConnectionProperties,
    tls: &OwnedTLSConfig,
    addresses: &[String],
) -> Result<Rotation<Endpoint>, String> {
    if addresses.is_empty() {
        return Err("the list is empty".to_owned());
    }
    let endpoints = addresses.iter().map(|address| {
        Ok(Endpoint {
            uri: parse(address)?,
            properties: properties.clone(),
            tls: tls.clone(),
            is_one_of_several: addresses.len() > 1,
        })
    });
    endpoints.collect::<Result<_, _>>().map(Rotation::new)
}

/// Returns the parts of an address, or a description of the mistake in it.
///
/// No error repeats any part of the address: if it has a mistake, any part may belong to the password.
pub(super) fn parse(address: &str) -> Result<AMQPUri, String> {
    if is_split(address) {
        return Err(SPLIT.to_owned());
    }
    let url = Url::parse(address).map_err(|error| error.to_string())?;
    if !matches!(url.scheme(), "amqp" | "amqps") || url.cannot_be_a_base() {
        return Err("it begins with neither amqp:// nor amqps://".to_owned());
    }
    if url.fragment().is_some() {
        return Err("it has a `#`, which is %23 in a password".to_owned());
    }
    let mut uri: AMQPUri = address
        .parse()
        .map_err(|_| "a parameter, or what is percent-encoded, is not valid".to_owned())?;
    // The parser reads an IPv6 address as no address, and a missing host as localhost.
    if let Some(Host::Ipv6(host)) = url.host() {
        uri.authority.host = host.to_string();
    }
    uri.query.heartbeat.get_or_insert(HEARTBEAT);
    Ok(uri)
}
