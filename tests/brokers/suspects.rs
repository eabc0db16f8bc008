//! One job that takes its process down each time, among many good ones: it dies alone in the lane of the suspects.

use std::{
    collections::BTreeSet, convert::Infallible, fmt::Debug, iter::empty, process, sync::Mutex,
    time::Duration,
};

use futures_util::{FutureExt, future::join_all};
use tokio::{join, select};
use tokio_util::sync::CancellationToken;
use tower::{ServiceBuilder, service_fn};
use tower_sentinel::{
    Consumer, SentinelLayer, SettlePolicy, ack_on_success,
    broker::{
        Envelope,
        dead_letters::{DeadLetters, Filter},
        nats::{
            self, Pull,
            async_nats::jetstream::{
                self,
                consumer::{PullConsumer, pull},
                stream,
            },
        },
        rabbitmq::{self, Queue},
        redis::{
            self, ConsumerGroup,
            redis::{Client, Commands},
        },
    },
    consumer::{Connect, Subscription},
    settle::Settle,
};

use crate::{
    child::{Child, Ledger, asked_to_end, setting},
    conformance::eventually,
    killed_consumer::{on_nats, on_rabbitmq},
    nats::server::Server as NatsServer,
    rabbitmq::server::shared as shared_rabbitmq,
    redis::server::Server as RedisServer,
};

const WORKERS: usize = 4;
const PREFETCH: usize = 64;
const JOBS: usize = 1_000;
/// The place of the poison among the jobs.
const POISON: usize = 300;
const LIMIT: u32 = 2;
const REASON: &str = "delivered 3 times without an outcome";

/// After which time a broker gives a job to somebody else.
const REDELIVERY: Duration = Duration::from_secs(2);

fn bodies() -> impl Iterator<Item = String> {
    (0..JOBS).map(|n| match n {
        POISON => "poison".to_owned(),
        _ => format!("good {n:03}"),
    })
}

// === in a worker's process ===

/// Works in the queue and in its lane until the end is requested, or until it gets the poison.
async fn work<B>(jobs: B, lane: B)
where
    B: Subscription + Send + 'static,
    B::Job:
        Envelope<Tag: Settle<Future: Send> + Debug + Send + Sync> + AsRef<[u8]> + Send + 'static,
    B::Error: std::fmt::Display + Send + 'static,
{
    let ledger = Ledger::own();
    let policy = SettlePolicy::new(ack_on_success());
    let layer = SentinelLayer::new(policy).delivery_limit(LIMIT);
    let end = asked_to_end().shared();
    let queue = setting("QUEUE").unwrap();
    let consume = |jobs: B, place: &'static str| {
        let (ledger, queue) = (ledger.clone(), queue.clone());
        let handler = service_fn(move |job: B::Job| {
            let body = String::from_utf8(job.as_ref().to_vec()).unwrap();
            ledger.write(place, &body);
            assert_eq!(job.routing_key(), queue);
            if body == "poison" {
                process::exit(1);
            }
            ledger.write("done", &body);
            async { Ok::<_, Infallible>(()) }
        });
        let service = ServiceBuilder::new().layer(layer.clone()).service(handler);
        let consumer = Consumer::new(jobs, service).with_graceful_shutdown(end.clone());
        async {
            let summary = consumer.await.unwrap_or_else(|error| panic!("{error}"));
            assert_eq!((summary.failed, summary.abandoned), (0, 0), "{summary:?}");
        }
    };
    join!(consume(jobs, "queue"), consume(lane, "lane"));
}

// === in the test ===

/// Entries in the ledgers of all workers.
#[derive(Debug, Default)]
struct Tally {
    deaths: u32,
    done: BTreeSet<String>,
    /// Bodies that were run in the lane.
    lane: Vec<String>,
}

impl Tally {
    fn add(&mut self, worker: &Child) {
        self.done.extend(worker.told("done"));
        self.lane.extend(worker.told("lane"));
    }
}

/// Lets workers process all jobs, each restarted when it dies.
///
/// `left` returns the numbers of jobs that the queue and the lane still have.
async fn the_poison_dies_alone(
    (test, workers): (&str, usize),
    settings: &[(&str, &str)],
    bodies: impl Iterator<Item = String>,
    left: impl AsyncFn() -> (u64, u64),
    dead: impl DeadLetters + Sync,
) {
    let tally = Mutex::new(Tally::default());
    let stop = CancellationToken::new();
    let workers = (0..workers).map(|_| async {
        loop {
            let mut worker = Child::start(module_path!(), test, settings);
            let is_over = select! {
                () = worker.ended() => false,
                () = stop.cancelled() => true,
            };
            if is_over {
                worker.end();
            }
            let mut tally = tally.lock().unwrap();
            tally.add(&worker);
            if is_over {
                return;
            }
            tally.deaths += 1;
            assert!(tally.deaths <= LIMIT + 1, "{}", worker.printed());
        }
    });
    let is_dead = || async {
        let letters = dead.list(&Filter::all(), 10).await.unwrap();
        let letters = letters.into_iter();
        let known = letters.map(|letter| (letter.message, letter.destination));
        known.collect::<Vec<_>>()
    };
    let queue = setting_of(settings, "QUEUE");
    let letter = (Some(REASON.to_owned()), Some(queue.to_owned()));
    let watch = async {
        eventually(vec![letter.clone()], async || is_dead().await).await;
        eventually((0, 0), async || left().await).await;
        stop.cancel();
    };
    join!(join_all(workers), watch);
    assert_eq!((left().await, is_dead().await), ((0, 0), vec![letter]));

    let tally = tally.into_inner().unwrap();
    let innocents = tally.lane.iter().filter(|body| *body != "poison").count();
    println!(
        "{test}: {} deaths, {innocents} innocents in the lane",
        tally.deaths
    );
    assert_eq!(tally.deaths, LIMIT + 1);
    assert_eq!(tally.lane.len() - innocents, LIMIT as usize);
    let good: BTreeSet<_> = bodies.filter(|body| body != "poison").collect();
    assert_eq!(
        innocents > 0,
        !good.is_empty(),
        "a death has no effect on others"
    );
    assert_eq!(tally.done, good);
}

fn setting_of<'a>(settings: &[(&str, &'a str)], name: &str) -> &'a str {
    let (_, value) = settings.iter().find(|(key, _)| *key == name).unwrap();
    value
}

async fn on_a_queue(test: (&str, usize), kind: &str, bodies: impl Iterator<Item = String>) {
    let name = format!("suspects.{kind}.{}", test.1);
    let (suspects, dead) = (format!("{name}.lane"), format!("{name}.dead"));
    let queue = match kind {
        "classic" => Queue::classic(&name),
        _ => Queue::quorum(&name).delivery_limit(None),
    };
    let queue = queue.dead_letter(&dead).suspects(&suspects);
    if let Some(address) = setting("ADDRESS") {
        let connection = rabbitmq::connect(&address).await.unwrap();
        let lane = queue.lane().subscribe(&connection).await.unwrap();
        let jobs = queue
            .prefetch(PREFETCH)
            .subscribe(&connection)
            .await
            .unwrap();
        return work(jobs, lane).await;
    }
    let server = shared_rabbitmq();
    let address = server.address();
    // A connector declares the other queues.
    on_rabbitmq(&address, &name, kind, empty()).await;
    let mut connector = queue.connector(&*address).declare_queues();
    drop(connector.connect(0).await.unwrap());
    let bodies: Vec<_> = bodies.collect();
    on_rabbitmq(&address, &name, kind, bodies.iter().cloned()).await;
    let left = async || {
        let rows = server.ctl(&["list_queues", "name", "messages"]);
        let of = |queue: &str| {
            let mut rows = rows.lines().filter_map(|row| row.split_once('\t'));
            let row = rows.find(|(name, _)| *name == queue);
            row.unwrap().1.parse::<u64>().unwrap()
        };
        (of(&name), of(&suspects))
    };
    let connection = rabbitmq::connect(&address).await.unwrap();
    let dead = rabbitmq::DeadLetterQueue::new(&connection, &dead);
    let settings = [("ADDRESS", &*address), ("QUEUE", &*name)];
    the_poison_dies_alone(test, &settings, bodies.into_iter(), left, dead).await;
}

#[tokio::test]
async fn poison_dies_alone_on_a_classic_queue() {
    let test = ("poison_dies_alone_on_a_classic_queue", WORKERS);
    on_a_queue(test, "classic", bodies()).await;
}

#[tokio::test]
async fn poison_dies_alone_on_a_quorum_queue() {
    let test = ("poison_dies_alone_on_a_quorum_queue", WORKERS);
    on_a_queue(test, "quorum", bodies()).await;
}

/// One worker moves the poison to the lane, and gets it from there.
#[tokio::test]
async fn poison_is_moved_before_it_can_take_down_the_worker_that_moves_it() {
    let test = "poison_is_moved_before_it_can_take_down_the_worker_that_moves_it";
    let poison = ["poison".to_owned()].into_iter();
    on_a_queue((test, 1), "classic", poison).await;
}

#[tokio::test]
async fn poison_dies_alone_on_nats() {
    if let Some(address) = setting("ADDRESS") {
        let context = jetstream::new(nats::connect(&address).await.unwrap());
        let pull = Pull::new("jobs", "workers").dead_letter("dead");
        let lane = Pull::new("suspects", "workers")
            .dead_letter("dead")
            .prefetch(1);
        let lane = lane.subscribe(&context).await.unwrap();
        let pull = pull.prefetch(PREFETCH).suspects("suspects");
        return work(pull.subscribe(&context).await.unwrap(), lane).await;
    }
    let server = NatsServer::start();
    let address = server.address();
    let context = jetstream::new(nats::connect(&address).await.unwrap());
    for name in ["dead", "suspects"] {
        let config = stream::Config {
            name: name.into(),
            ..stream::Config::default()
        };
        context.create_stream(config).await.unwrap();
    }
    let consumer = pull::Config {
        durable_name: Some("workers".into()),
        ack_wait: REDELIVERY,
        ..pull::Config::default()
    };
    let lane = context.create_consumer_on_stream(consumer, "suspects");
    let lane: PullConsumer = lane.await.unwrap();
    let jobs = on_nats(&address, REDELIVERY, bodies()).await;
    let left = async || {
        let of = async |consumer: &PullConsumer| {
            let info = consumer.get_info().await.unwrap();
            info.num_pending + info.num_ack_pending as u64
        };
        (of(&jobs).await, of(&lane).await)
    };
    let dead = nats::DeadLetterQueue::new(&context, "dead");
    let settings = [("ADDRESS", &*address), ("QUEUE", "jobs")];
    let test = ("poison_dies_alone_on_nats", WORKERS);
    the_poison_dies_alone(test, &settings, bodies(), left, dead).await;
}

#[tokio::test]
async fn poison_dies_alone_on_redis() {
    let group = ConsumerGroup::new("jobs", "workers")
        .prefetch(PREFETCH)
        .min_idle(REDELIVERY)
        .suspects("{jobs}:suspects")
        .delete_settled();
    if let Some(address) = setting("ADDRESS") {
        let lane = group.lane().connect(&*address).await.unwrap();
        return work(group.connect(&*address).await.unwrap(), lane).await;
    }
    let server = RedisServer::start();
    let mut inspect = server.inspect();
    for body in bodies() {
        let () = inspect.xadd("jobs", "*", &[("payload", body)]).unwrap();
    }
    let inspect = Mutex::new(inspect);
    let left = async || {
        let mut inspect = inspect.lock().unwrap();
        let mut of = |stream: &str| inspect.xlen(stream).unwrap();
        (of("jobs"), of("{jobs}:suspects"))
    };
    let url = server.url();
    let client = Client::open(&*url).unwrap();
    let connection = client.get_multiplexed_async_connection().await.unwrap();
    let dead = redis::DeadLetterQueue::new(connection, "{jobs}:workers:dead");
    let settings = [("ADDRESS", &*url), ("QUEUE", "jobs")];
    let test = ("poison_dies_alone_on_redis", WORKERS);
    the_poison_dies_alone(test, &settings, bodies(), left, dead).await;
}
