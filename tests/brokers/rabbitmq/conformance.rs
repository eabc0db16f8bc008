//! Scenarios of all brokers on RabbitMQ, with classic and with quorum queues.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use tokio::time::{sleep, timeout};
use tower_sentinel::{
    broker::rabbitmq::{
        ConnectError, Deliveries, Queue, SubscriptionError, connect,
        lapin::{
            self, BasicProperties, Channel,
            message::BasicGetMessage,
            options::{
                BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, QueueBindOptions,
                QueueDeclareOptions, QueueDeleteOptions,
            },
            types::{AMQPValue, FieldTable},
        },
    },
    conformance::{Backlog, DeadLetter, EnvelopeFixture, Fixture, Published},
    settle::Capabilities,
};

use super::server::{Server, Version, shared, version};
use crate::{
    conformance::{
        Connector, TestBroker, kind,
        verdicts::{RABBITMQ_CLASSIC, RABBITMQ_QUORUM},
    },
    proxy::Proxy,
    watchdog::RemoteBroker,
};

/// Time to wait for a queue that has no leader yet.
const SUBSCRIBE: Duration = Duration::from_secs(2);

/// Settings by which a classic queue keeps up to 64 acks in memory.
///
/// The jobs of these acks come back after a kill. By default 3.10 has a journal of 32768 entries, which is
/// written when it is full, or when the queue is idle: in twenty kills amid 10 000 jobs, each job ran ten
/// times. From 4.0 on all classic queues have the second version of their index, without a journal: it writes
/// acks when there are as many as half of a segment's entries, which are 4096. So each kill brought up to
/// 2048 jobs back, and twenty of them some 20 000.
const ACKS: &str = "{queue_index_max_journal_entries, 64},
    {classic_queue_index_v2_segment_entry_count, 128}";

/// Counts the unacked jobs, and all jobs, in the queue and in its retry queues.
const COUNT: &str = r#"
Retries = <<Name/binary, ".retry.">>,
Counts = [
    case amqqueue:get_type(Queue) of
        rabbit_quorum_queue ->
            Overview = {rabbit_fifo, overview, []},
            {ok, {_, Counted}, _} = ra:leader_query(amqqueue:get_pid(Queue), Overview),
            #{num_checked_out := Unacked, num_messages := Total} = Counted,
            {Unacked, Total};
        _ ->
            Items = [messages_unacknowledged, messages],
            [{_, Unacked}, {_, Total}] = rabbit_amqqueue:info(Queue, Items),
            {Unacked, Total}
    end
    || Queue <- rabbit_amqqueue:list(<<"/">>),
       Found <- [element(4, amqqueue:get_name(Queue))],
       Found =:= Name orelse string:prefix(Found, Retries) =/= nomatch
],
{lists:sum([Unacked || {Unacked, _} <- Counts]), lists:sum([Total || {_, Total} <- Counts])}
"#;

/// A queue for this test, and a queue for dead letters beside it, which it uses or does not.
struct Rabbit<const QUORUM: bool, const DEAD_LETTER: bool> {
    server: Servers,
    name: String,
    /// Of the test, past all proxies.
    admin: tokio::sync::Mutex<Channel>,
    /// One for each subscription.
    proxies: Arc<Mutex<Vec<Proxy>>>,
    /// Dead letters that were read so far.
    letters: Mutex<Vec<DeadLetter>>,
}

enum Servers {
    Shared(&'static Server),
    Own(Box<Mutex<Server>>),
}

impl Servers {
    fn with<T>(&self, ask: impl FnOnce(&Server) -> T) -> T {
        match self {
            Servers::Shared(server) => ask(server),
            Servers::Own(server) => ask(&server.lock().unwrap()),
        }
    }

    fn own(&self) -> &Mutex<Server> {
        match self {
            Servers::Shared(_) => panic!("the others need it"),
            Servers::Own(server) => server,
        }
    }
}

type NoSubscription = crate::conformance::NoSubscription<ConnectError, SubscriptionError>;

impl<const QUORUM: bool, const DEAD_LETTER: bool> Rabbit<QUORUM, DEAD_LETTER> {
    async fn on(server: Servers) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let nth = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("conformance-{nth}");
        let admin = admin(&server.with(Server::address)).await.unwrap();
        for (name, queue_type) in [
            (name.clone(), if QUORUM { "quorum" } else { "classic" }),
            (dead(&name), "classic"),
        ] {
            let mut arguments = FieldTable::default();
            let queue_type = AMQPValue::LongString(queue_type.into());
            arguments.insert("x-queue-type".into(), queue_type);
            let options = QueueDeclareOptions::durable();
            let declared = admin.queue_declare(name.into(), options, arguments);
            declared.await.unwrap();
        }
        Self {
            server,
            name,
            admin: tokio::sync::Mutex::new(admin),
            proxies: Arc::default(),
            letters: Mutex::default(),
        }
    }

    async fn counted(&self) -> Option<Backlog> {
        let code = format!("Name = <<\"{}\">>,{COUNT}", self.name);
        let evaluating = self.server.with(|server| server.eval(&code));
        let counts = evaluating.await?;
        let (unacked, total) = counts.trim_matches(['{', '}']).split_once(',')?;
        let count = |count: &str| count.trim().parse().ok();
        Some(Backlog {
            unacked: count(unacked)?,
            total: count(total)?,
        })
    }

    async fn get_dead(&self) -> Option<BasicGetMessage> {
        let options = BasicGetOptions { no_ack: true };
        let admin = self.admin.lock().await;
        let letter = admin.basic_get(dead(&self.name).into(), options).await;
        letter.unwrap()
    }
}

fn dead(name: &str) -> String {
    format!("{name}.dead")
}

async fn admin(address: &str) -> Option<Channel> {
    let connection = connect(address).await.ok()?;
    let channel = connection.create_channel().await.ok()?;
    let options = ConfirmSelectOptions::default();
    channel.confirm_select(options).await.ok()?;
    Some(channel)
}

async fn published(
    channel: &Channel,
    exchange: &str,
    routing_key: &str,
    body: &str,
    properties: BasicProperties,
) -> lapin::Result<bool> {
    let options = BasicPublishOptions::default();
    let properties = properties.with_delivery_mode(2);
    let (exchange, routing_key) = (exchange.into(), routing_key.into());
    let body = body.as_bytes();
    let publishing = channel.basic_publish(exchange, routing_key, options, body, properties);
    Ok(publishing.await?.await?.is_ack())
}

impl<const QUORUM: bool, const DEAD_LETTER: bool> Fixture for Rabbit<QUORUM, DEAD_LETTER> {
    type Subscription = Deliveries;
    type Error = NoSubscription;

    async fn publish(&self, body: &str) -> Result<(), NoSubscription> {
        let admin = self.admin.lock().await.clone();
        let properties = BasicProperties::default();
        let published = published(&admin, "", &self.name, body, properties).await;
        assert!(published.unwrap());
        Ok(())
    }

    async fn subscribe(&self, prefetch: usize) -> Result<Deliveries, NoSubscription> {
        self.connector(prefetch)().await
    }

    async fn backlog(&self) -> Result<Backlog, NoSubscription> {
        for _ in 0..200 {
            if let Some(backlog) = self.counted().await {
                return Ok(backlog);
            }
            sleep(Duration::from_millis(50)).await;
        }
        panic!("{} can't be counted", self.name);
    }

    async fn dead_letters(&self) -> Result<Vec<DeadLetter>, NoSubscription> {
        while let Some(letter) = self.get_dead().await {
            let headers = letter.properties.headers().as_ref().unwrap().inner();
            let text = |name: &str| match headers.get(name) {
                Some(AMQPValue::LongString(text)) => Some(text.to_string()),
                _ => None,
            };
            let letter = DeadLetter {
                body: String::from_utf8(letter.data.clone()).unwrap(),
                kind: kind(&text("x-outcome-kind").unwrap()),
                message: text("x-outcome-message"),
            };
            self.letters.lock().unwrap().push(letter);
        }
        Ok(self.letters.lock().unwrap().clone())
    }

    fn capabilities(&self) -> Capabilities {
        let mut capabilities = Capabilities::none().delay().free_delayed_release();
        // A quorum queue counts it before 4.3.
        if !QUORUM || version() >= Version::V4_3 {
            capabilities = capabilities.free_release();
        }
        if DEAD_LETTER {
            capabilities = capabilities.dead_letter();
        }
        capabilities
    }

    fn lease(&self) -> Option<Duration> {
        None
    }

    fn charges_lost_deliveries(&self) -> bool {
        Self::row().loss_is_charged
    }
}

impl<const QUORUM: bool, const DEAD_LETTER: bool> EnvelopeFixture for Rabbit<QUORUM, DEAD_LETTER> {
    async fn publish_with(
        &self,
        body: &str,
        header: Option<(&str, &str)>,
        message_id: Option<&str>,
    ) -> Result<Published, NoSubscription> {
        let admin = self.admin.lock().await.clone();
        let (exchange, routing_key) = ("amq.topic", format!("{}.created", self.name));
        let options = QueueBindOptions::default();
        let (queue, key) = (self.name.as_str().into(), routing_key.as_str().into());
        let bound = admin.queue_bind(queue, exchange.into(), key, options, FieldTable::default());
        bound.await.unwrap();
        let mut properties = BasicProperties::default();
        if let Some((name, value)) = header {
            let mut headers = FieldTable::default();
            headers.insert(name.into(), AMQPValue::LongString(value.into()));
            properties = properties.with_headers(headers);
        }
        if let Some(id) = message_id {
            properties = properties.with_message_id(id.into());
        }
        let published = published(&admin, exchange, &routing_key, body, properties).await;
        assert!(published.unwrap());
        Ok(Published {
            message_id: message_id.map(str::to_owned),
            routing_key,
        })
    }
}

impl<const QUORUM: bool, const DEAD_LETTER: bool> TestBroker for Rabbit<QUORUM, DEAD_LETTER> {
    const ACK_IS_CONFIRMED: bool = false;
    /// Acks on their way into the log of a quorum queue, or in the memory of a classic one.
    const UNPROVEN: Option<usize> = Some(if QUORUM { 50 } else { 2 * 64 });
    const MANY: usize = 10_000;

    fn server() -> (&'static str, (u32, u32)) {
        let Version(major, minor) = version();
        let queue = if QUORUM {
            RABBITMQ_QUORUM
        } else {
            RABBITMQ_CLASSIC
        };
        (queue, (major, minor))
    }

    async fn start() -> Self {
        Self::on(Servers::Shared(shared())).await
    }

    async fn start_mortal() -> Self {
        let server = Servers::Own(Box::new(Mutex::new(Server::start(ACKS))));
        let broker = Self::on(server).await;
        let server = &broker.server;
        let writing = server.with(|server| server.has_written(&broker.name, QUORUM));
        writing.await;
        broker
    }

    async fn stop(self) {
        if let Servers::Own(_) = self.server {
            return;
        }
        let admin = self.admin.lock().await;
        for queue in [self.name.clone(), dead(&self.name)] {
            let options = QueueDeleteOptions::default();
            admin.queue_delete(queue.into(), options).await.unwrap();
        }
    }

    fn connector(&self, prefetch: usize) -> Connector<Deliveries, NoSubscription> {
        let mut queue = match QUORUM {
            true => Queue::quorum(&self.name),
            false => Queue::classic(&self.name),
        };
        queue = queue.prefetch(prefetch).subscribe_timeout(SUBSCRIBE);
        if DEAD_LETTER {
            queue = queue.dead_letter(dead(&self.name));
        }
        let (host, proxies) = (self.server.with(Server::host), Arc::clone(&self.proxies));
        Box::new(move || {
            let (queue, host, proxies) = (queue.clone(), host.clone(), Arc::clone(&proxies));
            Box::pin(async move {
                let proxy = Proxy::start(host).await;
                let address = format!("amqp://guest:guest@{}/%2f", proxy.address());
                let connection = connect(&address).await;
                let connection = connection.map_err(NoSubscription::Connect)?;
                let deliveries = queue.subscribe(&connection).await;
                let deliveries = deliveries.map_err(NoSubscription::Subscribe)?;
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
        self.server.own().lock().unwrap().kill();
    }

    async fn revive(&self) {
        self.server.own().lock().unwrap().restart();
        let address = self.server.with(Server::address);
        // Until the queue has a leader again.
        self.backlog().await.unwrap();
        // It may listen before it serves, and a channel that is being opened meanwhile may hang.
        let channel = loop {
            match timeout(Duration::from_secs(5), admin(&address)).await {
                Ok(Some(channel)) => break channel,
                _ => sleep(Duration::from_millis(50)).await,
            }
        };
        *self.admin.lock().await = channel;
    }
}

impl<const QUORUM: bool, const DEAD_LETTER: bool> RemoteBroker for Rabbit<QUORUM, DEAD_LETTER> {
    /// The class and the method of `basic.ack`.
    const ACK: &'static [u8] = &[0, 60, 0, 80];

    fn with_proxies(&self, act: impl FnMut(&Proxy)) {
        self.proxies.lock().unwrap().iter().for_each(act);
    }

    fn freeze(&self, freezes: bool) {
        self.server.own().lock().unwrap().freeze(freezes);
    }
}

mod watchdog {
    mod classic {
        use super::super::Rabbit;

        crate::watchdog::scenarios!(Rabbit<false, true>);
    }

    mod quorum {
        use super::super::Rabbit;

        crate::watchdog::scenarios!(Rabbit<true, true>, with the slow ones);
    }
}

mod classic {
    use super::Rabbit;

    crate::conformance::scenarios!(
        tokio::test(flavor = "multi_thread", worker_threads = 2),
        Rabbit<false, true>
    );
}

mod quorum {
    use super::Rabbit;

    crate::conformance::scenarios!(
        tokio::test(flavor = "multi_thread", worker_threads = 2),
        Rabbit<true, true>
    );
}

/// The scenarios that depend on whether rejected jobs are kept.
mod without_dead_letters {
    use tower_sentinel::conformance;

    use super::{Rabbit, TestBroker};
    use crate::conformance::passes;

    macro_rules! scenarios {
        ($($name:ident)*) => {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $name() {
                    let broker = Rabbit::<false, false>::start().await;
                    passes(conformance::$name(&broker)).await;
                    broker.stop().await;
                    let broker = Rabbit::<true, false>::start().await;
                    passes(conformance::$name(&broker)).await;
                    broker.stop().await;
                }
            )*
        };
    }

    scenarios! {
        a_reject_is_kept_with_its_reason
        a_second_settlement_is_refused
        a_tag_tells_what_its_broker_can_do
        each_outcome_settles_as_decided
        a_job_that_cannot_be_decoded_is_rejected_with_a_reason
        a_delivery_limit_ends_a_loop
    }
}
