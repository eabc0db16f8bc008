//! [`Connector`], which makes the subscriptions of a reconnecting consumer.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_nats::{
    Client, ConnectOptions,
    connection::State,
    jetstream::{
        self, ErrorCode,
        consumer::pull,
        stream::{self, ConsumerError, ConsumerErrorKind},
    },
};
use tokio::time::timeout;

use super::{
    Deliveries,
    connect::Servers,
    connect_error::{ConnectError, ConnectorError},
    pull::Pull,
    repeat::Asking,
};
use crate::{broker::addresses::ToAddresses, consumer::Connect, outcome::guard};

/// Time limit of a subscription by a client that was kept: it may be connected to a server that has no cluster.
const KEPT_LIMIT: Duration = Duration::from_secs(5);

/// Constructor of the [`Deliveries`] of each session, for [`Consumer::reconnecting`](crate::Consumer::reconnecting).
///
/// [`Pull::connector`] makes it. It connects once, and keeps the client for the next sessions as long as that is
/// connected: the client itself goes to another server when it loses one. If a client is not connected when a session
/// begins, or if it can't subscribe, it is replaced by a new one, so that no session waits for it. The old one is closed
/// when the last delivery of its sessions is dropped.
///
/// By default it declares nothing. [`stream`](Self::stream) and [`consumer`](Self::consumer) declare what is missing,
/// once for each client.
///
/// Clones share the client.
///
/// ```no_run
/// use tower::service_fn;
/// use tower_sentinel::{
///     Consumer, SentinelLayer, SettlePolicy, ack_on_success,
///     broker::nats::{Delivery, Pull, async_nats::jetstream::{consumer::pull, stream}},
/// };
///
/// async fn process(job: Delivery) -> Result<u32, std::num::ParseIntError> {
///     String::from_utf8_lossy(job.payload()).parse()
/// }
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
/// let jobs = stream::Config {
///     name: "jobs".into(),
///     retention: stream::RetentionPolicy::WorkQueue,
///     num_replicas: 3,
///     ..Default::default()
/// };
/// let dead = stream::Config { name: "dead".into(), num_replicas: 3, ..Default::default() };
/// let connector = Pull::new("jobs", "workers")
///     .prefetch(64)
///     .dead_letter("dead")
///     .connector("nats://me:secret@a,nats://b,nats://c")
///     .stream(jobs)
///     .stream(dead)
///     .consumer(pull::Config::default());
/// let layer = SentinelLayer::new(SettlePolicy::new(ack_on_success()));
/// let summary = Consumer::reconnecting(connector, |_| service_fn(process))
///     .sentinel(layer)
///     .await?;
/// println!("{} jobs are settled", summary.answered);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
#[must_use = "nothing is connected before a consumer runs"]
pub struct Connector {
    pull: Pull,
    addresses: Vec<String>,
    options: Option<ConnectOptions>,
    streams: Vec<stream::Config>,
    consumer: Option<pull::Config>,
    /// `None` before the first attempt.
    servers: Option<Result<Arc<Servers>, ConnectError>>,
    kept: Arc<Mutex<Option<Client>>>,
}

impl Pull {
    /// Returns what [`Consumer::reconnecting`](crate::Consumer::reconnecting) takes: a connector to one or
    /// [several](ToAddresses) addresses, as [`connect`](super::connect) takes them.
    pub fn connector(self, addresses: impl ToAddresses) -> Connector {
        Connector {
            pull: self,
            addresses: addresses.to_addresses(),
            options: None,
            streams: Vec::new(),
            consumer: None,
            servers: None,
            kept: Arc::default(),
        }
    }
}

impl Connector {
    /// Sets the options of [`connect_with`](super::connect_with); those of [`connect`](super::connect) by default.
    ///
    /// ```
    /// use tower_sentinel::broker::nats::{Pull, async_nats::ConnectOptions};
    ///
    /// let connector = Pull::new("jobs", "workers")
    ///     .connector("nats://127.0.0.1:4222")
    ///     .connect_options(ConnectOptions::new().name("billing"));
    /// # drop(connector);
    /// ```
    pub fn connect_options(mut self, options: ConnectOptions) -> Self {
        self.options = Some(options);
        self.servers = None;
        self
    }

    /// Adds a stream that is created if it does not exist; none by default.
    ///
    /// A stream that exists is left as it is. Call it once for each stream, such as those of the jobs and of the dead
    /// letters.
    pub fn stream(mut self, config: stream::Config) -> Self {
        self.streams.push(config);
        self
    }

    /// Creates the consumer if it does not exist; by default it must exist.
    ///
    /// A consumer that exists is left as it is. Without a name, it has that of the [`Pull`], and is durable.
    pub fn consumer(mut self, mut config: pull::Config) -> Self {
        if config.name.is_none() {
            let name = self.pull.consumer.clone();
            config.durable_name.get_or_insert(name);
        }
        self.consumer = Some(config);
        self
    }

    fn kept(&self) -> Option<Client> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.clone()
    }

    fn keep(&self, client: Option<Client>) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let old = std::mem::replace(&mut *kept, client);
        drop(kept);
        drop(old);
    }

    async fn subscribe(self, servers: Arc<Servers>) -> Result<Deliveries, ConnectorError> {
        let kept = self.kept();
        let is_connected = |client: &Client| client.connection_state() == State::Connected;
        if let Some(client) = kept.filter(is_connected) {
            let context = jetstream::new(client);
            let subscribing = self.pull.clone().subscribe(&context);
            match timeout(KEPT_LIMIT, subscribing).await {
                Ok(Ok(deliveries)) => return Ok(deliveries),
                Ok(Err(error)) => guard(|| {
                    let error = format_args!("{error:#}");
                    tracing::debug!(error, "connecting anew: the client can't subscribe");
                }),
                Err(_) => guard(|| {
                    tracing::debug!(limit = ?KEPT_LIMIT, "connecting anew: the client can't subscribe in time");
                }),
            }
        }
        self.keep(None);
        let connecting = servers.connect();
        let client = connecting.await.map_err(ConnectorError::Connect)?;
        let context = jetstream::new(client.clone());
        let asking = Asking::new(&context);
        self.declare(&asking).await?;
        let subscribing = self.pull.clone().subscribe_by(&asking);
        let deliveries = subscribing.await.map_err(ConnectorError::Subscribe)?;
        self.keep(Some(client));
        Ok(deliveries)
    }

    /// Creates the streams and the consumer that do not exist.
    async fn declare(&self, asking: &Asking<'_>) -> Result<(), ConnectorError> {
        let context = asking.context;
        for config in &self.streams {
            let creating = asking.ask(|| context.get_or_create_stream(config));
            creating.await.map_err(|error| ConnectorError::Stream {
                name: config.name.clone(),
                error: error.map(Arc::new),
            })?;
        }
        let Some(config) = &self.consumer else {
            return Ok(());
        };
        let (stream, consumer) = (&self.pull.stream, &self.pull.consumer);
        let creating = asking.ask(|| async move {
            let found = context.get_consumer_from_stream::<pull::Config, _, _>(consumer, stream);
            match found.await {
                Err(error) if is_missing(&error) => {
                    let creating = context.create_consumer_on_stream(config.clone(), stream);
                    creating.await
                }
                found => found,
            }
        });
        creating.await.map_err(|error| ConnectorError::Consumer {
            name: consumer.clone(),
            error: error.map(Arc::new),
        })?;
        Ok(())
    }
}

fn is_missing(error: &ConsumerError) -> bool {
    let code = ErrorCode::CONSUMER_NOT_FOUND;
    matches!(error.kind(), ConsumerErrorKind::JetStream(error) if error.error_code() == code)
}

/// # Cancel safety
///
/// Cancel safe: a connection that is half made is closed, and nothing is requested before the stream is polled. What was
/// declared stays.
impl Connect for Connector {
    type Subscription = Deliveries;
    type Error = ConnectorError;
    type Future = Pin<Box<dyn Future<Output = Result<Deliveries, ConnectorError>> + Send>>;

    fn connect(&mut self, _: u32) -> Self::Future {
        let Self {
            addresses,
            options,
            servers,
            ..
        } = self;
        let servers = servers.get_or_insert_with(|| {
            let servers = Servers::new(options.clone(), addresses);
            servers.map(Arc::new)
        });
        let servers = servers.clone();
        let connector = self.clone();
        Box::pin(async move {
            let servers = servers.map_err(ConnectorError::Connect)?;
            connector.subscribe(servers).await
        })
    }
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connector")
            .field("pull", &self.pull)
            .field("addresses", &self.addresses.len())
            .field(
                "streams",
                &self.streams.iter().map(|it| &it.name).collect::<Vec<_>>(),
            )
            .finish_non_exhaustive()
    }
}
