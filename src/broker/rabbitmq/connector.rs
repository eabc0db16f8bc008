//! [`Connector`], which finds a server that works, and subscribes there.

use std::{
    error::Error,
    fmt,
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use lapin::{
    ConnectionProperties,
    tcp::OwnedTLSConfig,
    types::{AMQPValue, ShortString},
};

use super::{
    connect::endpoints,
    connection::Connection,
    declaration::Declaration,
    deliveries::Deliveries,
    delivery_limit::DeliveryLimit,
    endpoint::Endpoint,
    error::{ConnectError, SubscriptionError},
    queue::Queue,
};
use crate::{
    broker::addresses::{Rotation, ToAddresses, round_error, write_errors},
    consumer::Connect,
};

/// Default limit of a subscription if there are other servers to try.
const LIMIT_OF_ONE: Duration = Duration::from_secs(5);

/// Constructor of a queue's subscriptions for [`Consumer::reconnecting`](crate::Consumer::reconnecting), on one server or
/// on the nodes of a cluster.
///
/// It is made by [`Queue::connector`]. Each attempt tries one address after the other, without a pause: it connects,
/// [declares](Self::declare_queues) if it is told to, and subscribes. An attempt begins with the address after the one
/// that was tried last. A server that refuses the subscription ends the attempt, as the next one would refuse it, too.
///
/// With several addresses each has 3 s for its connection, as with [`connect`](super::connect), and 5 s for the
/// subscription, unless [`Queue::subscribe_timeout`] is set.
///
/// ```no_run
/// use std::convert::Infallible;
/// use tower::service_fn;
/// use tower_sentinel::{
///     Consumer, SentinelLayer, SettlePolicy, ack_on_success,
///     broker::rabbitmq::{Delivery, Queue},
/// };
///
/// async fn process(_: Delivery) -> Result<(), Infallible> {
///     Ok(())
/// }
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let nodes = ["amqp://me:secret@node-1:5672", "amqp://me:secret@node-2:5672"];
/// let orders = Queue::quorum("orders").dead_letter("orders.dead").connector(nodes).declare_queues();
/// Consumer::reconnecting(orders, |_| service_fn(process))
///     .sentinel(SentinelLayer::new(SettlePolicy::new(ack_on_success())))
///     .await?;
/// # Ok(())
/// # }
/// ```
///
/// A private certificate authority, and a name that the server lists:
///
/// ```no_run
/// use tower_sentinel::broker::rabbitmq::{Queue, lapin::{ConnectionProperties, tcp::OwnedTLSConfig}};
///
/// # fn main() -> std::io::Result<()> {
/// let tls = OwnedTLSConfig {
///     cert_chain: Some(std::fs::read_to_string("/etc/acme/ca.pem")?),
///     ..Default::default()
/// };
/// let connector = Queue::quorum("orders")
///     .connector("amqps://me:secret@node-1:5671")
///     .properties(ConnectionProperties::default().with_connection_name("billing".into()))
///     .tls(tls);
/// # drop(connector);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
#[must_use = "a connector does nothing unless a consumer uses it"]
pub struct Connector {
    queue: Queue,
    addresses: Vec<String>,
    properties: ConnectionProperties,
    tls: OwnedTLSConfig,
    declaration: Option<Declaration>,
    /// The limit of the queue while there is nothing to declare: it was done, and no subscription was refused since.
    declared: Arc<Mutex<Option<DeliveryLimit>>>,
    /// Made of the settings at the first attempt.
    endpoints: Option<Arc<Result<Rotation<Endpoint>, String>>>,
}

impl Queue {
    /// Returns a [`Connector`], which makes subscriptions of this queue on one of `addresses`.
    ///
    /// The addresses are those of [`connect`](super::connect). An invalid one is the error of each attempt.
    pub fn connector(self, addresses: impl ToAddresses) -> Connector {
        Connector {
            queue: self,
            addresses: addresses.to_addresses(),
            properties: ConnectionProperties::default(),
            tls: OwnedTLSConfig::default(),
            declaration: None,
            declared: Arc::default(),
            endpoints: None,
        }
    }
}

impl Connector {
    /// Declares the queue, the [queue of its dead letters](Queue::dead_letter) and that of its
    /// [suspects](Queue::suspects), before the first subscription and after one that was refused; by default they must
    /// exist.
    ///
    /// All are durable, and of the queue's type, except that of the suspects, a quorum queue. Jobs that the server itself rejects are dead letters, too. A quorum
    /// queue has the [delivery limit](Queue::delivery_limit) that is set, and none by default. A
    /// [dead-letter exchange](Queue::dead_letter_exchange) and its bindings are not declared.
    ///
    /// A queue that exists with another delivery limit or another dead-letter exchange is read as it is. If it has another
    /// type, or another of the arguments that are [set](Self::queue_argument), that is [`SubscriptionError::Undeclared`].
    /// A declaration that is not confirmed within 2 s is not waited for, as the queue may exist.
    pub fn declare_queues(mut self) -> Self {
        self.declaration.get_or_insert_default();
        self
    }

    /// Declares the queues, and this one with an argument, such as `x-max-length`.
    ///
    /// ```
    /// use tower_sentinel::broker::rabbitmq::Queue;
    ///
    /// let orders = Queue::quorum("orders")
    ///     .connector("amqp://127.0.0.1:5672")
    ///     .queue_argument("x-max-length", 100_000);
    /// # drop(orders);
    /// ```
    ///
    /// # Panics
    ///
    /// Panics if the name is longer than AMQP's 255 bytes.
    #[track_caller]
    pub fn queue_argument(mut self, name: &str, value: impl Into<AMQPValue>) -> Self {
        let name =
            ShortString::try_new(name).expect("the name of an argument has at most 255 bytes");
        let declaration = self.declaration.get_or_insert_default();
        declaration.arguments.insert(name, value.into());
        self
    }

    /// Sets the properties of the connections, such as their name.
    pub fn properties(mut self, properties: ConnectionProperties) -> Self {
        self.properties = properties;
        self.endpoints = None;
        self
    }

    /// Sets the certificates, for addresses that begin with `amqps`; those of the system by default.
    pub fn tls(mut self, tls: OwnedTLSConfig) -> Self {
        self.tls = tls;
        self.endpoints = None;
        self
    }

    async fn connect_to(&self, endpoint: &Endpoint) -> Result<Deliveries, ConnectorError> {
        let connected = endpoint.open().await.map_err(ConnectorError::Connect)?;
        let connection = Connection::new(connected, endpoint.clone());
        let subscribed = self
            .subscribe(&connection, endpoint.is_one_of_several)
            .await;
        subscribed.map_err(|error| ConnectorError::Subscribe {
            address: endpoint.place(),
            error,
        })
    }

    async fn subscribe(
        &self,
        connection: &Connection,
        is_one_of_several: bool,
    ) -> Result<Deliveries, SubscriptionError> {
        let mut queue = self.queue.clone();
        if is_one_of_several {
            queue.subscribe_timeout.get_or_insert(LIMIT_OF_ONE);
        }
        if let Some(declaration) = &self.declaration {
            let known = *self.declared();
            let limit = match known {
                Some(_) => known,
                None => declaration.declare(connection, &queue).await?,
            };
            *self.declared() = limit;
            if let Some(limit) = limit {
                queue.reading.delivery_limit = limit;
            }
        }
        let subscribed = queue.subscribe(connection).await;
        if let Err(SubscriptionError::Refused { .. } | SubscriptionError::NoTarget { .. }) =
            &subscribed
        {
            *self.declared() = None;
        }
        subscribed
    }

    fn declared(&self) -> MutexGuard<'_, Option<DeliveryLimit>> {
        self.declared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Connect for Connector {
    type Subscription = Deliveries;
    type Error = ConnectorError;
    type Future = Pin<Box<dyn Future<Output = Result<Deliveries, ConnectorError>> + Send>>;

    fn connect(&mut self, _: u32) -> Self::Future {
        let endpoints = self.endpoints.get_or_insert_with(|| {
            let endpoints = endpoints(&self.properties, &self.tls, &self.addresses);
            Arc::new(endpoints)
        });
        let endpoints = Arc::clone(endpoints);
        let connector = self.clone();
        Box::pin(async move {
            let endpoints = endpoints.as_ref().as_ref().map_err(|reason| {
                let reason = reason.clone();
                ConnectorError::Connect(ConnectError::InvalidAddress { reason })
            })?;
            let mut errors = Vec::new();
            for endpoint in endpoints.round() {
                match connector.connect_to(endpoint).await {
                    Err(error) if error.is_of_one_server() => errors.push(error),
                    ended => return ended,
                }
            }
            Err(round_error(errors, |errors| ConnectorError::AllFailed {
                errors,
            }))
        })
    }
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connector")
            .field("queue", &self.queue)
            .field("addresses", &self.addresses.len())
            .field("declaration", &self.declaration)
            .finish_non_exhaustive()
    }
}

/// Error of a [`Connector`]'s attempt.
///
/// The message is one line that names the server's address, and never a password. With `{:#}` it includes the cause.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum ConnectorError {
    /// There is no connection.
    Connect(ConnectError),
    /// There is a connection, and no subscription.
    Subscribe {
        /// Host and port.
        address: String,
        /// The reason.
        error: SubscriptionError,
    },
    /// None of several addresses works.
    ///
    /// The message has all their errors, each with its cause.
    AllFailed {
        /// The error of each address, in the order of the tries.
        errors: Vec<ConnectorError>,
    },
}

impl ConnectorError {
    /// Returns whether another server may have no such error.
    fn is_of_one_server(&self) -> bool {
        match self {
            ConnectorError::Connect(_) => true,
            ConnectorError::Subscribe { error, .. } => matches!(
                error,
                SubscriptionError::TimedOut { .. }
                    | SubscriptionError::NoPublisher { .. }
                    | SubscriptionError::ConnectionLost(_)
                    | SubscriptionError::ConnectionClosed(_)
            ),
            ConnectorError::AllFailed { .. } => false,
        }
    }
}

impl fmt::Display for ConnectorError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ConnectorError::Connect(error) => error.fmt(f),
            ConnectorError::Subscribe { address, error } => {
                write!(f, "rabbitmq at {address}: ")?;
                error.fmt(f)
            }
            ConnectorError::AllFailed { errors } => write_errors(f, "rabbitmq", errors),
        }
    }
}

impl Error for ConnectorError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            ConnectorError::Connect(error) => error.source(),
            ConnectorError::Subscribe { error, .. } => error.source(),
            ConnectorError::AllFailed { .. } => None,
        }
    }
}
