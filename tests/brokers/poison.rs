//! A job that takes its process down each time, and the counts of each broker for it.

use std::{convert::Infallible, fmt::Debug, process, time::Duration};

use tower::{ServiceBuilder, service_fn};
use tower_sentinel::{
    Consumer, DecisionExt, Job, SentinelLayer, ack_on_success,
    broker::{
        nats::{self, Pull, async_nats::jetstream},
        rabbitmq::{
            self, Queue,
            lapin::{options::BasicGetOptions, types::AMQPValue},
        },
        redis::{
            ConsumerGroup,
            redis::{Commands, streams::StreamRangeReply},
        },
    },
    consumer::Subscription,
    settle::Settle,
};

use crate::{
    child::{Child, Ledger, asked_to_end, recording, setting},
    conformance::eventually,
    killed_consumer::{on_nats, on_rabbitmq},
    nats::server::Server as NatsServer,
    rabbitmq::server::shared as shared_rabbitmq,
    redis::server::Server as RedisServer,
};

const LIMIT: u32 = 2;
const REASON: &str = "delivered 3 times without an outcome";

/// After which time a broker gives a job to somebody else.
const REDELIVERY: Duration = Duration::from_secs(2);

fn poison() -> impl Iterator<Item = String> {
    ["poison".to_owned()].into_iter()
}

// === in the consumer's process ===

/// Works until the end is requested, or until it gets the poison.
async fn work<B>(jobs: B)
where
    B: Subscription + Send + 'static,
    B::Job: Job<Tag: Settle<Future: Send> + Debug + Send + Sync> + AsRef<[u8]> + Send + 'static,
    B::Error: std::fmt::Display + Send + 'static,
{
    let ledger = Ledger::own();
    let policy = recording(ack_on_success().delivery_limit(LIMIT), ledger.clone());
    let handler = service_fn(move |job: B::Job| {
        let body = String::from_utf8(job.as_ref().to_vec()).unwrap();
        let tag = job.tag();
        let known = format!("{body} {:?} {:?}", tag.deliveries(), tag.redelivered());
        ledger.write("begun", &known);
        if body == "poison" {
            process::exit(1);
        }
        async { Ok::<_, Infallible>(body) }
    });
    let service = ServiceBuilder::new()
        .concurrency_limit(1)
        .layer(SentinelLayer::new(policy).delivery_limit(LIMIT))
        .service(handler);
    let consumer = Consumer::new(jobs, service).with_graceful_shutdown(asked_to_end());
    let summary = consumer.await.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!((summary.failed, summary.abandoned), (0, 0), "{summary:?}");
}

// === in the test ===

fn start(test: &str, address: &str) -> Child {
    Child::start(module_path!(), test, &[("ADDRESS", address)])
}

/// Lets the poison take down as many consumers as it may; `reason` returns that of the dead letter.
async fn rejected_in_the_end(test: &str, address: &str, reason: impl AsyncFn() -> Option<String>) {
    for deliveries in 1..=LIMIT {
        let mut child = start(test, address);
        child.ended().await;
        let known = format!("poison Some({deliveries}) Some({})", deliveries > 1);
        assert_eq!(child.told("begun"), [known]);
    }
    let mut child = start(test, address);
    eventually(Some(REASON.to_owned()), async || reason().await).await;
    assert_eq!(child.told("begun"), [""; 0]);
    child.end();
}

#[tokio::test]
async fn it_is_rejected_in_the_end_on_a_quorum_queue() {
    let (queue, dead) = ("poison.quorum", "poison.dead");
    if let Some(address) = setting("ADDRESS") {
        let connection = rabbitmq::connect(&address).await.unwrap();
        let queue = Queue::quorum(queue).prefetch(1).dead_letter(dead);
        return work(queue.subscribe(&connection).await.unwrap()).await;
    }
    let address = shared_rabbitmq().address();
    let admin = on_rabbitmq(&address, dead, "classic", std::iter::empty()).await;
    on_rabbitmq(&address, queue, "quorum", poison()).await;
    let reason = async || {
        let got = admin.basic_get(dead.into(), BasicGetOptions { no_ack: false });
        let letter = got.await.unwrap()?;
        let headers = letter.properties.headers().as_ref().unwrap();
        match headers.inner().get("x-outcome-message") {
            Some(AMQPValue::LongString(text)) => Some(text.to_string()),
            other => panic!("{other:?}"),
        }
    };
    let test = "it_is_rejected_in_the_end_on_a_quorum_queue";
    rejected_in_the_end(test, &address, reason).await;
}

/// All that a classic queue knows is that it delivered the job before.
#[tokio::test]
async fn it_goes_round_on_a_classic_queue() {
    let queue = "poison.classic";
    if let Some(address) = setting("ADDRESS") {
        let connection = rabbitmq::connect(&address).await.unwrap();
        let queue = Queue::classic(queue).prefetch(1);
        return work(queue.subscribe(&connection).await.unwrap()).await;
    }
    let address = shared_rabbitmq().address();
    on_rabbitmq(&address, queue, "classic", poison()).await;
    for nth in 0..2 * LIMIT {
        let mut child = start("it_goes_round_on_a_classic_queue", &address);
        child.ended().await;
        let known = format!("poison Some(1) Some({})", nth > 0);
        assert_eq!(child.told("begun"), [known]);
    }
}

#[tokio::test]
async fn it_is_rejected_in_the_end_on_nats() {
    if let Some(address) = setting("ADDRESS") {
        let context = jetstream::new(nats::connect(&address).await.unwrap());
        let pull = Pull::new("jobs", "workers").prefetch(1).dead_letter("dead");
        return work(pull.subscribe(&context).await.unwrap()).await;
    }
    let server = NatsServer::start();
    let address = server.address();
    on_nats(&address, REDELIVERY, poison()).await;
    let context = jetstream::new(nats::connect(&address).await.unwrap());
    let config = jetstream::stream::Config {
        name: "dead".into(),
        ..jetstream::stream::Config::default()
    };
    let dead = context.create_stream(config).await.unwrap();
    let reason = async || {
        let letter = dead.get_raw_message(1).await.ok()?;
        Some(letter.headers.get("x-outcome-message")?.to_string())
    };
    rejected_in_the_end("it_is_rejected_in_the_end_on_nats", &address, reason).await;
}

#[tokio::test]
async fn it_is_rejected_in_the_end_on_redis() {
    if let Some(address) = setting("ADDRESS") {
        let group = ConsumerGroup::new("jobs", "workers").min_idle(REDELIVERY);
        return work(group.prefetch(1).connect(address).await.unwrap()).await;
    }
    let server = RedisServer::start();
    let () = server
        .inspect()
        .xadd("jobs", "*", &[("payload", "poison")])
        .unwrap();
    let reason = async || {
        let letters: StreamRangeReply = server.inspect().xrange_all("{jobs}:workers:dead").unwrap();
        letters.ids.first()?.get("x-outcome-message")
    };
    rejected_in_the_end("it_is_rejected_in_the_end_on_redis", &server.url(), reason).await;
}
