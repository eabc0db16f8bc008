//! [`connect`] and [`connect_with`], which connect a client or return an error of one line.

use std::{
    io::{Error, ErrorKind},
    sync::Arc,
    time::Duration,
};

use async_nats::{Client, ConnectErrorKind, ConnectOptions, ServerAddr};
use percent_encoding::percent_decode_str;
use tokio::time::timeout;

use super::connect_error::ConnectError;
use crate::{
    broker::{
        address::{SPLIT, is_split, place},
        addresses::{LIMIT_OF_ONE, Rotation, ToAddresses, round_error},
    },
    outcome::guard,
};

/// Interval of pings on an idle connection. The client gives it up at the third without a response.
const PING: Duration = Duration::from_secs(2);

/// Longest pause between two rounds of a client that reconnects.
const PAUSE: Duration = Duration::from_secs(2);

/// Connects to an address, such as `nats://user:password@127.0.0.1:4222`.
///
/// Of [several](ToAddresses), as those of a cluster, it tries one after the other without a pause, each for 3 s, and
/// uses the first that works. One alone has 5 s. A name with several records in DNS is one address, and each of its
/// records has that time.
///
/// With `tls` instead of `nats` it sends nothing before the connection is encrypted; see
/// [TLS](crate::_guide::nats#tls). If one of several addresses begins with `tls`, this holds for all of them, and for
/// the servers that the cluster announces. A user without a password is a token. The signs `/`, `?`, `#`, `@`, `:`
/// and `%` are percent-encoded in a user, a password and a token: `nats://me:p%40ss%2Fw@host`. IPv6 has
/// brackets: `nats://[::1]:4222`.
///
/// A client has one user for all servers of its cluster. So the credentials of one address are used for those without
/// any.
///
/// # Reconnects
///
/// The client reconnects by itself once it was connected: to any of the addresses, and to the servers that the cluster
/// announces. It tries all of them without a pause, and then pauses for 1 ms to 2 s. A connection on which nothing
/// comes for 6 s, not even the response to a ping, is given up.
///
/// # Errors
///
/// [`ConnectError`], if an address is not valid, no server responds, or the credentials are refused. It is not tried
/// again. It names each address without its credentials.
///
/// # Cancel safety
///
/// Cancel safe: a connection that is half made is closed.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// use tower_sentinel::broker::nats::{ConnectError, connect};
///
/// let error = connect("nats://user:secret@127.0.0.1:1").await.unwrap_err();
/// assert!(matches!(error, ConnectError::Unreachable { .. }));
/// assert_eq!(error.to_string(), "nats at 127.0.0.1:1 can't be reached");
/// assert!(format!("{error:#}").starts_with("nats at 127.0.0.1:1 can't be reached: "));
///
/// let servers = ["nats://user:secret@127.0.0.1:1", "nats://127.0.0.1:9"];
/// let error = connect(servers).await.unwrap_err();
/// assert!(error.to_string().starts_with("none of 2 addresses of nats works: nats at 127.0.0.1:"));
/// # }
/// ```
pub async fn connect(addresses: impl ToAddresses) -> Result<Client, ConnectError> {
    let servers = Servers::new(None, &addresses.to_addresses())?;
    servers.connect().await
}

/// Connects like [`connect`], with `options`, such as a certificate authority, credentials that are renewed,
/// or the pause between reconnects.
///
/// All limits and pauses are those of the options: by default the client allows 5 s for each address
/// ([`connection_timeout`](ConnectOptions::connection_timeout)), notices a silent connection after 3 min
/// ([`ping_interval`](ConnectOptions::ping_interval)), and pauses for up to 4 s before each server.
///
/// # Errors
///
/// The errors of [`connect`]. With [`retry_on_initial_connect`](ConnectOptions::retry_on_initial_connect)
/// only an invalid address is an error.
///
/// # Cancel safety
///
/// The same as for [`connect`].
pub async fn connect_with(
    options: ConnectOptions,
    addresses: impl ToAddresses,
) -> Result<Client, ConnectError> {
    let servers = Servers::new(Some(options), &addresses.to_addresses())?;
    servers.connect().await
}

/// Servers of a cluster, and the options to connect to one of them.
pub(super) struct Servers {
    rotation: Rotation<ServerAddr>,
    pub(super) all: Vec<ServerAddr>,
    options: ConnectOptions,
}

impl Servers {
    /// Reads the addresses; without `options` it uses those of [`connect`].
    pub(super) fn new(
        options: Option<ConnectOptions>,
        addresses: &[String],
    ) -> Result<Self, ConnectError> {
        let all: Vec<_> = addresses
            .iter()
            .map(|one| parse(one))
            .collect::<Result<_, _>>()?;
        if all.is_empty() {
            return Err(invalid("the list is empty"));
        }
        let are_websockets = all.iter().filter(|server| server.is_websocket()).count();
        if ![0, all.len()].contains(&are_websockets) {
            return Err(invalid(
                "ws:// and wss:// don't mix with nats:// and tls://",
            ));
        }
        let mut options = options.unwrap_or_else(|| default_options(all.len()));
        if all.iter().any(ServerAddr::tls_required) {
            options = options.require_tls(true);
        }
        let (options, all) = without_credentials(options, all)?;
        Ok(Self {
            rotation: Rotation::new(all.clone()),
            all,
            options,
        })
    }

    /// Connects to the first server that works; one round, without a pause.
    pub(super) async fn connect(&self) -> Result<Client, ConnectError> {
        if is_patient(&self.options) {
            let first = &self.all[0];
            let connecting = self.options.clone().connect(self.all.as_slice());
            return connecting
                .await
                .map_err(|error| connect_error(first, error));
        }
        let mut errors = Vec::new();
        for server in self.rotation.round() {
            match self.open(server).await {
                Ok(client) => return Ok(client),
                Err(error) => errors.push(connect_error(server, error)),
            }
        }
        Err(round_error(errors, |errors| ConnectError::AllFailed {
            errors,
        }))
    }

    async fn open(&self, server: &ServerAddr) -> Result<Client, async_nats::ConnectError> {
        let client = self.options.clone().connect(server.clone()).await?;
        if self.all.len() > 1 {
            // If it has lost its connection by now, it does not respond.
            let adding = timeout(LIMIT_OF_ONE, self.add_servers(&client));
            adding
                .await
                .unwrap_or(Err(ConnectErrorKind::TimedOut.into()))?;
        }
        let address = place(server.host(), server.port());
        guard(|| tracing::info!(address, "connected to nats"));
        Ok(client)
    }

    /// Lets a client reconnect to all addresses, beside the servers that its cluster has announced.
    async fn add_servers(&self, client: &Client) -> Result<(), async_nats::ConnectError> {
        let failed = |error: async_nats::Error| {
            async_nats::ConnectError::with_source(ConnectErrorKind::Io, error)
        };
        let mut pool = self.all.clone();
        let known = client.server_pool().await;
        for server in known.map_err(|error| failed(error.into()))? {
            let is_same_kind = server.addr.is_websocket() == pool[0].is_websocket();
            if is_same_kind && !pool.contains(&server.addr) {
                pool.push(server.addr);
            }
        }
        let setting = client.set_server_pool(pool).await;
        setting.map_err(|error| failed(error.into()))
    }
}

/// Returns the options of [`connect`] for a number of addresses.
fn default_options(addresses: usize) -> ConnectOptions {
    let options = ConnectOptions::new()
        .ping_interval(PING)
        .reconnect_delay_callback(move |attempt| pause(attempt, addresses));
    match addresses {
        1 => options,
        _ => options.connection_timeout(LIMIT_OF_ONE),
    }
}

/// Returns the pause before an attempt of a client that reconnects, counted from 1: none within a round.
fn pause(attempt: usize, addresses: usize) -> Duration {
    let before = attempt.saturating_sub(1);
    let round = u32::try_from(before / addresses).unwrap_or(u32::MAX);
    match (round, before % addresses) {
        (0, _) => Duration::ZERO,
        (round, 0) => PAUSE.min(Duration::from_millis(2_u64.saturating_pow(round - 1))),
        _ => Duration::ZERO,
    }
}

/// Returns whether there is a client before there is a connection: `retry_on_initial_connect`. The client shows it
/// nowhere else.
fn is_patient(options: &ConnectOptions) -> bool {
    format!("{options:?}").contains("\"retry_on_initial_connect\": true")
}

fn connect_error(server: &ServerAddr, error: async_nats::ConnectError) -> ConnectError {
    let address = place(server.host(), server.port());
    let kind = error.kind();
    let error = Arc::new(error);
    match kind {
        ConnectErrorKind::Authentication | ConnectErrorKind::AuthorizationViolation => {
            ConnectError::Denied { address, error }
        }
        _ => ConnectError::Unreachable { address, error },
    }
}

fn invalid(reason: &str) -> ConnectError {
    ConnectError::InvalidAddress(Arc::new(Error::new(ErrorKind::InvalidInput, reason)))
}

/// Returns the parts of an address.
///
/// No error repeats any part of the address: if it has a mistake, any part may belong to the password.
fn parse(address: &str) -> Result<ServerAddr, ConnectError> {
    if is_split(address) {
        return Err(invalid(SPLIT));
    }
    let server: ServerAddr = address
        .parse()
        .map_err(|_| invalid("it is not one of nats:// or tls://"))?;
    let url = server.clone().into_inner();
    let behind_host = [Some(url.path()), url.query(), url.fragment()];
    // The host of a WebSocket also ends at a `\`, or at the `:` of a second scheme.
    if behind_host.iter().flatten().any(|it| it.contains('@')) {
        return Err(invalid(SPLIT));
    }
    // Without WebSockets the client would speak to such a port in plain text, also with `wss`.
    if server.is_websocket() && cfg!(not(feature = "websockets")) {
        let address = place(server.host(), server.port());
        return Err(ConnectError::NoWebSockets { address });
    }
    Ok(server)
}

/// Moves the credentials out of the addresses, since the client repeats an address in its events.
fn without_credentials(
    options: ConnectOptions,
    servers: Vec<ServerAddr>,
) -> Result<(ConnectOptions, Vec<ServerAddr>), ConnectError> {
    let mut credentials = servers.iter().filter_map(credentials);
    let first = credentials.next();
    if credentials.any(|other| Some(other) != first) {
        return Err(ConnectError::DifferentCredentials);
    }
    let options = match first {
        None => return Ok((options, servers)),
        Some((Some(token), None)) => options.token(token),
        Some((user, password)) => {
            options.user_and_password(user.unwrap_or_default(), password.unwrap_or_default())
        }
    };
    let servers = servers.into_iter().map(|server| {
        let mut bare = server.clone().into_inner();
        // Both fail only for an address without a host, which has no credentials.
        let is_bare = bare.set_username("").is_ok() && bare.set_password(None).is_ok();
        debug_assert!(is_bare, "an address with credentials has a host");
        ServerAddr::from_url(bare).unwrap_or(server)
    });
    Ok((options, servers.collect()))
}

/// Returns the user and the password of an address, if it has one of them.
fn credentials(server: &ServerAddr) -> Option<(Option<String>, Option<String>)> {
    let decoded = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
    let both = (
        server.username().map(decoded),
        server.password().map(decoded),
    );
    (both != (None, None)).then_some(both)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use async_nats::ConnectOptions;

    use super::{ConnectError, Servers, is_patient, pause};

    fn servers(addresses: &[&str]) -> Result<Servers, ConnectError> {
        let addresses: Vec<_> = addresses.iter().map(ToString::to_string).collect();
        Servers::new(None, &addresses)
    }

    #[test]
    fn the_client_gets_no_credentials_in_an_address() {
        for address in [
            "nats://us3r:s3cret@host:4223",
            "us3r:s3cret@host:4223",
            "nats://s3cret@host:4223",
            "tls://:s3cret@host:4223",
        ] {
            let servers = servers(&[address, "nats://other", address]).unwrap();
            let printed = format!("{:?} {:?}", servers.all, servers.options);
            assert!(!printed.contains("s3cret"), "{printed}");
            assert!(!printed.contains("us3r"), "{printed}");
            let server = &servers.all[0];
            assert_eq!((server.host(), server.port()), ("host", 4223));
        }
    }

    #[test]
    fn a_password_that_ends_the_host_of_a_websocket_is_found() {
        for address in [
            "ws:wss://us3r:s3cret@host",
            "ws://us3r:12\\s3cret@host",
            "wss://us3r:12\\?s3cret@host",
            "wss:\\us3r:12\\#s3cret@host://",
        ] {
            let text = match servers(&[address]) {
                Ok(servers) => format!("{:?}", servers.all),
                Err(error) => format!("{error:#} {error:?}"),
            };
            assert!(!text.contains("s3cret"), "{text}");
        }
    }

    #[test]
    fn different_credentials_are_refused_since_a_client_has_one_user() {
        for [one, other] in [
            ["nats://us3r:s3cret@a", "nats://us3r:s3cret2@b"],
            ["nats://s3cret@a", "nats://s3cret2@b"],
            ["nats://s3cret@a", "nats://s3cret:s3cret@b"],
        ] {
            let error = servers(&[one, "nats://c", other]).err().unwrap();
            assert!(matches!(error, ConnectError::DifferentCredentials));
            let text = format!("{error:#} {error:?}");
            assert!(!text.contains("s3cret"), "{text}");
        }
    }

    #[test]
    fn one_address_with_tls_encrypts_all_connections() {
        let is_required = |addresses: &[&str]| {
            let servers = servers(addresses).unwrap();
            format!("{:?}", servers.options).contains("\"tls_required\": true")
        };
        assert!(is_required(&["nats://a", "tls://b"]));
        assert!(!is_required(&["nats://a", "nats://b"]));
    }

    #[test]
    fn a_client_that_needs_no_connection_at_first_is_recognized() {
        assert!(!is_patient(&ConnectOptions::new()));
        assert!(is_patient(
            &ConnectOptions::new().retry_on_initial_connect()
        ));
    }

    #[test]
    fn a_client_pauses_between_rounds_and_not_within_one() {
        let ms = Duration::from_millis;
        let pauses: Vec<_> = (1..=10).map(|attempt| pause(attempt, 3)).collect();
        let expected = [0, 0, 0, 1, 0, 0, 2, 0, 0, 4].map(ms);
        assert_eq!(pauses, expected);
        assert_eq!(pause(usize::MAX, 1), ms(2_000));
    }

    #[test]
    #[cfg(feature = "websockets")]
    fn websockets_are_not_mixed_with_others() {
        let error = servers(&["ws://s3cret@a", "nats://b"]).err().unwrap();
        assert!(matches!(error, ConnectError::InvalidAddress(_)), "{error}");
    }

    #[test]
    #[cfg(not(feature = "websockets"))]
    fn websockets_are_not_spoken_to_in_plain_text() {
        for address in [
            "wss://us3r:s3cret@[::1]:4223",
            "ws://us3r:s3cret@[::1]:4223",
        ] {
            let error = servers(&[address]).err().unwrap();
            assert!(matches!(error, ConnectError::NoWebSockets { .. }));
            let line = "no websocket to nats at [::1]:4223: \
                        turn on the feature `websockets` of tower-sentinel";
            assert_eq!(error.to_string(), line);
        }
    }
}
