//! Scenarios of all brokers on NATS.

use std::{
    process::Command,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::time::{sleep, timeout};
use tower_sentinel::{
    broker::nats::{
        ConnectError, Deliveries, Pull, SubscriptionError,
        async_nats::{
            HeaderMap,
            jetstream::{
                self, Context,
                consumer::{PullConsumer, pull},
                stream,
            },
        },
        connect,
    },
    conformance::{Backlog, DeadLetter, EnvelopeFixture, Fixture, Published},
    settle::Capabilities,
};

use super::server::Server;
use crate::{
    conformance::{
        Connector, TestBroker, kind,
        verdicts::{NATS, printed, version},
    },
    proxy::Proxy,
    watchdog::RemoteBroker,
};

/// Long enough for a machine that stands still for a moment.
const REDELIVERY: Duration = Duration::from_secs(4);

/// With a dead-letter subject, or without; with schedules that delay retries, or without.
struct Nats<const DEAD_LETTER: bool, const SCHEDULES: bool = false> {
    server: Mutex<Server>,
    /// Of the test, past all proxies.
    context: Context,
    /// One for each subscription.
    proxies: Arc<Mutex<Vec<Proxy>>>,
    published: AtomicU64,
}

type NoSubscription = crate::conformance::NoSubscription<ConnectError, SubscriptionError>;

async fn subscribe(
    address: &str,
    prefetch: usize,
    dead_letter: bool,
    schedules: bool,
) -> Result<Deliveries, NoSubscription> {
    let client = connect(address).await;
    let context = jetstream::new(client.map_err(NoSubscription::Connect)?);
    let mut pull = Pull::new("jobs", "workers")
        .prefetch(prefetch)
        .confirm_timeout(Duration::from_secs(1))
        .idle_heartbeat(Duration::from_millis(500))
        .reconnect_limit(Duration::from_millis(1_500));
    if dead_letter {
        pull = pull.dead_letter("dead");
    }
    if schedules {
        pull = pull.schedules("delayed");
    }
    let subscribing = pull.subscribe(&context);
    subscribing.await.map_err(NoSubscription::Subscribe)
}

impl<const DEAD_LETTER: bool, const SCHEDULES: bool> Nats<DEAD_LETTER, SCHEDULES> {
    fn address(&self) -> String {
        self.server.lock().unwrap().address()
    }

    /// Publishes once, however often it is tried.
    async fn publish_to(&self, subject: &str, headers: HeaderMap, body: &str) {
        loop {
            let (subject, headers) = (subject.to_owned(), headers.clone());
            let body = body.to_owned().into();
            let publishing = async {
                let ack = self.context.publish_with_headers(subject, headers, body);
                ack.await.ok()?.await.ok()
            };
            if let Ok(Some(_)) = timeout(Duration::from_secs(1), publishing).await {
                return;
            }
            sleep(Duration::from_millis(20)).await;
        }
    }
}

impl<const DEAD_LETTER: bool, const SCHEDULES: bool> Fixture for Nats<DEAD_LETTER, SCHEDULES> {
    type Subscription = Deliveries;
    type Error = NoSubscription;

    async fn publish(&self, body: &str) -> Result<(), NoSubscription> {
        let id = self.published.fetch_add(1, Ordering::Relaxed);
        let mut headers = HeaderMap::new();
        headers.insert("Nats-Msg-Id", id.to_string());
        self.publish_to("jobs", headers, body).await;
        Ok(())
    }

    async fn subscribe(&self, prefetch: usize) -> Result<Deliveries, NoSubscription> {
        self.connector(prefetch)().await
    }

    async fn backlog(&self) -> Result<Backlog, NoSubscription> {
        loop {
            let asking = async {
                let consumer = self.context.get_consumer_from_stream("workers", "jobs");
                let consumer: PullConsumer = consumer.await.ok()?;
                Some(consumer.cached_info().clone())
            };
            if let Ok(Some(info)) = timeout(Duration::from_secs(1), asking).await {
                let pending = usize::try_from(info.num_pending).unwrap();
                return Ok(Backlog {
                    unacked: info.num_ack_pending,
                    total: pending + info.num_ack_pending,
                });
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    async fn dead_letters(&self) -> Result<Vec<DeadLetter>, NoSubscription> {
        let stream = self.context.get_stream("dead").await.unwrap();
        let mut letters = Vec::new();
        for sequence in 1..=stream.cached_info().state.last_sequence {
            let letter = stream.get_raw_message(sequence).await.unwrap();
            let header = |name| letter.headers.get(name).map(|value| value.as_str());
            letters.push(DeadLetter {
                body: String::from_utf8(letter.payload.to_vec()).unwrap(),
                kind: kind(header("x-outcome-kind").unwrap()),
                message: header("x-outcome-message").map(str::to_owned),
            });
        }
        Ok(letters)
    }

    fn capabilities(&self) -> Capabilities {
        let mut capabilities = Capabilities::none().delay().keep_alive();
        if SCHEDULES {
            capabilities = capabilities.free_delayed_release();
        }
        match DEAD_LETTER {
            true => capabilities.dead_letter(),
            false => capabilities,
        }
    }

    fn lease(&self) -> Option<Duration> {
        Some(REDELIVERY)
    }

    fn charges_lost_deliveries(&self) -> bool {
        Self::row().loss_is_charged
    }

    fn tells_given_back(&self) -> bool {
        false
    }
}

impl<const DEAD_LETTER: bool, const SCHEDULES: bool> EnvelopeFixture
    for Nats<DEAD_LETTER, SCHEDULES>
{
    async fn publish_with(
        &self,
        body: &str,
        header: Option<(&str, &str)>,
        message_id: Option<&str>,
    ) -> Result<Published, NoSubscription> {
        let mut headers = HeaderMap::new();
        if let Some((name, value)) = header {
            headers.insert(name, value);
        }
        if let Some(id) = message_id {
            headers.insert("Nats-Msg-Id", id);
        }
        self.publish_to("jobs.created", headers, body).await;
        Ok(Published {
            message_id: message_id.map(str::to_owned),
            routing_key: "jobs.created".to_owned(),
        })
    }
}

impl<const DEAD_LETTER: bool, const SCHEDULES: bool> TestBroker for Nats<DEAD_LETTER, SCHEDULES> {
    /// By a server that lives: 2.9 confirms an ack before it writes it.
    const ACK_IS_CONFIRMED: bool = false;
    const MANY: usize = 10_000;

    fn server() -> (&'static str, (u32, u32)) {
        static VERSION: OnceLock<(u32, u32)> = OnceLock::new();
        let read = || version(&printed(Command::new("nats-server").arg("--version")));
        (NATS, *VERSION.get_or_init(read))
    }

    async fn start() -> Self {
        let server = Server::start();
        let context = jetstream::new(connect(&server.address()).await.unwrap());
        let mut jobs = stream::Config {
            name: "jobs".into(),
            subjects: vec!["jobs".into(), "jobs.>".into()],
            ..stream::Config::default()
        };
        if SCHEDULES {
            jobs.subjects.push("delayed.*".into());
            jobs.retention = stream::RetentionPolicy::WorkQueue;
            jobs.allow_message_schedules = true;
        }
        let dead = stream::Config {
            name: "dead".into(),
            subjects: vec!["dead".into()],
            ..stream::Config::default()
        };
        for config in [jobs, dead] {
            context.create_stream(config).await.unwrap();
        }
        let config = pull::Config {
            durable_name: Some("workers".into()),
            filter_subject: if SCHEDULES { "jobs.>" } else { "" }.to_owned(),
            ack_wait: REDELIVERY,
            ..pull::Config::default()
        };
        let consumer = context.create_consumer_on_stream(config, "jobs");
        consumer.await.unwrap();
        Self {
            server: Mutex::new(server),
            context,
            proxies: Arc::default(),
            published: AtomicU64::new(0),
        }
    }

    async fn stop(self) {}

    fn connector(&self, prefetch: usize) -> Connector<Deliveries, NoSubscription> {
        let (address, proxies) = (self.address(), Arc::clone(&self.proxies));
        Box::new(move || {
            let (address, proxies) = (address.clone(), Arc::clone(&proxies));
            Box::pin(async move {
                let proxy = Proxy::start(address).await;
                let address = proxy.address();
                let deliveries = subscribe(&address, prefetch, DEAD_LETTER, SCHEDULES).await?;
                proxies.lock().unwrap().push(proxy);
                Ok(deliveries)
            })
        })
    }

    async fn stall(&self) {
        self.proxies.lock().unwrap().iter().for_each(Proxy::stall);
    }

    async fn cut(&self) {
        self.proxies.lock().unwrap().clear();
    }

    async fn kill(&self) {
        self.server.lock().unwrap().kill();
    }

    async fn revive(&self) {
        self.server.lock().unwrap().restart();
    }
}

impl<const DEAD_LETTER: bool, const SCHEDULES: bool> RemoteBroker for Nats<DEAD_LETTER, SCHEDULES> {
    const ACK: &'static [u8] = b"+ACK";

    fn patient_connector(&self, prefetch: usize) -> Connector<Deliveries, NoSubscription> {
        let (address, proxies) = (self.address(), Arc::clone(&self.proxies));
        Box::new(move || {
            let (address, proxies) = (address.clone(), Arc::clone(&proxies));
            Box::pin(async move {
                let proxy = Proxy::start(address).await;
                let client = connect(&proxy.address()).await;
                let context = jetstream::new(client.map_err(NoSubscription::Connect)?);
                let pull = Pull::new("jobs", "workers").prefetch(prefetch);
                let deliveries = pull.subscribe(&context).await;
                let deliveries = deliveries.map_err(NoSubscription::Subscribe)?;
                proxies.lock().unwrap().push(proxy);
                Ok(deliveries)
            })
        })
    }

    fn with_proxies(&self, act: impl FnMut(&Proxy)) {
        self.proxies.lock().unwrap().iter().for_each(act);
    }

    fn freeze(&self, freezes: bool) {
        let signal = if freezes { "STOP" } else { "CONT" };
        self.server.lock().unwrap().signal(signal);
    }
}

mod watchdog {
    use super::Nats;

    crate::watchdog::scenarios!(Nats<true>, with the slow ones);
}

mod with_dead_letters {
    use super::Nats;

    crate::conformance::scenarios!(tokio::test(flavor = "multi_thread"), Nats<true>);
}

mod without_dead_letters {
    use super::Nats;

    crate::conformance::scenarios!(tokio::test(flavor = "multi_thread"), Nats<false>);
}

/// The scenarios to which it matters that a message which a schedule brings back is another one.
mod with_schedules {
    use tower_sentinel::conformance::a_job_keeps_its_envelope_when_it_comes_back;

    use super::{Nats, TestBroker};
    use crate::conformance::passes;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_job_keeps_its_envelope() {
        let (_, version) = Nats::<true, true>::server();
        if version < (2, 12) {
            println!("skipped: this nats-server has no message schedules");
            return;
        }
        let broker = Nats::<true, true>::start().await;
        passes(a_job_keeps_its_envelope_when_it_comes_back(&broker)).await;
        broker.stop().await;
    }
}
