//! A consumer's process that is killed with SIGKILL: its jobs go to another one.

use std::{convert::Infallible, future::pending, time::Duration};

use tokio::time::sleep;
use tower::{ServiceBuilder, service_fn};
use tower_sentinel::{
    Consumer, Job, KeepAliveLayer, SentinelLayer, ack_on_success,
    broker::{
        nats::{
            self, Pull,
            async_nats::jetstream::{
                self,
                consumer::{PullConsumer, pull},
                stream::{self, RetentionPolicy},
            },
        },
        rabbitmq::{
            self, Queue,
            lapin::{
                BasicProperties, Channel,
                options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions},
                types::{AMQPValue, FieldTable},
            },
        },
        redis::{
            ConsumerGroup,
            redis::{Commands, streams::StreamPendingReply},
        },
    },
    consumer::Subscription,
    settle::Settle,
};

use crate::{
    child::{Child, Ledger, asked_to_end, recording, setting},
    conformance::{eventually, sorted},
    nats::server::Server as NatsServer,
    rabbitmq::server::shared as shared_rabbitmq,
    redis::server::Server as RedisServer,
};

const PREFETCH: usize = 5;
const QUICK: usize = 10;
const SLOW: usize = 15;

/// After which time a broker gives a job to somebody else, if it was not kept alive.
const REDELIVERY: Duration = Duration::from_secs(4);

fn bodies() -> impl Iterator<Item = String> {
    let quick = (0..QUICK).map(|n| format!("quick {n:02}"));
    quick.chain((0..SLOW).map(|n| format!("slow {n:02}")))
}

// === in the consumer's process ===

/// Works until the end is requested; the first consumer never ends a slow job.
async fn work<B>(jobs: B)
where
    B: Subscription + Send + 'static,
    B::Job: Job<Tag: Settle<Future: Send> + std::fmt::Debug + Send + Sync>
        + AsRef<[u8]>
        + Send
        + 'static,
    B::Error: std::fmt::Display + Send + 'static,
{
    let is_first = setting("ROLE").unwrap() == "first";
    let ledger = Ledger::own();
    let policy = recording(ack_on_success(), ledger.clone());
    let handler = service_fn(move |job: B::Job| {
        let ledger = ledger.clone();
        async move {
            let body = String::from_utf8(job.as_ref().to_vec()).unwrap();
            ledger.write("begun", &body);
            if job.tag().redelivered() == Some(true) {
                ledger.write("again", &body);
            }
            if is_first && body.starts_with("slow") {
                pending::<()>().await;
            }
            Ok::<_, Infallible>(body)
        }
    });
    let service = ServiceBuilder::new()
        .concurrency_limit(PREFETCH)
        .layer(SentinelLayer::new(policy).no_timeout())
        .layer(KeepAliveLayer::new(REDELIVERY / 4))
        .service(handler);
    let consumer = Consumer::new(jobs, service).with_graceful_shutdown(asked_to_end());
    let summary = consumer.await.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!((summary.failed, summary.abandoned), (0, 0), "{summary:?}");
}

// === in the test ===

/// Declares a queue of this type, and publishes to it.
pub(crate) async fn on_rabbitmq(
    address: &str,
    queue: &str,
    queue_type: &str,
    bodies: impl Iterator<Item = String>,
) -> Channel {
    let admin = rabbitmq::connect(address).await.unwrap();
    let admin = admin.create_channel().await.unwrap();
    let options = ConfirmSelectOptions::default();
    admin.confirm_select(options).await.unwrap();
    let mut arguments = FieldTable::default();
    let queue_type = AMQPValue::LongString(queue_type.into());
    arguments.insert("x-queue-type".into(), queue_type);
    let options = QueueDeclareOptions::durable();
    let declared = admin.queue_declare(queue.into(), options, arguments);
    declared.await.unwrap();
    for body in bodies {
        let options = BasicPublishOptions::default();
        let properties = BasicProperties::default().with_delivery_mode(2);
        let queue = queue.into();
        let confirm = admin.basic_publish("".into(), queue, options, body.as_bytes(), properties);
        assert!(confirm.await.unwrap().await.unwrap().is_ack());
    }
    admin
}

/// Creates the stream `jobs` and its consumer `workers`, and publishes to it.
pub(crate) async fn on_nats(
    address: &str,
    ack_wait: Duration,
    bodies: impl Iterator<Item = String>,
) -> PullConsumer {
    let context = jetstream::new(nats::connect(address).await.unwrap());
    let config = stream::Config {
        name: "jobs".into(),
        retention: RetentionPolicy::WorkQueue,
        ..stream::Config::default()
    };
    context.create_stream(config).await.unwrap();
    let config = pull::Config {
        durable_name: Some("workers".into()),
        ack_wait,
        ..pull::Config::default()
    };
    let consumer = context.create_consumer_on_stream(config, "jobs");
    let consumer: PullConsumer = consumer.await.unwrap();
    for body in bodies {
        let ack = context.publish("jobs", body.into()).await;
        ack.unwrap().await.unwrap();
    }
    consumer
}

/// Kills a consumer that holds as many jobs as it may, beside one that works.
async fn kill_one(test: &str, address: &str) {
    let start = |role| {
        let settings = [("ROLE", role), ("ADDRESS", address)];
        Child::start(module_path!(), test, &settings)
    };
    let mut first = start("first");
    let held = || {
        let begun = first.told("begun").into_iter();
        sorted(begun.filter(|body| body.starts_with("slow")).collect())
    };
    eventually((QUICK, PREFETCH), async || {
        (first.told("acked").len(), held().len())
    })
    .await;
    let mut second = start("second");
    eventually(SLOW - PREFETCH, async || second.told("acked").len()).await;
    // As long as it lives they are its own.
    sleep(2 * REDELIVERY).await;
    let held = held();
    assert_eq!(held.len(), PREFETCH);
    assert_eq!(second.told("begun").len(), SLOW - PREFETCH);
    assert_eq!(second.told("again"), [""; 0]);

    first.kill();
    eventually(SLOW, async || second.told("acked").len()).await;
    assert_eq!(sorted(second.told("again")), held);
    let acked = [first.told("acked"), second.told("acked")].concat();
    assert!(
        bodies().eq(sorted(acked)),
        "none is lost, and none done twice"
    );
    second.end();
}

#[tokio::test]
async fn another_one_gets_what_it_held_of_rabbitmq() {
    if let Some(address) = setting("ADDRESS") {
        let connection = rabbitmq::connect(&address).await.unwrap();
        let queue = Queue::quorum("killed").prefetch(PREFETCH);
        return work(queue.subscribe(&connection).await.unwrap()).await;
    }
    let server = shared_rabbitmq();
    on_rabbitmq(&server.address(), "killed", "quorum", bodies()).await;

    let test = "another_one_gets_what_it_held_of_rabbitmq";
    kill_one(test, &server.address()).await;
    let list = ["list_queues", "name", "messages"];
    let has_none = |rows: String| rows.lines().any(|row| row == "killed\t0");
    eventually(true, async || has_none(server.ctl(&list))).await;
}

#[tokio::test]
async fn another_one_gets_what_it_held_of_nats() {
    if let Some(address) = setting("ADDRESS") {
        let context = jetstream::new(nats::connect(&address).await.unwrap());
        let pull = Pull::new("jobs", "workers").prefetch(PREFETCH);
        return work(pull.subscribe(&context).await.unwrap()).await;
    }
    let server = NatsServer::start();
    let consumer = on_nats(&server.address(), REDELIVERY, bodies()).await;

    let test = "another_one_gets_what_it_held_of_nats";
    kill_one(test, &server.address()).await;
    let info = consumer.get_info().await.unwrap();
    assert_eq!((info.num_pending, info.num_ack_pending), (0, 0));
}

#[tokio::test]
async fn another_one_gets_what_it_held_of_redis() {
    let group = ConsumerGroup::new("jobs", "workers")
        .prefetch(PREFETCH)
        .min_idle(REDELIVERY);
    if let Some(address) = setting("ADDRESS") {
        return work(group.connect(address).await.unwrap()).await;
    }
    let server = RedisServer::start();
    let mut inspect = server.inspect();
    for body in bodies() {
        let () = inspect.xadd("jobs", "*", &[("payload", body)]).unwrap();
    }

    let test = "another_one_gets_what_it_held_of_redis";
    kill_one(test, &server.url()).await;
    let pending: StreamPendingReply = inspect.xpending("jobs", "workers").unwrap();
    assert!(matches!(pending, StreamPendingReply::Empty), "{pending:?}");
}
