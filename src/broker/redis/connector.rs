//! Connections of a [`ConsumerGroup`], and its [`Connector`].

use std::{fmt, future::Future, pin::Pin, sync::Arc, time::Duration};

use ::redis::Client;
use tokio::time::{Instant, sleep};

use super::{
    ConnectError, ConsumerGroup, Deliveries,
    connect::{PORT, Server},
    sentinel::Primary,
};
use crate::{
    broker::addresses::{Rotation, ToAddresses, round_error},
    consumer::Connect,
};

/// Greatest number of servers of a cluster of which each names the next.
const HOPS: usize = 5;

/// Pause before servers are asked again in a failover.
const PAUSE: Duration = Duration::from_millis(250);

/// Port of a sentinel by default.
const SENTINEL_PORT: u16 = 26_379;

impl ConsumerGroup {
    /// Connects to a server, creates the group and its stream if they are missing, and begins to read.
    ///
    /// An address is `redis://user:password@host:6379/0`, `rediss://…` by TLS, or
    /// `unix:///path?user=…&pass=…`; `valkey` is the same as `redis`. The signs `/`, `?`, `#`, `@`, `:`
    /// and `%` are percent-encoded in a user and a password: `redis://me:p%40ss%2Fw@host`. IPv6 has
    /// brackets: `redis://[::1]:6379`.
    ///
    /// Of [several addresses](ToAddresses) it tries one after the other without a pause, and uses the first one that
    /// works. A read-only replica does not.
    ///
    /// A server of a cluster may be any of its servers: the one that owns the hash slot of the stream is found by it,
    /// and gets the same user, password and kind of connection. More in [the guide](crate::_guide::redis#clusters).
    ///
    /// `rediss` needs the feature `rustls` or `native-tls`; see [TLS](crate::_guide::redis#tls).
    ///
    /// # Errors
    ///
    /// [`ConnectError`], a line that names each address. It tries each address once, except in a
    /// [failover](Self::failover_timeout): use a reconnect loop for more.
    /// A missing [right](crate::_guide::redis#rights) is an error here, since a script that is refused a
    /// command in its middle would be half done.
    ///
    /// # Panics
    ///
    /// Panics outside of a tokio runtime.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: only the group is left behind.
    pub async fn connect(&self, addresses: impl ToAddresses) -> Result<Deliveries, ConnectError> {
        self.connector(addresses).subscribe().await
    }

    /// Connects to the server of `client`, like [`connect`](Self::connect).
    ///
    /// The client can hold more than an address: a certificate authority, your own certificate, or a password
    /// with any signs. It makes no connection itself.
    ///
    /// # Errors
    ///
    /// The errors of [`connect`](Self::connect).
    ///
    /// # Panics
    ///
    /// Panics outside of a tokio runtime.
    ///
    /// # Cancel safety
    ///
    /// The same as for [`connect`](Self::connect).
    pub async fn connect_with(&self, client: &Client) -> Result<Deliveries, ConnectError> {
        self.connector_with([client]).subscribe().await
    }

    /// Connects to the primary called `primary` by Redis Sentinel, like [`connect`](Self::connect).
    ///
    /// An address of a sentinel is one of a server; its port is 26379 by default. One sentinel after the other is asked,
    /// until one names a primary that works: an answer that is out of date, which names a replica by now, is not used.
    /// While the subscription lives a sentinel is asked each second, and the subscription ends when another server is the
    /// primary ([`SubscriptionError::Replaced`](super::SubscriptionError::Replaced)).
    ///
    /// `primary` is the name by which the sentinels know it, as `mymaster`, or an address with that name in the place of
    /// the host: `redis://user:password@mymaster/0`, or `rediss://…` for TLS. The users and passwords of the sentinels
    /// are in their addresses.
    ///
    /// # Errors
    ///
    /// The errors of [`connect`](Self::connect), [`ConnectError::NoPrimary`] and [`ConnectError::Primary`].
    ///
    /// # Panics
    ///
    /// Panics outside of a tokio runtime.
    ///
    /// # Cancel safety
    ///
    /// The same as for [`connect`](Self::connect).
    pub async fn connect_sentinel(
        &self,
        sentinels: impl ToAddresses,
        primary: impl AsRef<str>,
    ) -> Result<Deliveries, ConnectError> {
        self.connector_sentinel(sentinels, primary)
            .subscribe()
            .await
    }

    /// Returns a [`Connector`] for [`Consumer::reconnecting`](crate::Consumer::reconnecting), which
    /// [connects](Self::connect) to one of these addresses for each session.
    pub fn connector(&self, addresses: impl ToAddresses) -> Connector {
        let addresses = addresses.to_addresses();
        let servers = addresses.iter().map(|address| Server::parse(address, PORT));
        Connector::new(self, servers, None)
    }

    /// Returns a [`Connector`] like that of [`connector`](Self::connector), for the servers of these clients.
    ///
    /// A [client](Self::connect_with) can hold more than an address.
    pub fn connector_with<'a>(&self, clients: impl IntoIterator<Item = &'a Client>) -> Connector {
        Connector::new(self, clients.into_iter().map(Server::new), None)
    }

    /// Returns a [`Connector`] for [`Consumer::reconnecting`](crate::Consumer::reconnecting), which
    /// [connects by sentinels](Self::connect_sentinel) for each session.
    ///
    /// ```
    /// use tower_sentinel::broker::redis::ConsumerGroup;
    ///
    /// let sentinels = ["redis://10.0.0.1:26379", "redis://10.0.0.2:26379", "redis://10.0.0.3:26379"];
    /// let connector = ConsumerGroup::new("jobs", "workers")
    ///     .connector_sentinel(sentinels, "redis://:secret@mymaster");
    /// assert!(!format!("{connector:?}").contains("secret"));
    /// ```
    pub fn connector_sentinel(
        &self,
        sentinels: impl ToAddresses,
        primary: impl AsRef<str>,
    ) -> Connector {
        let sentinels = sentinels.to_addresses();
        let sentinels = sentinels
            .iter()
            .map(|address| Server::parse(address, SENTINEL_PORT));
        Connector::new(self, sentinels, Some(Primary::parse(primary.as_ref())))
    }
}

/// Connector of a [`ConsumerGroup`], for [`Consumer::reconnecting`](crate::Consumer::reconnecting).
///
/// [`ConsumerGroup::connector`] makes one for servers, and [`ConsumerGroup::connector_sentinel`] one by sentinels. Each
/// session begins with the server after the one that was tried last. Its `Debug` has no credentials.
///
/// A mistake in an address is an error of each attempt.
///
/// ```no_run
/// use std::{num::ParseIntError, time::Duration};
/// use tower::service_fn;
/// use tower_sentinel::{Consumer, SentinelLayer, SettlePolicy, ack_on_success};
/// use tower_sentinel::broker::redis::{ConsumerGroup, Delivery};
///
/// async fn process(job: Delivery) -> Result<u32, ParseIntError> {
///     String::from_utf8_lossy(job.as_ref()).parse()
/// }
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let seeds = ["redis://10.0.0.1:6379", "redis://10.0.0.2:6379", "redis://10.0.0.3:6379"];
/// let connector = ConsumerGroup::new("jobs", "workers").connector(seeds);
/// let layer = SentinelLayer::new(SettlePolicy::new(ack_on_success()));
/// Consumer::reconnecting(connector, |_| service_fn(process))
///     .sentinel(layer.timeout(Duration::from_secs(30)))
///     .await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Connector {
    group: ConsumerGroup,
    route: Result<Arc<Route>, ConnectError>,
}

/// Way to the server.
struct Route {
    /// Servers, or sentinels.
    servers: Arc<Rotation<Server>>,
    /// Names of the servers.
    places: Vec<String>,
    /// The primary for which the sentinels are asked.
    primary: Option<Primary>,
}

impl Connector {
    fn new(
        group: &ConsumerGroup,
        servers: impl Iterator<Item = Result<Server, ConnectError>>,
        primary: Option<Result<Primary, ConnectError>>,
    ) -> Self {
        let route = Route::new(servers, primary).map(Arc::new);
        let group = group.clone();
        Self { group, route }
    }

    /// Connects to the server, and waits for the end of a failover.
    async fn subscribe(&self) -> Result<Deliveries, ConnectError> {
        let route = self.route.as_ref().map_err(Clone::clone)?;
        let begun = Instant::now();
        loop {
            let error = match self.try_all(route).await {
                Ok(deliveries) => return Ok(deliveries),
                Err(error) => error,
            };
            if !error.may_pass() || begun.elapsed() >= self.group.failover_timeout {
                return Err(error);
            }
            sleep(PAUSE).await;
        }
    }

    /// Tries each address once.
    async fn try_all(&self, route: &Route) -> Result<Deliveries, ConnectError> {
        let mut round = Round {
            group: &self.group,
            is_only: route.places.len() == 1 && route.primary.is_none(),
            failed: Vec::new(),
        };
        let mut errors = Vec::new();
        for server in route.servers.round() {
            let subscribed = match &route.primary {
                Some(primary) => round.ask(&route.servers, server, primary).await,
                None => round.follow(server).await,
            };
            match subscribed {
                Ok(deliveries) => return Ok(deliveries),
                Err(error) => errors.push(error),
            }
        }
        Err(round_error(errors, |errors| ConnectError::AllFailed {
            errors,
        }))
    }
}

impl Route {
    fn new(
        servers: impl Iterator<Item = Result<Server, ConnectError>>,
        primary: Option<Result<Primary, ConnectError>>,
    ) -> Result<Self, ConnectError> {
        let servers: Vec<_> = servers.collect::<Result<_, _>>()?;
        if servers.is_empty() {
            return Err(ConnectError::invalid("the list of addresses is empty"));
        }
        Ok(Self {
            places: servers.iter().map(|server| server.place.clone()).collect(),
            servers: Arc::new(Rotation::new(servers)),
            primary: primary.transpose()?,
        })
    }
}

/// A round of all addresses.
struct Round<'a> {
    group: &'a ConsumerGroup,
    /// `true` if the only address is a server's.
    is_only: bool,
    /// Places that don't work, each with its error: others that lead there need not try it again.
    failed: Vec<(String, ConnectError)>,
}

impl Round<'_> {
    /// Subscribes at the primary that a sentinel names.
    async fn ask(
        &mut self,
        sentinels: &Arc<Rotation<Server>>,
        sentinel: &Server,
        primary: &Primary,
    ) -> Result<Deliveries, ConnectError> {
        let limit = self.group.limit_of_one(false);
        let named = primary.ask(sentinel, limit).await?;
        let subscribed = self.follow(&named.server).await;
        let deliveries = subscribed.map_err(|error| ConnectError::Primary {
            address: sentinel.place.clone(),
            name: primary.name.clone(),
            error: Box::new(error),
        })?;
        let (primary, sentinels) = (primary.clone(), Arc::clone(sentinels));
        primary.watch(sentinels, limit, named, deliveries.link());
        Ok(deliveries)
    }

    /// Subscribes at a server, or at the one of its cluster that owns the slot.
    async fn follow(&mut self, first: &Server) -> Result<Deliveries, ConnectError> {
        let mut server = first.clone();
        let mut limit = self.group.limit_of_one(self.is_only);
        let mut visited = Vec::new();
        let mut moved = Vec::new();
        let last = loop {
            let error = match self.subscribe(&server, limit).await {
                Ok(deliveries) => return Ok(deliveries),
                Err(error) => error,
            };
            visited.push(server.place.clone());
            let owner = error.owner().and_then(|owner| server.at(owner));
            match owner {
                Some(owner) if visited.len() <= HOPS && !visited.contains(&owner.place) => {
                    moved.push(error);
                    server = owner;
                    limit = self.group.limit_of_one(false);
                }
                _ => break error,
            }
        };
        let chain = moved
            .into_iter()
            .rfold(last, |cause, moved| moved.caused_by(cause));
        Err(chain)
    }

    async fn subscribe(
        &mut self,
        server: &Server,
        limit: Duration,
    ) -> Result<Deliveries, ConnectError> {
        let known = self.failed.iter().find(|(place, _)| *place == server.place);
        if let Some((_, error)) = known {
            return Err(error.clone());
        }
        let subscribed = self.group.subscribe_at(server, limit).await;
        subscribed.inspect_err(|error| self.failed.push((server.place.clone(), error.clone())))
    }
}

impl Connect for Connector {
    type Subscription = Deliveries;
    type Error = ConnectError;
    type Future = Pin<Box<dyn Future<Output = Result<Deliveries, ConnectError>> + Send>>;

    fn connect(&mut self, _: u32) -> Self::Future {
        let connector = self.clone();
        Box::pin(async move { connector.subscribe().await })
    }
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("Connector");
        debug.field("group", &self.group);
        match &self.route {
            Ok(route) => debug.field("servers", &route.places).field(
                "primary",
                &route.primary.as_ref().map(|primary| &primary.name),
            ),
            Err(error) => debug.field("error", error),
        };
        debug.finish()
    }
}
