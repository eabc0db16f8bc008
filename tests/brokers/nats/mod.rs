//! `broker::nats` against a private `nats-server`.

mod addresses;
mod breaking;
mod cluster;
mod conformance;
mod connecting;
mod connector;
mod dead_letter_queue;
mod dead_letters;
mod delays;
mod elections;
mod kills;
mod leases;
mod losing;
mod prefetch;
mod priorities;
pub(crate) mod server;
mod settings;
mod stopping;
mod suspects;
mod tracing;
mod unreadable;
mod verdicts;

use std::{
    collections::HashMap,
    future::poll_fn,
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::StreamExt;
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};
use tower::{Service, ServiceBuilder, ServiceExt};
use tower_sentinel::{
    Job, Outcome, SentinelLayer, SettlePolicy, Verdict, ack_on_success,
    broker::nats::{
        Deliveries, Delivery, DeliveryError, Pull, SubscriptionError,
        async_nats::{
            Client,
            jetstream::{
                self, Context,
                consumer::{self, PullConsumer, pull},
                stream::{self, RetentionPolicy},
            },
        },
        connect,
    },
    consumer::Subscription,
    settle::{Reason, Settle},
};

use self::server::Server;

const SOON: Duration = Duration::from_secs(10);

struct Jobs {
    server: Server,
    client: Client,
    context: Context,
    consumer: PullConsumer,
}

/// Starts a server with a work queue `jobs`, a stream `dead`, and a consumer.
async fn jobs(ack_wait: Duration) -> Jobs {
    jobs_of(RetentionPolicy::WorkQueue, ack_wait).await
}

async fn jobs_of(retention: RetentionPolicy, ack_wait: Duration) -> Jobs {
    let server = Server::start();
    let client = connect(&server.address()).await.unwrap();
    let context = jetstream::new(client.clone());
    for (name, retention) in [("jobs", retention), ("dead", RetentionPolicy::Limits)] {
        let config = stream::Config {
            name: name.into(),
            subjects: vec![name.into()],
            retention,
            ..stream::Config::default()
        };
        context.create_stream(config).await.unwrap();
    }
    let config = pull::Config {
        durable_name: Some("workers".into()),
        ack_wait,
        ..pull::Config::default()
    };
    let consumer = context.create_consumer_on_stream(config, "jobs");
    let consumer = consumer.await.unwrap();
    Jobs {
        server,
        client,
        context,
        consumer,
    }
}

impl Jobs {
    fn pull(&self) -> Pull {
        Pull::new("jobs", "workers").idle_heartbeat(Duration::from_millis(250))
    }

    async fn subscribe(&self, prefetch: usize) -> Deliveries {
        let pull = self.pull().prefetch(prefetch);
        pull.subscribe(&self.context).await.unwrap()
    }

    async fn publish(&self, payload: impl Into<String>) {
        let ack = self.context.publish("jobs", payload.into().into()).await;
        ack.unwrap().await.unwrap();
    }

    async fn info(&self) -> consumer::Info {
        self.consumer.get_info().await.unwrap()
    }

    async fn messages(&self, stream: &str) -> u64 {
        let stream = self.context.get_stream(stream).await.unwrap();
        stream.get_info().await.unwrap().state.messages
    }
}

async fn next(deliveries: &mut Deliveries) -> Delivery {
    let next = timeout(SOON, deliveries.next()).await;
    next.expect("a job is delivered").unwrap().unwrap()
}

async fn nothing_within(deliveries: &mut Deliveries, time: Duration) {
    let next = timeout(time, deliveries.next()).await;
    assert!(next.is_err(), "nothing is delivered: {next:?}");
}

async fn settle(delivery: &Delivery, verdict: Verdict) -> Result<(), DeliveryError> {
    let settling = delivery.tag().settle(verdict, reason("it failed"));
    settling.await.map_err(|unsettled| unsettled.error)
}

fn reason(message: &str) -> Reason {
    Reason::of(&Outcome::<(), _>::Failed(message), Duration::ZERO)
}

async fn closed(deliveries: &mut Deliveries) -> Result<(), SubscriptionError> {
    let closed = poll_fn(|cx| Pin::new(&mut *deliveries).poll_closed(cx));
    timeout(SOON, closed).await.expect("the end is noticed")
}

/// Runs jobs until the stream ends, and counts how often each ran.
async fn run(
    mut deliveries: Deliveries,
    counts: Arc<Mutex<HashMap<String, u32>>>,
    work: Duration,
) -> Result<(), SubscriptionError> {
    let policy = SettlePolicy::new(ack_on_success());
    let mut worker = ServiceBuilder::new()
        .layer(deliveries.gate())
        .layer(SentinelLayer::new(policy))
        .service_fn(move |job: Delivery| {
            let counts = Arc::clone(&counts);
            async move {
                if !work.is_zero() {
                    sleep(work).await;
                }
                let name = String::from_utf8(job.as_ref().to_vec()).unwrap();
                *counts.lock().unwrap().entry(name).or_default() += 1;
                Ok::<_, String>(())
            }
        });
    let mut settling = JoinSet::new();
    loop {
        let ready = worker.ready().await.unwrap();
        let Some(job) = deliveries.next().await else {
            return Ok(());
        };
        settling.spawn(ready.call(job?));
        while settling.try_join_next().is_some() {}
    }
}
