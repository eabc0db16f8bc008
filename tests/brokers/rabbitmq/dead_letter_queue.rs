//! Dead letters of RabbitMQ, ours and the server's own.

use std::time::Duration;

use tower_sentinel::{
    Job, Verdict,
    broker::{
        dead_letters::{DeadLetter, DeadLetters, Filter, Pass, Purge, Redrive},
        rabbitmq::{
            DeadLetterQueue, Deliveries, Delivery, QueueKind, SubscriptionError,
            lapin::{
                BasicProperties, ExchangeKind,
                options::{BasicPublishOptions, ExchangeDeclareOptions, QueueBindOptions},
                types::{AMQPValue, FieldTable},
            },
        },
    },
    outcome::OutcomeKind,
};

use super::{
    Scene, declare, next,
    server::{Version, shared, version},
    settle,
};
use crate::dead_letters::{Place, ack, bury, has_letters, list, numbers, reject, scenarios};

struct RabbitMq {
    scene: Scene,
    jobs: Deliveries,
    /// Delivery limit of the dead-letter queue, if it is set.
    known: Option<u32>,
}

async fn place(name: &str, kind: QueueKind) -> RabbitMq {
    let scene = Scene::new(&format!("dead_letter_queue.{name}"), kind).await;
    let arguments = FieldTable::default();
    declare(&scene.admin, &scene.dead(), kind, arguments).await;
    let queue = scene.queue().prefetch(1).dead_letter(scene.dead());
    let jobs = queue.subscribe(&scene.connection).await.unwrap();
    RabbitMq {
        scene,
        jobs,
        known: None,
    }
}

impl Place for RabbitMq {
    type Delivery = Delivery;
    type Error = SubscriptionError;
    type Jobs = Deliveries;
    type Letters = DeadLetterQueue;

    async fn publish(&self, body: &str) {
        let mut headers = FieldTable::default();
        headers.insert("tenant".into(), AMQPValue::LongString("acme".into()));
        let properties = BasicProperties::default().with_headers(headers);
        self.scene.publish_with(body, properties).await;
    }

    fn jobs(&mut self) -> &mut Deliveries {
        &mut self.jobs
    }

    fn letters(&self) -> Self::Letters {
        let letters = DeadLetterQueue::new(&self.scene.connection, self.scene.dead());
        match self.known {
            Some(limit) => letters.delivery_limit(limit),
            None => letters,
        }
    }

    fn name(&self) -> String {
        self.scene.name.clone()
    }
}

mod classic {
    use super::{QueueKind, RabbitMq, scenarios};

    async fn place(name: &str) -> RabbitMq {
        super::place(name, QueueKind::Classic).await
    }

    scenarios!(place, tokio::test);
}

mod quorum {
    use super::{QueueKind, RabbitMq, scenarios};

    async fn place(name: &str) -> RabbitMq {
        super::place(name, QueueKind::Quorum).await
    }

    scenarios!(place, tokio::test);
}

fn text(text: &str) -> AMQPValue {
    AMQPValue::LongString(text.into())
}

/// Waits until the dead-letter queue has so many letters, and returns them.
async fn letters(dead: &DeadLetterQueue, number: usize) -> Vec<DeadLetter> {
    for _ in 0..500 {
        let letters = dead.list(&Filter::all(), 10).await.unwrap();
        if letters.len() == number {
            return letters;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("there are not {number}");
}

#[tokio::test]
async fn dead_letters_of_the_server_itself_go_back_too() {
    let test = "dead_letter_queue.of_the_server";
    let dead = format!("{test}.quorum.dead");
    let mut arguments = FieldTable::default();
    arguments.insert("x-dead-letter-exchange".into(), text(""));
    arguments.insert("x-dead-letter-routing-key".into(), text(&dead));
    arguments.insert("x-delivery-limit".into(), AMQPValue::LongInt(1));
    let scene = Scene::declare(shared(), test, QueueKind::Quorum, arguments).await;
    scene.declare_dead().await;
    let letters_of = DeadLetterQueue::new(&scene.connection, &dead);
    for (n, reason) in ["rejected", "delivery_limit", "expired"]
        .into_iter()
        .enumerate()
    {
        let properties = BasicProperties::default().with_message_id("order-7".into());
        match reason {
            "expired" => {
                let properties = properties.with_expiration("1".into());
                scene.publish_with(reason, properties).await;
            }
            _ => {
                scene.publish_with(reason, properties).await;
                let mut jobs = scene.queue().delivery_limit(None);
                jobs = jobs.prefetch(1);
                let mut jobs = jobs.subscribe(&scene.connection).await.unwrap();
                match reason {
                    "rejected" => settle(next(&mut jobs).await.tag(), Verdict::Reject)
                        .await
                        .unwrap(),
                    _ => {
                        for _ in 0..2 {
                            let job = next(&mut jobs).await;
                            settle(job.tag(), Verdict::retry()).await.unwrap();
                        }
                    }
                }
                letters(&letters_of, 1).await;
                super::close(jobs).await;
            }
        }
        let found = letters(&letters_of, 1).await;
        let letter = &found[0];
        assert_eq!(letter.kind.as_deref(), Some(reason), "{n}");
        assert_eq!(letter.destination.as_deref(), Some(&*scene.name));
        assert_eq!(letter.id.as_deref(), Some("order-7"));
        assert!(letter.time.is_some());
        let filter = Filter::all().kind(reason);
        let tally = Redrive::new(filter).run(&letters_of).await.unwrap();
        assert_eq!(numbers(tally), [1, 1, 0, 0, 0]);

        let mut jobs = scene.subscribe().await;
        let job = next(&mut jobs).await;
        assert_eq!(job.as_ref(), reason.as_bytes());
        assert_eq!(job.routing_key(), scene.name);
        let properties = job.properties();
        assert_eq!(properties.expiration(), &None);
        let headers = properties.headers().as_ref().unwrap().inner();
        assert_eq!(headers["x-redriven"], text("1"));
        let deaths = headers
            .keys()
            .filter(|name| name.as_str().contains("death"));
        assert_eq!(deaths.count(), 0, "{headers:?}");
        settle(job.tag(), Verdict::Ack).await.unwrap();
        super::close(jobs).await;
    }
}

#[tokio::test]
async fn a_job_of_an_exchange_goes_back_to_its_queue_only() {
    let mut place = place("of_an_exchange", QueueKind::Classic).await;
    let exchange = format!("{}.events", place.scene.name);
    let audit = format!("{}.audit", place.scene.name);
    let admin = &place.scene.admin;
    declare(admin, &audit, QueueKind::Classic, FieldTable::default()).await;
    let options = ExchangeDeclareOptions::default();
    let (topic, arguments) = (ExchangeKind::Topic, FieldTable::default());
    let declared = admin.exchange_declare(exchange.as_str().into(), topic, options, arguments);
    declared.await.unwrap();
    for queue in [&*audit, &*place.scene.name] {
        let (queue, exchange) = (queue.into(), exchange.as_str().into());
        let (options, arguments) = (QueueBindOptions::default(), FieldTable::default());
        let bound = admin.queue_bind(queue, exchange, "order.#".into(), options, arguments);
        bound.await.unwrap();
    }
    let sent = admin.basic_publish(
        exchange.as_str().into(),
        "order.new".into(),
        BasicPublishOptions::default(),
        b"order",
        BasicProperties::default().with_message_id("order-7".into()),
    );
    sent.await.unwrap().await.unwrap();
    reject(&mut place, OutcomeKind::Failed, "no").await;
    let letters = list(&place, Filter::all()).await;
    assert_eq!(letters[0].destination, Some(place.name()));
    assert_eq!(letters[0].id.as_deref(), Some("order-7"));
    let tally = Redrive::new(Filter::all()).run(&place.letters()).await;
    assert_eq!(numbers(tally.unwrap()), [1, 1, 0, 0, 0]);

    let job = next(&mut place.jobs).await;
    assert_eq!(
        (job.exchange(), job.routing_key()),
        (&*exchange, "order.new")
    );
    let id = job.properties().message_id().as_ref().map(|id| id.as_str());
    assert_eq!(id, Some("order-7"));
    settle(job.tag(), Verdict::Ack).await.unwrap();
    assert!(place.scene.get(&audit).await.is_some());
    assert!(place.scene.get(&audit).await.is_none(), "no second copy");
}

#[tokio::test]
async fn many_lists_push_no_letter_over_the_delivery_limit() {
    // The default from 4.0 on.
    many_lists(20, None).await;
}

#[tokio::test]
async fn many_lists_push_no_letter_over_a_lower_limit() {
    many_lists(3, Some(3)).await;
}

async fn many_lists(limit: i32, known: Option<u32>) {
    let test = format!("dead_letter_queue.many_lists.{limit}");
    let scene = Scene::new(&test, QueueKind::Quorum).await;
    let mut arguments = FieldTable::default();
    arguments.insert("x-delivery-limit".into(), AMQPValue::LongInt(limit));
    declare(&scene.admin, &scene.dead(), QueueKind::Quorum, arguments).await;
    let queue = scene.queue().prefetch(1).dead_letter(scene.dead());
    let jobs = queue.subscribe(&scene.connection).await.unwrap();
    let mut place = RabbitMq { scene, jobs, known };
    for n in 0..3 {
        bury(&mut place, &format!("job {n}"), OutcomeKind::Failed, "no").await;
    }
    let before = list(&place, Filter::all()).await;
    for n in 0..25 {
        let letters = list(&place, Filter::all()).await;
        assert_eq!(letters, before, "{n}");
        // A run that passes over all of them, too.
        let redrive = Redrive::new(Filter::all().kind("panicked"));
        let tally = redrive.run(&place.letters()).await.unwrap();
        assert_eq!(numbers(tally), [3, 0, 3, 0, 3]);
    }
    let tally = Redrive::new(Filter::all()).run(&place.letters()).await;
    assert_eq!(numbers(tally.unwrap()), [3, 3, 0, 0, 0]);
    let mut bodies = Vec::new();
    for _ in 0..3 {
        bodies.push(ack(&mut place).await.body);
    }
    bodies.sort();
    assert_eq!(bodies, ["job 0", "job 1", "job 2"]);
}

#[tokio::test]
async fn a_list_counts_as_a_failed_delivery_of_a_quorum_queue_before_4_3() {
    let mut place = place("counts", QueueKind::Quorum).await;
    bury(&mut place, "job", OutcomeKind::Failed, "no").await;
    for _ in 0..3 {
        list(&place, Filter::all()).await;
    }
    let letter = place.scene.get(&place.scene.dead()).await.unwrap();
    let headers = letter.properties.headers().as_ref().unwrap().inner();
    let count = headers
        .get("x-delivery-count")
        .and_then(|count| match count {
            AMQPValue::LongLongInt(count) => Some(*count),
            AMQPValue::LongUInt(count) => Some((*count).into()),
            _ => None,
        });
    match version() < Version::V4_3 {
        true => assert_eq!(count, Some(3), "{headers:?}"),
        false => assert_eq!(count.unwrap_or(0), 0, "{headers:?}"),
    }
}

#[tokio::test]
async fn two_runs_at_once_move_each_letter_once() {
    const LETTERS: u64 = 60;
    let mut place = place("two_runs", QueueKind::Classic).await;
    for n in 0..LETTERS {
        bury(&mut place, &format!("{n:02}"), OutcomeKind::Failed, "no").await;
    }
    let redrive = Redrive::new(Filter::all()).batch(7);
    let letters = place.letters();
    let (one, other) = tokio::join!(redrive.run(&letters), redrive.run(&letters));
    assert_eq!(one.unwrap().moved + other.unwrap().moved, LETTERS);
    let mut bodies = Vec::new();
    for _ in 0..LETTERS {
        bodies.push(ack(&mut place).await.body);
    }
    bodies.sort();
    let expected: Vec<_> = (0..LETTERS).map(|n| format!("{n:02}")).collect();
    assert_eq!(bodies, expected);
    has_letters(&place, 0).await;
}

#[tokio::test]
async fn a_queue_that_is_full_ends_the_run_and_loses_nothing() {
    let mut place = place("full", QueueKind::Classic).await;
    let full = format!("{}.full", place.scene.name);
    let mut arguments = FieldTable::default();
    arguments.insert("x-max-length".into(), AMQPValue::LongInt(2));
    arguments.insert("x-overflow".into(), text("reject-publish"));
    declare(&place.scene.admin, &full, QueueKind::Classic, arguments).await;
    for n in 0..5 {
        bury(&mut place, &format!("job {n}"), OutcomeKind::Failed, "no").await;
    }
    let redrive = Redrive::new(Filter::all()).batch(1).destination(&*full);
    let interrupted = redrive.run(&place.letters()).await.unwrap_err();
    assert_eq!(interrupted.tally.moved, 2, "{interrupted}");
    assert_eq!(interrupted.tally.left(), 3);
    let line = "the run ended early: 3 of 5 dead letters seen, 2 moved, 0 deleted";
    assert_eq!(interrupted.to_string(), line);
    has_letters(&place, 3).await;
}

#[tokio::test]
async fn a_queue_that_does_not_exist_is_an_error_that_names_it() {
    let place = place("no_queue", QueueKind::Classic).await;
    let letters = DeadLetterQueue::new(&place.scene.connection, "mistyped");
    let error = letters.list(&Filter::all(), 1).await.unwrap_err();
    assert_eq!(error.to_string(), "there is no queue \"mistyped\"");
    let long = DeadLetterQueue::new(&place.scene.connection, "x".repeat(256));
    let error = Purge::new(Filter::all()).run(&long).await.unwrap_err();
    assert!(
        error
            .error
            .to_string()
            .ends_with("is longer than the 255 bytes of a name")
    );
}

#[tokio::test]
async fn many_letters_are_taken_at_once() {
    let place = place("many", QueueKind::Classic).await;
    for _ in 0..1_000 {
        let confirm = place.scene.admin.basic_publish(
            "".into(),
            place.scene.dead().as_str().into(),
            BasicPublishOptions::default(),
            b"job",
            BasicProperties::default(),
        );
        drop(confirm.await.unwrap());
    }
    let confirms = place.scene.admin.wait_for_confirms();
    confirms.await.unwrap();
    let mut pass = place.letters().pass().await.unwrap();
    assert_eq!(pass.total(), 1_000);
    assert_eq!(pass.next(700).await.unwrap().len(), 700);
    assert_eq!(pass.next(700).await.unwrap().len(), 300);
    assert_eq!(pass.next(700).await.unwrap().len(), 0);
    pass.close().await.unwrap();
    // Foreign messages: nothing is known of them.
    let letters = list(&place, Filter::all()).await;
    assert_eq!(letters.len(), 1_000);
    assert!(letters.iter().all(|letter| *letter == DeadLetter::new()));
}
