//! [`Primary`], which sentinels name.

use std::time::Duration;

use ::redis::{RedisError, cmd};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::{ConnectError, connect::Server, error::is_of_the_connection};
use crate::broker::address::place;

/// A primary by its name, and the way to connect to it.
#[derive(Clone)]
pub(super) struct Primary {
    pub(super) name: String,
    /// A server with its credentials, at no real place.
    server: Server,
}

impl Primary {
    /// Reads a name, or an address with the name in the place of the host.
    pub(super) fn parse(name: &str) -> Result<Self, ConnectError> {
        let address = match name.contains("://") {
            true => name.to_owned(),
            false => format!("redis://{name}"),
        };
        let server = Server::parse(&address, 0)?;
        match server.host() {
            // The port is the default, unless one is given.
            Some((name, 0)) => Ok(Self {
                name: name.to_owned(),
                server: server.clone(),
            }),
            _ => {
                let text = "a primary has the name by which the sentinels know it, and no port";
                Err(ConnectError::invalid(text))
            }
        }
    }

    /// Asks a sentinel for the primary.
    pub(super) async fn ask(
        &self,
        sentinel: &Server,
        limit: Duration,
    ) -> Result<Server, ConnectError> {
        let asking = async {
            let connection = sentinel.open(limit, &CancellationToken::new()).await;
            let mut ask = cmd("SENTINEL");
            ask.arg("GET-MASTER-ADDR-BY-NAME").arg(&self.name);
            let named: Result<Option<(String, u16)>, _> =
                ask.query_async(&mut connection?.clone()).await;
            named.map_err(|error| match is_of_the_connection(&error) {
                true => sentinel.refusal(error),
                false => self.unknown(sentinel, Some(error)),
            })
        };
        let named = timeout(limit, asking).await;
        let named = named.unwrap_or_else(|_| Err(sentinel.timed_out()))?;
        named
            .and_then(|(host, port)| self.server.at(&place(&host, port)))
            .ok_or_else(|| self.unknown(sentinel, None))
    }

    fn unknown(&self, sentinel: &Server, error: Option<RedisError>) -> ConnectError {
        ConnectError::NoPrimary {
            address: sentinel.place.clone(),
            name: self.name.clone(),
            error,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Primary;

    #[test]
    fn a_primary_has_its_name_in_the_place_of_the_host() {
        for name in ["My_Primary-1.a", "redis://me:secret@My_Primary-1.a/2"] {
            assert_eq!(Primary::parse(name).unwrap().name, "My_Primary-1.a");
        }
        for wrong in [
            "",
            "redis://",
            "name:6379",
            "redis://name:1",
            "unix:///run",
            "a/b",
        ] {
            assert!(Primary::parse(wrong).is_err(), "{wrong}");
        }
    }
}
