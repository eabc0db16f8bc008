//! [`Endpoint`]: a server, with the settings for a connection to it.

use std::time::Duration;

use lapin::{ConnectionProperties, tcp::OwnedTLSConfig, types::LongString, uri::AMQPUri};
use tokio::time::timeout;

use super::{error::ConnectError, half_made::HalfMade};
use crate::{broker::address::place, outcome::guard};

const LIMIT: Duration = Duration::from_secs(10);

/// All settings of a connection, so that a second one can be like the first.
pub(super) struct Endpoint {
    pub(super) uri: AMQPUri,
    pub(super) properties: ConnectionProperties,
    pub(super) tls: OwnedTLSConfig,
}

impl Endpoint {
    /// Returns a copy for a connection that the server lists by `name`.
    pub(super) fn named(&self, name: &str) -> Self {
        let properties = self.properties.clone();
        Self {
            uri: self.uri.clone(),
            properties: properties.with_connection_name(name.into()),
            tls: self.tls.clone(),
        }
    }

    /// Replaces the password.
    pub(super) fn renew(&mut self, secret: &LongString) {
        let password = &mut self.uri.authority.userinfo.password;
        *password = String::from_utf8_lossy(secret.as_bytes()).into_owned();
    }

    /// Opens one lapin connection.
    pub(super) async fn open(&self) -> Result<lapin::Connection, ConnectError> {
        open(&self.uri, self.properties.clone(), self.tls.clone()).await
    }
}

/// Opens one lapin connection.
async fn open(
    uri: &AMQPUri,
    properties: ConnectionProperties,
    tls: OwnedTLSConfig,
) -> Result<lapin::Connection, ConnectError> {
    let place = place(&uri.authority.host, uri.authority.port);
    let limit = uri.query.connection_timeout.map(Duration::from_millis);
    let limit = limit.unwrap_or(LIMIT);
    let half_made = HalfMade::new();
    match timeout(limit, half_made.connect(uri.clone(), properties, tls)).await {
        Ok(Ok(connection)) => {
            guard(|| tracing::info!(address = place, vhost = uri.vhost, "connected to rabbitmq"));
            Ok(connection)
        }
        Ok(Err(error)) => Err(ConnectError::new(place, uri.vhost.clone(), error)),
        Err(_) => Err(ConnectError::TimedOut {
            address: place,
            limit,
        }),
    }
}
