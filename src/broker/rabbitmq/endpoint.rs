//! [`Endpoint`]: a server, with the settings for a connection to it.

use std::{io, net::SocketAddr, time::Duration};

use lapin::{ConnectionProperties, tcp::OwnedTLSConfig, types::LongString, uri::AMQPUri};
use tokio::{net::lookup_host, time::timeout};

use super::{error::ConnectError, half_made::HalfMade};
use crate::{
    broker::{address::place, addresses::LIMIT_OF_ONE},
    outcome::guard,
};

const LIMIT: Duration = Duration::from_secs(10);

/// All settings of a connection, so that a second one can be like the first.
#[derive(Clone)]
pub(super) struct Endpoint {
    pub(super) uri: AMQPUri,
    pub(super) properties: ConnectionProperties,
    pub(super) tls: OwnedTLSConfig,
    /// `true` if there are others to be tried.
    pub(super) is_one_of_several: bool,
}

impl Endpoint {
    /// Returns a copy for a connection that the server lists by `name`.
    pub(super) fn named(&self, name: &str) -> Self {
        let properties = self.properties.clone();
        Self {
            properties: properties.with_connection_name(name.into()),
            ..self.clone()
        }
    }

    /// Replaces the password.
    pub(super) fn renew(&mut self, secret: &LongString) {
        let password = &mut self.uri.authority.userinfo.password;
        *password = String::from_utf8_lossy(secret.as_bytes()).into_owned();
    }

    /// Opens one lapin connection.
    pub(super) async fn open(&self) -> Result<lapin::Connection, ConnectError> {
        let (host, port) = (&*self.uri.authority.host, self.uri.authority.port);
        let limit = self.limit(1);
        match timeout(limit, lookup_host((host, port))).await {
            Ok(Ok(records)) => self.open_one_of(Vec::from_iter(records)).await,
            Ok(Err(error)) => Err(self.error(error.into())),
            Err(_) => Err(self.timed_out(limit)),
        }
    }

    /// Opens a connection to the first of the `records` of the host's name that works.
    ///
    /// # Errors
    ///
    /// The error of the last record.
    async fn open_one_of(
        &self,
        records: Vec<SocketAddr>,
    ) -> Result<lapin::Connection, ConnectError> {
        let limit = self.limit(records.len());
        let mut failure = self.error(io::Error::from(io::ErrorKind::NotFound).into());
        for record in records {
            let half_made = HalfMade::new();
            let (uri, properties, tls) = self.parts();
            match timeout(limit, half_made.connect(record, uri, properties, tls)).await {
                Ok(Ok(connection)) => {
                    let (address, vhost) = (self.place(), &self.uri.vhost);
                    guard(|| tracing::info!(address, vhost, "connected to rabbitmq"));
                    return Ok(connection);
                }
                Ok(Err(error)) => failure = self.error(error),
                Err(_) => failure = self.timed_out(limit),
            }
        }
        Err(failure)
    }

    /// Returns host and port.
    pub(super) fn place(&self) -> String {
        place(&self.uri.authority.host, self.uri.authority.port)
    }

    fn error(&self, error: lapin::Error) -> ConnectError {
        ConnectError::new(self.place(), self.uri.vhost.clone(), error)
    }

    fn timed_out(&self, limit: Duration) -> ConnectError {
        let address = self.place();
        ConnectError::TimedOut { address, limit }
    }

    fn parts(&self) -> (AMQPUri, ConnectionProperties, OwnedTLSConfig) {
        (self.uri.clone(), self.properties.clone(), self.tls.clone())
    }

    /// Returns the time limit of a connection to one of the `records` of the name.
    fn limit(&self, records: usize) -> Duration {
        let given = self.uri.query.connection_timeout.map(Duration::from_millis);
        let is_short = self.is_one_of_several || records > 1;
        given.unwrap_or(if is_short { LIMIT_OF_ONE } else { LIMIT })
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use tokio::net::TcpSocket;

    use super::*;

    fn endpoint(address: &str) -> Endpoint {
        Endpoint {
            uri: address.parse().unwrap(),
            properties: ConnectionProperties::default(),
            tls: OwnedTLSConfig::default(),
            is_one_of_several: false,
        }
    }

    #[tokio::test]
    async fn each_record_of_a_name_has_its_own_limit() {
        let silent = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        // Bound, so that nobody else gets its port, and not listening.
        let closed = TcpSocket::new_v4().unwrap();
        closed.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let [one, other] = [silent.local_addr(), closed.local_addr()].map(Result::unwrap);
        let endpoint = endpoint("amqp://host.invalid?connection_timeout=1000");
        let error = endpoint.open_one_of(vec![other, one]).await.unwrap_err();
        assert!(matches!(error, ConnectError::TimedOut { .. }), "{error}");
        let error = endpoint.open_one_of(vec![one, other]).await.unwrap_err();
        assert!(matches!(error, ConnectError::Unreachable { .. }), "{error}");
    }

    #[test]
    fn a_limit_is_short_if_there_are_others() {
        let endpoint = endpoint("amqp://host");
        assert_eq!(endpoint.limit(1), LIMIT);
        assert_eq!(endpoint.limit(2), LIMIT_OF_ONE);
    }
}
