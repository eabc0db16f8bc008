//! [`Connection`], a pair of connections: one consumes, and one publishes.

use std::{fmt, ops::Deref, sync::Arc};

use lapin::types::{LongString, ShortString};
use tokio::sync::Mutex;

use super::{endpoint::Endpoint, error::ConnectError};

/// Name in the server's list for the connection that publishes.
const NAME: &str = "tower-sentinel: retries and dead letters";

/// A connection to RabbitMQ that reads queues, and a second one that republishes jobs.
///
/// A server that runs out of memory or disk [stops
/// publishes. On the connection that consumes, one retry would hold up the acks of all jobs. So retries and
/// dead letters have their own connection, as RabbitMQ's documentation advises. The first
/// [`subscribe`](super::Queue::subscribe) opens it, and all subscriptions of this connection share it. If it
/// is lost, the next retry, dead letter or `subscribe` opens it anew. The server lists it as `tower-sentinel: retries and dead
/// letters`.
///
/// It dereferences to lapin's connection that consumes: use it to declare queues.
///
/// ```no_run
/// use tower_sentinel::broker::rabbitmq::{Queue, self};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let connection = rabbitmq::connect("amqp://guest:guest@127.0.0.1:5672/%2f").await?;
/// let channel = connection.create_channel().await?;
/// let orders = Queue::classic("orders").subscribe(&connection).await?;
/// # Ok(())
/// # }
/// ```
///
/// A connection that you made with lapin works too. This crate can't open a second one like it, so retries
/// and dead letters use the same connection, unless you set [another](Self::publishing):
///
/// ```no_run
/// use tower_sentinel::broker::rabbitmq::{Connection, Queue, lapin};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let address = "amqp://guest:guest@127.0.0.1:5672/%2f";
/// let consuming = lapin::Connection::connect(address, Default::default()).await?;
/// let publishing = lapin::Connection::connect(address, Default::default()).await?;
/// let connection = Connection::from(consuming).publishing(publishing);
/// let orders = Queue::classic("orders").subscribe(&connection).await?;
/// # Ok(())
/// # }
/// ```
///
/// Dropping it closes neither of them while a subscription lives.
pub struct Connection {
    consuming: Arc<lapin::Connection>,
    publishing: Publishing,
}

/// The connection that publishes.
#[derive(Clone)]
pub(super) enum Publishing {
    /// Opened when it is needed.
    Own(Arc<Mutex<Own>>),
    Given(Arc<lapin::Connection>),
}

impl Publishing {
    /// Returns the connection, and opens it if there is none that lives.
    pub(super) async fn open(&self) -> Result<Arc<lapin::Connection>, ConnectError> {
        match self {
            Self::Given(given) => Ok(Arc::clone(given)),
            Self::Own(own) => {
                let mut own = own.lock().await;
                let living = match own.take_living() {
                    Some(living) => living,
                    None => Arc::new(own.endpoint.named(NAME).open().await?),
                };
                Ok(Arc::clone(own.opened.insert(living)))
            }
        }
    }
}

pub(super) struct Own {
    endpoint: Endpoint,
    opened: Option<Arc<lapin::Connection>>,
}

impl Own {
    /// Takes the open connection, if it lives.
    fn take_living(&mut self) -> Option<Arc<lapin::Connection>> {
        self.opened
            .take()
            .filter(|opened| opened.status().connected())
    }
}

impl Connection {
    pub(super) fn new(consuming: lapin::Connection, endpoint: Endpoint) -> Self {
        Self {
            consuming: Arc::new(consuming),
            publishing: Publishing::Own(Arc::new(Mutex::new(Own {
                endpoint,
                opened: None,
            }))),
        }
    }

    /// Sets the connection for retries and dead letters.
    ///
    /// By default it is a second one like the first if this comes from [`connect`](super::connect), and the
    /// connection itself if this was made [from](Self::from) lapin's.
    #[must_use]
    pub fn publishing(mut self, connection: lapin::Connection) -> Self {
        self.publishing = Publishing::Given(Arc::new(connection));
        self
    }

    /// Renews the password or the token of both connections, also for one that is opened later.
    ///
    /// # Errors
    ///
    /// If the server refuses it, or a connection is lost. The loss of the connection that publishes is no
    /// error: it is opened anew.
    ///
    /// # Cancel safety
    ///
    /// If it is dropped, one connection or both may be renewed; you may call it again.
    ///
    /// ```no_run
    /// use tower_sentinel::broker::rabbitmq;
    ///
    /// # async fn token() -> String { String::new() }
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let connection = rabbitmq::connect("amqp://:token@127.0.0.1:5672/%2f").await?;
    /// connection.update_secret(token().await.into(), "the token expires".into()).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn update_secret(
        &self,
        secret: LongString,
        reason: ShortString,
    ) -> lapin::Result<()> {
        let publishing = match &self.publishing {
            Publishing::Own(own) => {
                let mut own = own.lock().await;
                own.endpoint.renew(&secret);
                own.opened = own.take_living();
                own.opened.clone()
            }
            // The same connection is not renewed twice.
            Publishing::Given(given) if Arc::ptr_eq(given, &self.consuming) => None,
            Publishing::Given(given) => Some(Arc::clone(given)),
        };
        if let Some(publishing) = publishing {
            publishing
                .update_secret(secret.clone(), reason.clone())
                .await?;
        }
        self.consuming.update_secret(secret, reason).await
    }

    /// Returns the connection that consumes.
    pub(super) fn consuming(&self) -> Arc<lapin::Connection> {
        Arc::clone(&self.consuming)
    }

    /// Returns the connection that publishes.
    pub(super) fn publisher(&self) -> Publishing {
        self.publishing.clone()
    }
}

impl From<lapin::Connection> for Connection {
    /// Makes `connection` consume and publish.
    fn from(connection: lapin::Connection) -> Self {
        let connection = Arc::new(connection);
        Self {
            publishing: Publishing::Given(Arc::clone(&connection)),
            consuming: connection,
        }
    }
}

impl Deref for Connection {
    type Target = lapin::Connection;

    fn deref(&self) -> &lapin::Connection {
        &self.consuming
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("connected", &self.consuming.status().connected())
            .field("blocked", &self.consuming.status().blocked())
            .finish_non_exhaustive()
    }
}
