//! [`Primary`], which sentinels name.

use std::{collections::HashMap, sync::Arc, time::Duration};

use ::redis::{RedisError, aio::MultiplexedConnection, cmd};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::{
    ConnectError,
    connect::Server,
    error::{SubscriptionError, is_of_the_connection},
    link::Link,
};
use crate::broker::{address::place, addresses::Rotation};

/// Time between two questions for the primary.
const INTERVAL: Duration = Duration::from_secs(1);

/// Primary that a sentinel names.
pub(super) struct Named {
    pub(super) server: Server,
    /// Number of the failover that made it the primary.
    epoch: u64,
}

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
    ) -> Result<Named, ConnectError> {
        let asking = async {
            let connection = sentinel.open(limit, &CancellationToken::new()).await;
            let mut connection = connection?;
            let mut ask = cmd("SENTINEL");
            ask.arg("GET-MASTER-ADDR-BY-NAME").arg(&self.name);
            let named: Result<Option<(String, u16)>, _> = ask.query_async(&mut connection).await;
            let named = named.map_err(|error| match is_of_the_connection(&error) {
                true => sentinel.refusal(error),
                false => self.unknown(sentinel, Some(error)),
            });
            let (host, port) = named?.ok_or_else(|| self.unknown(sentinel, None))?;
            let server = self.server.at(&place(&host, port));
            Ok(Named {
                server: server.ok_or_else(|| self.unknown(sentinel, None))?,
                epoch: self.epoch(&mut connection).await,
            })
        };
        let named = timeout(limit, asking).await;
        named.unwrap_or_else(|_| Err(sentinel.timed_out()))
    }

    /// Returns the number of the last failover that a sentinel knows of; 0 if it does not tell.
    async fn epoch(&self, sentinel: &mut MultiplexedConnection) -> u64 {
        let mut ask = cmd("SENTINEL");
        ask.arg("MASTER").arg(&self.name);
        let state: Result<HashMap<String, String>, _> = ask.query_async(sentinel).await;
        let epoch = state
            .ok()
            .and_then(|state| state.get("config-epoch")?.parse().ok());
        epoch.unwrap_or(0)
    }

    /// Ends a subscription at a primary once a sentinel names another one.
    ///
    /// A primary that is replaced and still alive goes on to take settlements for some ten seconds, and loses them.
    pub(super) fn watch(
        self,
        sentinels: Arc<Rotation<Server>>,
        limit: Duration,
        present: Named,
        link: &Arc<Link>,
    ) {
        let (lost, link) = (link.lost.clone(), Arc::downgrade(link));
        tokio::spawn(async move {
            let Named { server, mut epoch } = present;
            while timeout(INTERVAL, lost.cancelled()).await.is_err() {
                if link.upgrade().is_none_or(|link| link.is_stale()) {
                    return;
                }
                for sentinel in sentinels.round() {
                    let Ok(named) = self.ask(sentinel, limit).await else {
                        continue;
                    };
                    if named.server.place == server.place {
                        epoch = epoch.max(named.epoch);
                        break;
                    }
                    // A sentinel that was cut off may still name an older one.
                    if named.epoch > epoch {
                        if let Some(link) = link.upgrade() {
                            let primary = named.server.place;
                            link.lose(SubscriptionError::Replaced { primary });
                        }
                        return;
                    }
                }
            }
        });
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
