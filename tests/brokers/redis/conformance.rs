//! Redis in the scenarios of all brokers, with dead letters and without.

use std::{
    process::Command,
    sync::{Mutex, MutexGuard, OnceLock},
    time::Duration,
};

use tower_sentinel::{
    broker::redis::{
        ConnectError, ConsumerGroup, Deliveries,
        redis::{Commands, Connection, cmd},
    },
    conformance::{Backlog, DeadLetter, EnvelopeFixture, Fixture, Published},
    settle::Capabilities,
};

use super::{Fields, GROUP, STREAM, pending, server::Server};
use crate::{
    conformance::{
        Connector, TestBroker, kind,
        verdicts::{REDIS, VALKEY, printed, version},
    },
    proxy::Proxy,
    watchdog::RemoteBroker,
};

/// A server for this test, whose consumers connect through a proxy.
struct Redis<const DEAD_LETTERS: bool> {
    server: Mutex<Server>,
    /// Looks at the data; anew after a kill.
    inspect: Mutex<Connection>,
    proxy: Proxy,
    group: ConsumerGroup,
}

impl<const DEAD_LETTERS: bool> Redis<DEAD_LETTERS> {
    fn inspect(&self) -> MutexGuard<'_, Connection> {
        self.inspect.lock().unwrap()
    }
}

impl<const DEAD_LETTERS: bool> Fixture for Redis<DEAD_LETTERS> {
    type Subscription = Deliveries;
    type Error = ConnectError;

    async fn publish(&self, body: &str) -> Result<(), ConnectError> {
        let fields = [("payload", body)];
        let () = self.inspect().xadd(STREAM, "*", &fields).unwrap();
        Ok(())
    }

    async fn subscribe(&self, prefetch: usize) -> Result<Deliveries, ConnectError> {
        self.connector(prefetch)().await
    }

    async fn backlog(&self) -> Result<Backlog, ConnectError> {
        let mut inspect = self.inspect();
        Ok(Backlog {
            unacked: pending(&mut inspect),
            // Settled entries are deleted.
            total: inspect.xlen(STREAM).unwrap(),
        })
    }

    async fn dead_letters(&self) -> Result<Vec<DeadLetter>, ConnectError> {
        let Some(key) = self.group.dead_letter_key() else {
            return Ok(Vec::new());
        };
        let letters: Vec<(String, Fields)> = cmd("XRANGE")
            .arg(key)
            .arg("-")
            .arg("+")
            .query(&mut *self.inspect())
            .unwrap();
        let letters = letters.into_iter().map(|(_, mut fields)| DeadLetter {
            body: fields.remove("payload").unwrap(),
            kind: kind(&fields["x-outcome-kind"]),
            message: fields.remove("x-outcome-message"),
        });
        Ok(letters.collect())
    }

    fn capabilities(&self) -> Capabilities {
        let capabilities = Capabilities::none().free_release().delay().keep_alive();
        match DEAD_LETTERS {
            true => capabilities.dead_letter(),
            false => capabilities,
        }
    }

    fn lease(&self) -> Option<Duration> {
        Some(Duration::from_secs(2))
    }

    fn charges_lost_deliveries(&self) -> bool {
        Self::row().loss_is_charged
    }
}

impl<const DEAD_LETTERS: bool> EnvelopeFixture for Redis<DEAD_LETTERS> {
    async fn publish_with(
        &self,
        body: &str,
        header: Option<(&str, &str)>,
        _: Option<&str>,
    ) -> Result<Published, ConnectError> {
        let mut fields = vec![("payload", body)];
        fields.extend(header);
        let id = self.inspect().xadd(STREAM, "*", &fields).unwrap();
        Ok(Published {
            message_id: Some(id),
            routing_key: STREAM.to_owned(),
        })
    }
}

impl<const DEAD_LETTERS: bool> TestBroker for Redis<DEAD_LETTERS> {
    const ACK_IS_CONFIRMED: bool = true;
    const MANY: usize = 10_000;

    fn server() -> (&'static str, (u32, u32)) {
        static SERVER: OnceLock<(&str, (u32, u32))> = OnceLock::new();
        *SERVER.get_or_init(|| {
            let text = printed(Command::new("redis-server").arg("--version"));
            let is_valkey = text.starts_with("Valkey");
            (if is_valkey { VALKEY } else { REDIS }, version(&text))
        })
    }

    async fn start() -> Self {
        let server = Server::start();
        let mut inspect = server.inspect();
        let () = inspect.xgroup_create_mkstream(STREAM, GROUP, "0").unwrap();
        let group = ConsumerGroup::new(STREAM, GROUP)
            .min_idle(Duration::from_secs(2))
            .delete_settled();
        Self {
            proxy: Proxy::start(server.host()).await,
            group: match DEAD_LETTERS {
                true => group,
                false => group.no_dead_letter(),
            },
            server: Mutex::new(server),
            inspect: Mutex::new(inspect),
        }
    }

    async fn stop(self) {}

    fn connector(&self, prefetch: usize) -> Connector<Deliveries, ConnectError> {
        let group = self.group.clone().prefetch(prefetch);
        let url = format!("redis://{}", self.proxy.address());
        Box::new(move || {
            let (group, url) = (group.clone(), url.clone());
            Box::pin(async move { group.connect(url).await })
        })
    }

    async fn stall(&self) {
        self.proxy.stall();
    }

    async fn cut(&self) {
        self.proxy.cut();
    }

    async fn kill(&self) {
        self.server.lock().unwrap().kill();
    }

    async fn revive(&self) {
        let mut server = self.server.lock().unwrap();
        server.restart();
        *self.inspect() = server.inspect();
    }
}

impl<const DEAD_LETTERS: bool> RemoteBroker for Redis<DEAD_LETTERS> {
    /// An argument of the script that acks.
    const ACK: &'static [u8] = b"DEL\r\n";

    fn with_proxies(&self, mut act: impl FnMut(&Proxy)) {
        act(&self.proxy);
    }

    fn freeze(&self, freezes: bool) {
        let server = self.server.lock().unwrap();
        match freezes {
            true => server.pause(),
            false => server.resume(),
        }
    }
}

mod watchdog {
    use super::Redis;

    crate::watchdog::scenarios!(Redis<true>, with the slow ones);
}

mod with_dead_letters {
    use super::Redis;

    crate::conformance::scenarios!(
        tokio::test(flavor = "multi_thread", worker_threads = 2),
        Redis<true>
    );
}

mod without_dead_letters {
    use super::Redis;

    crate::conformance::scenarios!(
        tokio::test(flavor = "multi_thread", worker_threads = 2),
        Redis<false>
    );
}
