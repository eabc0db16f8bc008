//! The way back of a job that waits: its requirements, and that no job is lost on it.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use tower_sentinel::{
    Job, Verdict,
    broker::rabbitmq::{
        self, Deliveries, DeliveryError, DeliveryTag, Queue, QueueKind,
        lapin::{
            BasicProperties,
            options::BasicPublishOptions,
            types::{AMQPValue, FieldTable},
        },
    },
    settle::Settle,
};

use super::{
    KINDS, Scene, close, declare, next, reason, resubscribe,
    server::{Server, shared},
    settle,
};

/// Declares a retry queue as [`Queue::retry_queue`] asks for.
async fn declare_retry_queue(scene: &Scene, name: &str, delay: i64) {
    let text = |text: &str| AMQPValue::LongString(text.into());
    let mut arguments = FieldTable::default();
    for (name, value) in [
        ("x-message-ttl", AMQPValue::LongLongInt(delay)),
        ("x-dead-letter-exchange", text("")),
        ("x-dead-letter-routing-key", text(&scene.name)),
        ("x-dead-letter-strategy", text("at-least-once")),
        ("x-overflow", text("reject-publish")),
    ] {
        arguments.insert(name.into(), value);
    }
    declare(&scene.admin, name, QueueKind::Quorum, arguments).await;
}

#[tokio::test]
async fn retry_queues_that_are_declared_beforehand_are_used() {
    let test = "retry_queues_that_are_declared_beforehand_are_used";
    let scene = Scene::new(test, QueueKind::Classic).await;
    let (short, long) = (format!("{test}.short"), format!("{test}.long"));
    declare_retry_queue(&scene, &short, 100).await;
    declare_retry_queue(&scene, &long, 60_000).await;
    let server = shared();
    server.ctl(&["add_user", "declares-nothing", "secret"]);
    server.ctl(&["set_permissions", "declares-nothing", "^$", ".*", ".*"]);
    let address = server.address_of("declares-nothing", "secret");
    let connection = rabbitmq::connect(&address).await.unwrap();
    let millis = Duration::from_millis;
    let queue = scene
        .queue()
        .retry_queue(millis(100), &short)
        .retry_queue(millis(60_000), &long);
    let mut jobs = queue.subscribe(&connection).await.unwrap();

    scene.publish("one").await;
    let job = next(&mut jobs).await;
    settle(job.tag(), Verdict::retry_after(millis(70)))
        .await
        .unwrap();
    let job = next(&mut jobs).await;
    assert_eq!(job.tag().deliveries(), Some(2));
    settle(job.tag(), Verdict::retry_after(millis(101)))
        .await
        .unwrap();
    assert_eq!(scene.get(&long).await.unwrap().data, b"one");

    scene.publish("two").await;
    let verdict = Verdict::retry_after(millis(60_001));
    let unsettled = next(&mut jobs).await.tag().settle(verdict, reason()).await;
    let unsettled = unsettled.unwrap_err();
    assert!(unsettled.is_misconfigured());
    let error = unsettled.error;
    assert!(matches!(error, DeliveryError::DelayTooLong(_)), "{error:?}");
    close(jobs).await;

    // Deleted behind the back of a subscription.
    let queue = scene.queue().retry_queue(millis(100), &short);
    let mut jobs = queue.subscribe(&connection).await.unwrap();
    let deleted = scene
        .admin
        .queue_delete(short.as_str().into(), Default::default());
    deleted.await.unwrap();
    let verdict = Verdict::retry_after(millis(100));
    let unsettled = next(&mut jobs).await.tag().settle(verdict, reason()).await;
    let unsettled = unsettled.unwrap_err();
    assert!(unsettled.is_misconfigured());
    let error = unsettled.error;
    assert!(
        matches!(error, DeliveryError::Unroutable { .. }),
        "{error:?}"
    );
    close(jobs).await;
    scene.wait_for_ready(1).await;
    assert_eq!(scene.get(&scene.name).await.unwrap().data, b"two");
}

#[tokio::test]
async fn a_queue_that_changes_its_type_keeps_its_retry_queues() {
    let test = "a_queue_that_changes_its_type";
    let scene = Scene::new(test, QueueKind::Classic).await;
    // As an earlier version has left it.
    let mut arguments = FieldTable::default();
    arguments.insert("x-message-ttl".into(), AMQPValue::LongLongInt(64));
    let old = format!("{}.retry.64", scene.name);
    declare(&scene.admin, &old, QueueKind::Classic, arguments).await;
    for kind in KINDS {
        let name = scene.name.as_str();
        let deleted = scene.admin.queue_delete(name.into(), Default::default());
        deleted.await.unwrap();
        declare(&scene.admin, name, kind, FieldTable::default()).await;
        let queue = match kind {
            QueueKind::Quorum => Queue::quorum(name),
            _ => Queue::classic(name),
        };
        let mut jobs = queue.subscribe(&scene.connection).await.unwrap();
        scene.publish("one").await;
        let verdict = Verdict::retry_after(Duration::from_millis(64));
        settle(next(&mut jobs).await.tag(), verdict).await.unwrap();
        settle(next(&mut jobs).await.tag(), Verdict::Ack)
            .await
            .unwrap();
        scene.assert_empty(jobs).await;
    }
}

#[tokio::test]
async fn a_retry_queue_with_other_arguments_is_named() {
    let test = "a_retry_queue_with_other_arguments_is_named";
    let scene = Scene::new(test, QueueKind::Classic).await;
    let other = format!("{}.retry.quorum.128", scene.name);
    declare(
        &scene.admin,
        &other,
        QueueKind::Quorum,
        FieldTable::default(),
    )
    .await;
    let mut jobs = scene.subscribe().await;
    scene.publish("one").await;
    scene.publish("two").await;
    let verdict = Verdict::retry_after(Duration::from_millis(64));
    let unsettled = next(&mut jobs).await.tag().settle(verdict, reason()).await;
    let unsettled = unsettled.unwrap_err();
    assert!(unsettled.is_misconfigured());
    let error = unsettled.error;
    assert!(
        matches!(&error, DeliveryError::Conflict { queue, .. } if *queue == other),
        "{error:?}"
    );
    // Publishes use another channel than declarations.
    settle(next(&mut jobs).await.tag(), Verdict::retry())
        .await
        .unwrap();
    close(jobs).await;
}

/// Seconds from a job's return to a classic queue until the kill of the server.
///
/// A server writes down the changes of an idle queue, such as that the job has left its retry queue, before
/// those of a busy one, and forgets the job in between. There is no event for either.
const MOMENTS: [u64; 3] = [1, 3, 5];

#[tokio::test]
async fn a_job_that_has_waited_outlives_a_kill() {
    let mut server = Server::start("");
    let name = "a_job_that_has_waited_outlives_a_kill";
    let name = Scene::on(&server, name, QueueKind::Classic).await.name;
    server.has_written(&name, false).await;
    for moment in MOMENTS {
        let body = moment.to_string();
        let mut jobs = resubscribe(&server, Queue::classic(&name)).await;
        let admin = rabbitmq::connect(&server.address()).await.unwrap();
        let channel = admin.create_channel().await.unwrap();
        let options = BasicPublishOptions::default();
        let publish = async |body: &str| {
            let persistent = BasicProperties::default().with_delivery_mode(2);
            let queue = name.as_str().into();
            let published =
                channel.basic_publish("".into(), queue, options, body.as_bytes(), persistent);
            published.await.unwrap();
        };
        publish(&body).await;
        // The server may have forgotten an ack of the round before.
        let first = find(&mut jobs, &body, 1).await;
        let verdict = Verdict::retry_after(Duration::from_millis(512));
        settle(first, verdict).await.unwrap();
        // It is back when it is delivered.
        let _unanswered = find(&mut jobs, &body, 2).await;
        let came = Instant::now();
        while came.elapsed() < Duration::from_secs(moment) {
            publish("other").await;
            settle(next(&mut jobs).await.tag(), Verdict::Ack)
                .await
                .unwrap();
        }
        server.kill();
        server.restart();
        let mut jobs = resubscribe(&server, Queue::classic(&name)).await;
        let second = find(&mut jobs, &body, 2).await;
        settle(second, Verdict::Ack).await.unwrap();
        close(jobs).await;
    }
}

/// Returns the tag of the job with this body and this many deliveries, and acks all before it.
async fn find(jobs: &mut Deliveries, body: &str, deliveries: u32) -> DeliveryTag {
    loop {
        let job = next(jobs).await;
        let tag = job.tag();
        if job.as_ref() == body.as_bytes() && tag.deliveries() == Some(deliveries) {
            return tag;
        }
        settle(tag, Verdict::Ack).await.unwrap();
    }
}

#[tokio::test]
async fn a_job_comes_back_when_its_full_queue_has_room() {
    // Time that the server waits before it sends rejected messages again; 3 min by default.
    let server = Server::start("{dead_letter_worker_publisher_confirm_timeout, 500}");
    let mut arguments = FieldTable::default();
    arguments.insert("x-max-length".into(), AMQPValue::LongInt(1));
    let overflow = AMQPValue::LongString("reject-publish".into());
    arguments.insert("x-overflow".into(), overflow);
    let test = "a_job_comes_back_when_its_full_queue_has_room";
    let scene = Scene::declare(&server, test, QueueKind::Classic, arguments).await;
    let queue = scene.queue().prefetch(1);
    let mut jobs = queue.subscribe(&scene.connection).await.unwrap();
    scene.publish("one").await;
    let one = next(&mut jobs).await.tag();
    scene.publish("two").await;
    let verdict = Verdict::retry_after(Duration::from_millis(64));
    settle(one, verdict).await.unwrap();
    let two = next(&mut jobs).await;
    assert_eq!(two.as_ref(), b"two");
    // Full until after "one" was due.
    scene.publish("three").await;
    sleep(Duration::from_secs(1)).await;
    settle(two.tag(), Verdict::Ack).await.unwrap();
    let mut left = Vec::new();
    for _ in 0..2 {
        let job = next(&mut jobs).await;
        left.push(String::from_utf8(job.payload().to_vec()).unwrap());
        settle(job.tag(), Verdict::Ack).await.unwrap();
    }
    left.sort();
    assert_eq!(left, ["one", "three"]);
    scene.assert_empty(jobs).await;
}
