//! A process that moves dead letters back, and is killed with SIGKILL at any time: none is lost, and at most those of
//! the batch that was under way are there twice.

use std::{collections::HashMap, ops::ControlFlow, time::Duration};

use tokio::time::sleep;
use tower_sentinel::broker::{
    dead_letter::{DESTINATION, OUTCOME_KIND},
    dead_letters::{DeadLetters, Filter, Redrive},
    nats::{
        self,
        async_nats::{
            HeaderMap,
            jetstream::{self, Context, stream},
        },
    },
    rabbitmq::{
        self,
        lapin::{
            BasicProperties, Channel,
            options::{BasicGetOptions, BasicPublishOptions, QueueDeclareOptions},
            types::{AMQPValue, FieldTable},
        },
    },
    redis::{
        self,
        redis::{Client, Connection, cmd},
    },
};

use crate::{
    child::{Child, Ledger, setting},
    nats::server::Server as NatsServer,
    rabbitmq::server::shared as shared_rabbitmq,
    redis::server::Server as RedisServer,
};

const LETTERS: usize = 400;
const BATCH: usize = 10;
const KILLS: usize = 8;

fn redrive() -> Redrive {
    Redrive::new(Filter::all()).batch(BATCH)
}

fn bodies() -> impl Iterator<Item = String> {
    (0..LETTERS).map(|n| format!("job {n:03}"))
}

// === in the process that is killed ===

/// Moves letters back, and writes down each batch.
async fn run<D: DeadLetters>(letters: D) {
    let ledger = Ledger::own();
    ledger.write("begun", "");
    let redrive = redrive();
    let moved = redrive.run_with(&letters, |tally| {
        ledger.write("batch", &tally.moved.to_string());
        ControlFlow::Continue(())
    });
    moved.await.unwrap();
    ledger.write("ended", "");
    // It waits to be killed.
    std::future::pending::<()>().await;
}

// === in the test ===

trait Place {
    /// Returns the numbers of jobs and of dead letters.
    async fn counts(&mut self) -> (usize, usize);

    /// Returns the bodies of all jobs.
    async fn jobs(&mut self) -> Vec<String>;

    /// Moves back those that are left.
    async fn rest(&mut self);
}

/// Kills runs within different batches, and moves back what they left.
async fn kill_some(test: &str, address: &str, mut place: impl Place, most: usize) {
    let mut twice = 0;
    for nth in 0..KILLS {
        let settings = [("ADDRESS", address)];
        let mut child = Child::start(module_path!(), test, &settings);
        let after = nth % 3;
        loop {
            let entries = child.entries();
            let batches = entries.iter().filter(|entry| entry.word == "batch");
            let is_begun = entries.iter().any(|entry| entry.word == "begun");
            let is_ended = entries.iter().any(|entry| entry.word == "ended");
            if is_ended || is_begun && batches.count() >= after {
                break;
            }
            sleep(Duration::from_micros(100)).await;
        }
        // Somewhere within the next batch; the first one opens connections and channels.
        let most_micros = [60_000, 4_000, 15_000][after];
        sleep(Duration::from_micros(fastrand::u64(0..most_micros))).await;
        child.kill();
        let all = settled(&mut place).await;
        assert!(all >= LETTERS + twice, "{nth}: none is lost: {all}");
        twice = all - LETTERS;
        // A letter that comes back late counts for the next kill.
        let bound = (nth + 1) * most;
        assert!(
            twice <= bound,
            "{nth}: {twice} are there twice, and at most {bound} may be"
        );
    }
    place.rest().await;
    while settled(&mut place).await != place.counts().await.0 {
        place.rest().await;
    }
    let mut times = HashMap::<_, usize>::new();
    for body in place.jobs().await {
        *times.entry(body).or_default() += 1;
    }
    assert!(
        bodies().all(|body| times.contains_key(&body)),
        "none is lost"
    );
    let more = times.values().sum::<usize>() - LETTERS;
    assert!(more <= KILLS * most, "{more}");
    println!("{test}: {more} of {LETTERS} jobs are there twice after {KILLS} kills");
}

/// Returns the number of jobs and dead letters, once it does not change any more: a server gives back what a process
/// held a moment after it is gone.
async fn settled(place: &mut impl Place) -> usize {
    let (mut all, mut times) = (0, 0);
    while times < 15 || all < LETTERS {
        let (jobs, dead) = place.counts().await;
        let same = all == jobs + dead;
        (all, times) = (jobs + dead, if same { times + 1 } else { 0 });
        assert!(times < 1_500, "letters are lost: {all}");
        sleep(Duration::from_millis(10)).await;
    }
    all
}

// === RabbitMQ ===

struct RabbitMq {
    admin: Channel,
    connection: rabbitmq::Connection,
    queue: String,
}

const SUFFIX: &str = ".dead";

async fn declare(admin: &Channel, queue: &str, kind: &str) -> usize {
    let mut arguments = FieldTable::default();
    let kind = AMQPValue::LongString(kind.into());
    arguments.insert("x-queue-type".into(), kind);
    let options = QueueDeclareOptions::durable();
    let declared = admin.queue_declare(queue.into(), options, arguments);
    declared.await.unwrap().message_count() as usize
}

impl RabbitMq {
    async fn new(address: &str, queue: &str) -> Self {
        let connection = rabbitmq::connect(address).await.unwrap();
        let admin = connection.create_channel().await.unwrap();
        let dead = format!("{queue}{SUFFIX}");
        declare(&admin, queue, "quorum").await;
        declare(&admin, &dead, "quorum").await;
        admin.confirm_select(Default::default()).await.unwrap();
        for body in bodies() {
            let mut headers = FieldTable::default();
            let text = |text: &str| AMQPValue::LongString(text.into());
            headers.insert(OUTCOME_KIND.into(), text("failed"));
            headers.insert(DESTINATION.into(), text(queue));
            let properties = BasicProperties::default().with_headers(headers);
            let properties = properties.with_delivery_mode(2);
            let (dead, options) = (dead.as_str().into(), BasicPublishOptions::default());
            let sent = admin.basic_publish("".into(), dead, options, body.as_bytes(), properties);
            assert!(sent.await.unwrap().await.unwrap().is_ack());
        }
        let queue = queue.to_owned();
        Self {
            admin,
            connection,
            queue,
        }
    }
}

impl Place for RabbitMq {
    async fn counts(&mut self) -> (usize, usize) {
        let dead = format!("{}{SUFFIX}", self.queue);
        let jobs = declare(&self.admin, &self.queue, "quorum").await;
        (jobs, declare(&self.admin, &dead, "quorum").await)
    }

    async fn jobs(&mut self) -> Vec<String> {
        let mut bodies = Vec::new();
        loop {
            let queue = self.queue.as_str().into();
            let got = self.admin.basic_get(queue, BasicGetOptions::default());
            let Some(got) = got.await.unwrap() else {
                return bodies;
            };
            bodies.push(String::from_utf8(got.delivery.data).unwrap());
        }
    }

    async fn rest(&mut self) {
        let dead = format!("{}{SUFFIX}", self.queue);
        let letters = rabbitmq::DeadLetterQueue::new(&self.connection, dead);
        redrive().run(&letters).await.unwrap();
    }
}

#[tokio::test]
async fn a_redrive_that_is_killed_loses_nothing_of_rabbitmq() {
    const QUEUE: &str = "killed_redrive";
    if let Some(address) = setting("ADDRESS") {
        let connection = rabbitmq::connect(&address).await.unwrap();
        let dead = format!("{QUEUE}{SUFFIX}");
        return run(rabbitmq::DeadLetterQueue::new(&connection, dead)).await;
    }
    let address = shared_rabbitmq().address();
    let place = RabbitMq::new(&address, QUEUE).await;
    let test = "a_redrive_that_is_killed_loses_nothing_of_rabbitmq";
    kill_some(test, &address, place, BATCH).await;
}

// === NATS ===

struct Nats(Context);

impl Nats {
    async fn new(address: &str) -> Self {
        let context = jetstream::new(nats::connect(address).await.unwrap());
        for name in ["jobs", "dead"] {
            let config = stream::Config {
                name: name.into(),
                ..stream::Config::default()
            };
            context.create_stream(config).await.unwrap();
        }
        for body in bodies() {
            let mut headers = HeaderMap::new();
            headers.insert(OUTCOME_KIND, "failed");
            headers.insert(DESTINATION, "jobs");
            let sent = context.publish_with_headers("dead", headers, body.into());
            sent.await.unwrap().await.unwrap();
        }
        Self(context)
    }

    async fn messages(&self, stream: &str) -> usize {
        let stream = self.0.get_stream(stream).await.unwrap();
        stream.cached_info().state.messages as usize
    }
}

impl Place for Nats {
    async fn counts(&mut self) -> (usize, usize) {
        // A job of the last batch may be stored, and its letter not deleted: it will not be stored again.
        let (jobs, dead) = (self.messages("jobs").await, self.messages("dead").await);
        (jobs.min(LETTERS - dead), dead)
    }

    async fn jobs(&mut self) -> Vec<String> {
        let stream = self.0.get_stream("jobs").await.unwrap();
        let last = stream.cached_info().state.last_sequence;
        let mut bodies = Vec::new();
        for sequence in 1..=last {
            let message = stream.get_raw_message(sequence).await.unwrap();
            bodies.push(String::from_utf8(message.payload.to_vec()).unwrap());
        }
        bodies
    }

    async fn rest(&mut self) {
        let letters = nats::DeadLetterQueue::new(&self.0, "dead");
        redrive().run(&letters).await.unwrap();
    }
}

#[tokio::test]
async fn a_redrive_that_is_killed_loses_nothing_of_nats() {
    if let Some(address) = setting("ADDRESS") {
        let context = jetstream::new(nats::connect(&address).await.unwrap());
        return run(nats::DeadLetterQueue::new(&context, "dead")).await;
    }
    let server = NatsServer::start();
    let place = Nats::new(&server.address()).await;
    let test = "a_redrive_that_is_killed_loses_nothing_of_nats";
    kill_some(test, &server.address(), place, 0).await;
}

// === Redis ===

struct Redis {
    connection: Connection,
    address: String,
}

impl Redis {
    fn new(server: &RedisServer) -> Self {
        let mut connection = server.inspect();
        let group = ["CREATE", "jobs", "workers", "0", "MKSTREAM"];
        let () = cmd("XGROUP").arg(&group).query(&mut connection).unwrap();
        for body in bodies() {
            let add = ["dead", "*", "payload", &body, OUTCOME_KIND, "failed"];
            let mut command = cmd("XADD");
            command.arg(&add).arg(DESTINATION).arg("jobs");
            let _: String = command.query(&mut connection).unwrap();
        }
        let address = server.url();
        Self {
            connection,
            address,
        }
    }
}

async fn redis_letters(
    address: &str,
) -> redis::DeadLetterQueue<redis::redis::aio::MultiplexedConnection> {
    let client = Client::open(address).unwrap();
    let connection = client.get_multiplexed_async_connection().await.unwrap();
    redis::DeadLetterQueue::new(connection, "dead")
}

impl Place for Redis {
    async fn counts(&mut self) -> (usize, usize) {
        let mut length = |key| cmd("XLEN").arg(key).query(&mut self.connection).unwrap();
        (length("jobs"), length("dead"))
    }

    async fn jobs(&mut self) -> Vec<String> {
        let entries: Vec<(String, HashMap<String, String>)> = cmd("XRANGE")
            .arg(&["jobs", "-", "+"])
            .query(&mut self.connection)
            .unwrap();
        let entries = entries.into_iter();
        entries
            .map(|(_, fields)| fields["payload"].clone())
            .collect()
    }

    async fn rest(&mut self) {
        let letters = redis_letters(&self.address).await;
        redrive().run(&letters).await.unwrap();
    }
}

#[tokio::test]
async fn a_redrive_that_is_killed_loses_nothing_of_redis() {
    if let Some(address) = setting("ADDRESS") {
        return run(redis_letters(&address).await).await;
    }
    let server = RedisServer::start();
    let place = Redis::new(&server);
    let test = "a_redrive_that_is_killed_loses_nothing_of_redis";
    kill_some(test, &server.url(), place, 0).await;
}
