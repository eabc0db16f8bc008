//! All printed output: no password, no payload.

use std::{
    error::Error,
    fmt::{self, Write},
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::{Stream, StreamExt};
use tokio::{sync::mpsc, time::timeout};
use tower::{ServiceBuilder, service_fn};
use tower_sentinel::{
    Consumer, DecisionExt, Job, Outcome, SentinelLayer, SettlePolicy, Verdict, ack_on_success,
    broker::{
        nats::{
            self, Pull,
            async_nats::jetstream::{self, consumer::pull, stream},
        },
        rabbitmq::{
            self, Queue,
            lapin::{
                BasicProperties, ConnectionProperties,
                options::{BasicPublishOptions, QueueDeclareOptions, QueueDeleteOptions},
                types::FieldTable,
            },
        },
        redis::{ConsumerGroup, redis},
    },
    settle::{Reason, Settle},
};
use tracing::{
    Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
    span,
};
use tracing_subscriber::{Layer, layer::Context, layer::SubscriberExt, util::SubscriberInitExt};

use super::{BROKERS, Broker, all_of};
use crate::{
    child::{Child, Ledger, setting},
    nats::server::Server as Nats,
    rabbitmq::server::shared as shared_rabbitmq,
    redis::server::Server as Redis,
};

const PASSWORD: &str = "s3cr3t-m4rk3r";
const PAYLOAD: &str = "p4yl04d-m4rk3r";
const SOON: Duration = Duration::from_secs(30);

/// Printed output, with its source.
#[derive(Clone, Default)]
struct Output(Arc<Mutex<Vec<(String, String)>>>);

impl Output {
    fn add(&self, from: impl Into<String>, text: String) {
        self.0.lock().unwrap().push((from.into(), text));
    }

    fn debug(&self, what: &str, value: &dyn fmt::Debug) {
        self.add(what, format!("{value:?}\n{value:#?}"));
    }

    /// Looks for a secret as text, and as bytes that are printed as numbers.
    fn has(&self, secret: &str) -> Vec<(String, String)> {
        let numbers: Vec<_> = secret.bytes().map(|byte| byte.to_string()).collect();
        let numbers = numbers.join(", ");
        let all = self.0.lock().unwrap();
        let found = all.iter().filter(|(_, text)| {
            let line = text.replace('\n', " ");
            let line: Vec<_> = line.split_whitespace().collect();
            text.contains(secret) || line.join(" ").contains(&numbers)
        });
        found.cloned().collect()
    }
}

struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        write!(self.0, "{field}={value:?} ").unwrap();
    }
}

impl Output {
    fn record(&self, metadata: &Metadata<'_>, write: impl FnOnce(&mut Text)) {
        let (target, level) = (metadata.target(), *metadata.level());
        // These two print the frames at this level; the documentation says so.
        let is_client = ["lapin", "async_nats"]
            .iter()
            .any(|client| target.starts_with(client));
        // And a dead letter that no queue takes.
        let is_returned = target == "lapin::returned_messages";
        if (is_client && level == Level::TRACE) || is_returned {
            return;
        }
        let mut text = Text(String::new());
        write(&mut text);
        let from = format!("{} {}", metadata.level(), metadata.target());
        self.add(from, text.0);
    }
}

impl<S: Subscriber> Layer<S> for Output {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        self.record(event.metadata(), |text| event.record(text));
    }

    fn on_new_span(&self, attributes: &span::Attributes<'_>, _: &span::Id, _: Context<'_, S>) {
        self.record(attributes.metadata(), |text| attributes.record(text));
    }
}

/// Runs jobs that fail, panic and complete, by a consumer, until one of them completes.
macro_rules! consume {
    ($output:expr, $jobs:expr, $Delivery:ty) => {{
        let runs = Arc::new(AtomicUsize::new(0));
        let (completed, mut is_completed) = mpsc::unbounded_channel();
        let process = service_fn(move |_: $Delivery| {
            let (run, completed) = (runs.fetch_add(1, Ordering::Relaxed), completed.clone());
            async move {
                match run {
                    0 => Err(io::Error::other("bad")),
                    1 => panic!("bad"),
                    _ => Ok(completed.send(()).unwrap()),
                }
            }
        });
        let sentinel = SentinelLayer::new(SettlePolicy::new(ack_on_success().delivery_limit(9)));
        let worker = ServiceBuilder::new()
            .layer($jobs.gate())
            .layer(sentinel.process_span())
            .service(process);
        let shutdown = async move { is_completed.recv().await.unwrap() };
        let consuming = Consumer::new($jobs, worker).with_graceful_shutdown(shutdown);
        match timeout(SOON, consuming).await.unwrap() {
            Ok(summary) => $output.debug("summary", &summary),
            Err(error) => $output.add("consumer", all_of(&error)),
        }
    }};
}

fn reason() -> Reason {
    let failed = Outcome::<(), _>::Failed(std::io::Error::other("bad"));
    Reason::of(&failed, Duration::ZERO)
}

/// Settles the next job, and prints all that there is of it.
async fn settle_next<S, J, E>(output: &Output, jobs: &mut S, verdict: Verdict)
where
    S: Stream<Item = Result<J, E>> + Unpin,
    J: Job<Tag: Settle<Error: Error + 'static> + fmt::Debug> + fmt::Debug,
    E: fmt::Debug,
{
    let job = timeout(SOON, jobs.next()).await.unwrap().unwrap().unwrap();
    output.debug("job", &job);
    output.debug("tag", &job.tag());
    if let Err(unsettled) = job.tag().settle(verdict, reason()).await {
        output.add("unsettled", all_of(&unsettled.error));
    }
}

/// Reads until the end, and prints it.
async fn drain<S, J, E>(output: &Output, mut jobs: S)
where
    S: Stream<Item = Result<J, E>> + Unpin,
    J: fmt::Debug,
    E: Error + 'static,
{
    while let Some(job) = timeout(SOON, jobs.next()).await.unwrap() {
        match job {
            Ok(job) => output.debug("job", &job),
            Err(error) => output.add("end", all_of(&error)),
        }
    }
}

/// In its own process, which alone may set the target of its events.
#[test]
fn no_password_and_no_payload_is_printed() {
    let test = "no_password_and_no_payload_is_printed";
    if setting("OUTPUT").is_none() {
        let mut child = Child::start(module_path!(), test, &[("OUTPUT", "yes")]);
        child.end();
        assert_eq!(child.told("searched").len(), 1);
        return;
    }
    let output = Output::default();
    tracing_subscriber::registry().with(output.clone()).init();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        rabbitmq(&output).await;
        nats(&output).await;
        redis(&output).await;
        refused(&output).await;
    });
    // The search finds something, and the clients are heard.
    assert!(!output.has("user-m4rk3r").is_empty());
    for client in ["lapin", "async_nats", "tower_sentinel"] {
        let all = output.0.lock().unwrap();
        assert!(
            all.iter().any(|(from, _)| from.contains(client)),
            "{client} is silent"
        );
    }
    // The address that it connects to, and the queue that it subscribes to.
    for said in [
        "connected to rabbitmq address=\"",
        "subscribed to a queue of rabbitmq queue=\"output\"",
        "connected to nats address=\"127.0.0.1:",
        "subscribed to a consumer of nats stream=\"jobs\" consumer=\"workers\"",
        "subscribed to a group of redis address=\"127.0.0.1:",
    ] {
        assert!(!output.has(said).is_empty(), "{said}");
    }
    for secret in [PASSWORD, PAYLOAD] {
        let found = output.has(secret);
        assert!(found.is_empty(), "{secret}: {found:#?}");
    }
    Ledger::own().write("searched", "all");
}

async fn rabbitmq(output: &Output) {
    let server = shared_rabbitmq();
    server.ctl(&["add_user", "user-m4rk3r", PASSWORD]);
    server.ctl(&["set_permissions", "user-m4rk3r", ".*", ".*", ".*"]);
    let address = server.address_of("user-m4rk3r", PASSWORD);
    let properties = ConnectionProperties::default().with_connection_name("output".into());
    let connection = rabbitmq::connect_with(properties, Default::default(), &address).await;
    let connection = connection.unwrap();
    output.debug("user", &"user-m4rk3r");
    output.debug("connection", &connection);
    let renewed = connection.update_secret(PASSWORD.into(), "test".into());
    renewed.await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    for name in ["output", "output.dead", "nowhere"] {
        let durable = QueueDeclareOptions::durable();
        let declared = channel.queue_declare(name.into(), durable, FieldTable::default());
        declared.await.unwrap();
    }
    let publish = async || {
        let publishing = channel.basic_publish(
            "".into(),
            "output".into(),
            BasicPublishOptions::default(),
            PAYLOAD.as_bytes(),
            BasicProperties::default(),
        );
        publishing.await.unwrap().await.unwrap();
    };
    let queue = Queue::classic("output").dead_letter("output.dead");
    output.debug("queue", &queue);
    let mut jobs = queue.clone().subscribe(&connection).await.unwrap();
    for verdict in [Verdict::retry(), Verdict::Reject, Verdict::Ack] {
        publish().await;
        settle_next(output, &mut jobs, verdict).await;
    }
    output.debug("jobs", &jobs);
    for _ in 0..3 {
        publish().await;
    }
    consume!(output, jobs, rabbitmq::Delivery);

    // Its dead letter is returned by the server.
    let mut jobs = queue
        .dead_letter("nowhere")
        .subscribe(&connection)
        .await
        .unwrap();
    let deleted = channel.queue_delete("nowhere".into(), QueueDeleteOptions::default());
    deleted.await.unwrap();
    for verdict in [Verdict::release(), Verdict::Reject] {
        publish().await;
        settle_next(output, &mut jobs, verdict).await;
    }
    server.close_connection("output");
    drain(output, jobs).await;
}

async fn nats(output: &Output) {
    let arguments = ["--user", "user-m4rk3r", "--pass", PASSWORD];
    let mut server = Nats::start_with(&arguments);
    let address = format!("nats://user-m4rk3r:{PASSWORD}@{}", server.address());
    let client = nats::connect(&address).await.unwrap();
    output.debug("client", &client);
    let context = jetstream::new(client.clone());
    for name in ["jobs", "dead"] {
        let config = stream::Config {
            name: name.into(),
            subjects: vec![name.into()],
            ..stream::Config::default()
        };
        context.create_stream(config).await.unwrap();
    }
    let config = pull::Config {
        durable_name: Some("workers".into()),
        ..pull::Config::default()
    };
    context
        .create_consumer_on_stream(config, "jobs")
        .await
        .unwrap();
    let pull = Pull::new("jobs", "workers").dead_letter("dead");
    let mut jobs = pull.clone().subscribe(&context).await.unwrap();
    output.debug("pull", &pull);
    for verdict in [Verdict::retry(), Verdict::Reject, Verdict::Ack] {
        let published = context.publish("jobs", PAYLOAD.into()).await.unwrap();
        published.await.unwrap();
        settle_next(output, &mut jobs, verdict).await;
    }
    output.debug("jobs", &jobs);
    for _ in 0..3 {
        let published = context.publish("jobs", PAYLOAD.into()).await.unwrap();
        published.await.unwrap();
    }
    consume!(output, jobs, nats::Delivery);
    let mut jobs = pull.subscribe(&context).await.unwrap();
    let published = context.publish("jobs", PAYLOAD.into()).await.unwrap();
    published.await.unwrap();
    // It tries to connect again, until it is drained.
    let lost = timeout(SOON, jobs.next()).await.unwrap().unwrap().unwrap();
    server.kill();
    if let Err(unsettled) = lost.tag().settle(Verdict::Ack, reason()).await {
        output.add("unsettled", all_of(&unsettled.error));
    }
}

async fn redis(output: &Output) {
    let mut server = Redis::start();
    let mut admin = server.inspect();
    let mut acl = redis::cmd("ACL");
    acl.arg("SETUSER")
        .arg("user-m4rk3r")
        .arg("on")
        .arg(format!(">{PASSWORD}"));
    acl.arg("~*").arg("+@all").query::<()>(&mut admin).unwrap();
    let address = format!("redis://user-m4rk3r:{PASSWORD}@127.0.0.1:{}", server.port);
    let group = ConsumerGroup::new("jobs", "workers");
    let mut jobs = group.connect(&address).await.unwrap();
    output.debug("group", &group);
    for verdict in [Verdict::retry(), Verdict::Reject, Verdict::Ack] {
        let mut add = redis::cmd("XADD");
        add.arg("jobs").arg("*").arg("payload").arg(PAYLOAD);
        add.query::<()>(&mut admin).unwrap();
        settle_next(output, &mut jobs, verdict).await;
    }
    output.debug("jobs", &jobs);
    for _ in 0..4 {
        let mut add = redis::cmd("XADD");
        add.arg("jobs").arg("*").arg("payload").arg(PAYLOAD);
        add.query::<()>(&mut admin).unwrap();
    }
    consume!(output, jobs, tower_sentinel::broker::redis::Delivery);
    let mut jobs = group.connect(&address).await.unwrap();
    let mut add = redis::cmd("XADD");
    add.arg("jobs").arg("*").arg("payload").arg(PAYLOAD);
    add.query::<()>(&mut admin).unwrap();
    let lost = timeout(SOON, jobs.next()).await.unwrap().unwrap().unwrap();
    server.kill();
    if let Err(unsettled) = lost.tag().settle(Verdict::Ack, reason()).await {
        output.add("unsettled", all_of(&unsettled.error));
    }
    drain(output, jobs).await;
}

/// Connects where nobody listens, where nobody has this password, and with invalid addresses.
async fn refused(output: &Output) {
    let nats = Nats::start_with(&["--user", "me", "--pass", "other"]);
    let redis = Redis::with(&["--requirepass", "other"]);
    for broker in BROKERS {
        let place = match broker {
            Broker::RabbitMq => shared_rabbitmq().host(),
            Broker::Nats => nats.address(),
            Broker::Redis => redis.host(),
        };
        for rest in [
            format!("me:{PASSWORD}@{place}"),
            format!("me:{PASSWORD}@127.0.0.1:9"),
            format!("me:{PASSWORD}@[2001:db8::5]:9"),
            format!("me:{PASSWORD}@host:port"),
            format!("me:12/{PASSWORD}@{place}"),
            format!("me:12#{PASSWORD}@{place}"),
            format!("me:{PASSWORD}"),
        ] {
            for is_encrypted in [false, true] {
                let address = broker.address(is_encrypted, &rest);
                let error = broker.connect(&address).await.unwrap_err();
                output.add(format!("{broker:?}"), error);
            }
        }
    }
}
