//! Jobs from a RabbitMQ queue that complete, fail, panic and hang, and what the broker says of them.
//!
//! ```sh
//! AMQP_ADDR=amqp://127.0.0.1:5672/%2f cargo run --example rabbitmq
//! ```
//!
//! A job that goes wrong is given back once; the second time it becomes a dead letter. The queues
//! are this run's own and go with its connection. `PREFETCH` sets how many jobs are in flight.

use std::{
    collections::BTreeMap,
    env, error, future,
    num::NonZeroU16,
    panic,
    process::{self, ExitCode},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use futures_util::{StreamExt, stream::FuturesUnordered};
use lapin::{
    Acker, BasicProperties, Channel, Connection, ConnectionProperties, Consumer, ExchangeKind,
    message::Delivery,
    options::{
        BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicNackOptions,
        BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions, ExchangeDeclareOptions,
        ExchangeDeleteOptions, QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions,
    },
    types::{AMQPValue, FieldTable},
};
use tokio::time::{sleep, timeout};
use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
use tower_sentinel::{Outcome, OutcomeKind, Report, SentinelLayer};

const JOBS: u32 = 200;
const TIME_LIMIT: Duration = Duration::from_secs(1);

type BoxError = Box<dyn error::Error + Send + Sync>;

// === the jobs ===

/// What the n-th job is to do; `nonsense` is no work that anybody knows.
fn payload(n: u32) -> &'static str {
    match n % 10 {
        1 | 6 => "fail once",
        3 => "panic once",
        5 => "hang once",
        8 => "nonsense",
        _ => "work",
    }
}

async fn process(delivery: Delivery) -> Result<(), BoxError> {
    sleep(Duration::from_millis(50)).await;
    match (&*delivery.data, delivery.redelivered) {
        (b"work", _) | (b"fail once" | b"panic once" | b"hang once", true) => Ok(()),
        (b"fail once", false) => Err("a connection was reset".into()),
        (b"panic once", false) => panic!("index out of bounds"),
        (b"hang once", false) => future::pending().await,
        (other, _) => Err(format!("unknown work: {}", other.escape_ascii()).into()),
    }
}

// === the policy ===

/// What answers for a delivery.
struct Tag {
    acker: Acker,
    redelivered: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Answer {
    Acked,
    GivenBack,
    DeadLettered,
}

async fn settle(report: Report<Tag, (), BoxError>) -> Result<(OutcomeKind, Answer), BoxError> {
    let Report { tag, outcome, .. } = report;
    let answer = match outcome {
        Outcome::Completed(()) => Answer::Acked,
        // Not the job's fault.
        Outcome::Cancelled(_) => Answer::GivenBack,
        Outcome::Failed(_) | Outcome::Panicked(_) | Outcome::TimedOut(_) => match tag.redelivered {
            false => Answer::GivenBack,
            true => Answer::DeadLettered,
        },
    };
    let nack = |requeue| BasicNackOptions {
        requeue,
        ..BasicNackOptions::default()
    };
    let sent = match answer {
        Answer::Acked => tag.acker.ack(BasicAckOptions::default()).await?,
        Answer::GivenBack => tag.acker.nack(nack(true)).await?,
        Answer::DeadLettered => tag.acker.nack(nack(false)).await?,
    };
    // `false`: the channel is gone, or the delivery has its answer. Nothing was sent.
    match sent {
        true => Ok((outcome.kind(), answer)),
        false => Err("the answer was not sent".into()),
    }
}

// === the consumer ===

type Tally = BTreeMap<(OutcomeKind, Answer), u32>;

/// Consumes until each of the jobs is acked or a dead letter.
async fn consume(mut consumer: Consumer, prefetch: u16) -> Result<Tally, BoxError> {
    let tag = |delivery: &Delivery| Tag {
        acker: delivery.acker.clone(),
        redelivered: delivery.redelivered,
    };
    let mut handler = ServiceBuilder::new()
        .concurrency_limit(prefetch.into())
        .layer(SentinelLayer::with_tag(service_fn(settle), tag).timeout(TIME_LIMIT))
        .service_fn(process);

    let mut answers = FuturesUnordered::new();
    let mut tally = Tally::new();
    let mut left = JOBS;
    while left > 0 {
        // Readiness first: what is pulled is at once called.
        let next = async {
            let handler = handler.ready().await?;
            let delivery = consumer
                .next()
                .await
                .ok_or("the broker ended the consumer")??;
            Ok::<_, BoxError>(handler.call(delivery))
        };
        tokio::select! {
            answer = next => answers.push(answer?),
            Some(answer) = answers.next() => {
                // An error here leaves a delivery unanswered: the channel is given up.
                let (kind, answer) = answer?;
                *tally.entry((kind, answer)).or_default() += 1;
                left -= u32::from(answer != Answer::GivenBack);
            }
        }
    }
    Ok(tally)
}

// === the broker ===

/// The names of this run's own queues and exchange.
struct Names {
    jobs: String,
    dead_letters: String,
    exchange: String,
}

impl Names {
    fn unique() -> Result<Self, BoxError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos();
        let run = format!("tower-sentinel.example.{}-{now}", process::id());
        Ok(Self {
            jobs: format!("{run}.jobs"),
            dead_letters: format!("{run}.dead-letters"),
            exchange: format!("{run}.dlx"),
        })
    }

    async fn declare(&self, channel: &Channel) -> lapin::Result<()> {
        let Self {
            jobs,
            dead_letters,
            exchange,
        } = self;
        // Exclusive: should this process die, the broker deletes them.
        let exclusive = QueueDeclareOptions {
            exclusive: true,
            ..QueueDeclareOptions::default()
        };
        let auto_delete = ExchangeDeclareOptions {
            auto_delete: true,
            ..ExchangeDeclareOptions::default()
        };
        let none = FieldTable::default;
        let mut dead_lettered = FieldTable::default();
        let name = AMQPValue::LongString(exchange.as_str().into());
        dead_lettered.insert("x-dead-letter-exchange".into(), name);

        let (exchange, fanout) = (exchange.as_str(), ExchangeKind::Fanout);
        channel
            .exchange_declare(exchange.into(), fanout, auto_delete, none())
            .await?;
        let dead_letters = dead_letters.as_str();
        channel
            .queue_declare(dead_letters.into(), exclusive, none())
            .await?;
        let bind = QueueBindOptions::default();
        channel
            .queue_bind(
                dead_letters.into(),
                exchange.into(),
                "".into(),
                bind,
                none(),
            )
            .await?;
        channel
            .queue_declare(jobs.as_str().into(), exclusive, dead_lettered)
            .await?;
        Ok(())
    }

    async fn publish(&self, channel: &Channel) -> Result<(), BoxError> {
        channel
            .confirm_select(ConfirmSelectOptions::default())
            .await?;
        let mut confirms = Vec::new();
        for n in 0..JOBS {
            let (jobs, options) = (self.jobs.as_str().into(), BasicPublishOptions::default());
            let properties = BasicProperties::default();
            let body = payload(n).as_bytes();
            confirms.push(
                channel
                    .basic_publish("".into(), jobs, options, body, properties)
                    .await?,
            );
        }
        for confirm in confirms {
            if !confirm.await?.is_ack() {
                return Err("the broker refused a job".into());
            }
        }
        Ok(())
    }

    async fn delete(&self, channel: &Channel) -> lapin::Result<()> {
        for queue in [&self.jobs, &self.dead_letters] {
            channel
                .queue_delete(queue.as_str().into(), QueueDeleteOptions::default())
                .await?;
        }
        // It may be gone with the last of its bindings; that is no error to the broker.
        let exchange = self.exchange.as_str().into();
        channel
            .exchange_delete(exchange, ExchangeDeleteOptions::default())
            .await
    }
}

/// Asks the broker how many messages of `queue` are ready.
async fn ready(channel: &Channel, queue: &str) -> lapin::Result<u32> {
    let passive = QueueDeclareOptions {
        passive: true,
        ..QueueDeclareOptions::default()
    };
    let queue = channel
        .queue_declare(queue.into(), passive, FieldTable::default())
        .await?;
    Ok(queue.message_count())
}

async fn run(connection: &Connection, prefetch: u16) -> Result<(), BoxError> {
    let names = Names::unique()?;
    let control = connection.create_channel().await?;
    names.declare(&control).await?;
    names.publish(&control).await?;

    let channel = connection.create_channel().await?;
    channel
        .basic_qos(prefetch, BasicQosOptions::default())
        .await?;
    let options = BasicConsumeOptions::default();
    let jobs = names.jobs.as_str();
    let consumer = channel
        .basic_consume(jobs.into(), "worker".into(), options, FieldTable::default())
        .await?;
    println!("consuming {JOBS} jobs from {jobs}, {prefetch} at a time");
    let tally = consume(consumer, prefetch).await?;
    for ((kind, answer), count) in &tally {
        println!("{count:>5} {kind}: {answer:?}");
    }

    // The broker counts ready messages only. What is unacked turns ready as its channel closes.
    channel
        .basic_cancel("worker".into(), BasicCancelOptions::default())
        .await?;
    let before = ready(&control, jobs).await?;
    channel.close(200, "done".into()).await?;
    let unacked = ready(&control, jobs).await? - before;
    let dead_lettered = ready(&control, &names.dead_letters).await?;
    names.delete(&control).await?;
    // A channel that is dropped closes in the background, and fails the connection's own close.
    control.close(200, "done".into()).await?;

    let poison = (0..JOBS).filter(|&n| payload(n) == "nonsense").count();
    println!(
        "the broker counts: ready = {before}, unacked = {unacked}, \
         dead-lettered = {dead_lettered}; poison jobs = {poison}"
    );
    match (before, unacked, dead_lettered as usize == poison) {
        (0, 0, true) => Ok(()),
        _ => Err("the broker's counts are not as they must be".into()),
    }
}

/// Connects within 10 s; the error names `address`, without its user and password.
async fn connect(address: &str) -> Result<Connection, BoxError> {
    let connecting = Connection::connect(address, ConnectionProperties::default());
    let error: BoxError = match timeout(Duration::from_secs(10), connecting).await {
        Ok(Ok(connection)) => return Ok(connection),
        Ok(Err(error)) => error.into(),
        Err(elapsed) => elapsed.into(),
    };
    let shown = match address.split_once("://") {
        Some((scheme, rest)) => {
            let rest = rest.rsplit_once('@').map_or(rest, |(_, host)| host);
            format!("{scheme}://{rest}")
        }
        None => address.to_owned(),
    };
    let error = error.to_string().replace('\n', " ");
    Err(format!("no broker at {shown}: {error}").into())
}

async fn start() -> Result<(), BoxError> {
    let address = env::var("AMQP_ADDR");
    let address = address.as_deref().unwrap_or("amqp://127.0.0.1:5672/%2f");
    let prefetch = match env::var("PREFETCH") {
        Ok(prefetch) => match prefetch.parse::<NonZeroU16>() {
            Ok(prefetch) => prefetch.get(),
            Err(error) => return Err(format!("PREFETCH={prefetch}: {error}").into()),
        },
        Err(_) => 10,
    };
    let connection = connect(address).await?;
    run(&connection, prefetch).await?;
    Ok(connection.close(200, "done".into()).await?)
}

#[tokio::main]
async fn main() -> ExitCode {
    // The policy hears of each panic; standard error need not.
    panic::set_hook(Box::new(|_| ()));

    match start().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
