//! RabbitMQ: what each verdict does, and what a lost channel or connection does to its jobs.

use std::{
    convert::Infallible,
    future::{IntoFuture, pending, poll_fn},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::{FutureExt, StreamExt};
use tokio::{
    io::AsyncReadExt,
    net::TcpListener,
    sync::Semaphore,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
use tower_sentinel::{
    Consumer, Job, SentinelLayer, SettlePolicy, Verdict, ack_on_success,
    broker::rabbitmq::{
        self, ConnectError, Connection, Deliveries, Delivery, DeliveryError, DeliveryTag, Queue,
        QueueKind, SubscriptionError,
        lapin::{
            BasicProperties, Channel, ConnectionProperties,
            message::BasicGetMessage,
            options::{
                BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions,
                QueueDeleteOptions,
            },
            types::{AMQPValue, FieldTable},
        },
    },
    consumer::Subscription,
    outcome::OutcomeKind,
    settle::{Messaging, Reason, Settle},
};

use self::server::{Server, Version, shared, version};
use crate::proxy::Proxy;

mod acks;
mod conformance;
mod consumer_timeout;
mod consumers;
mod delayed_retry;
mod delivery_limit;
mod queue_types;
mod republishing;
mod retry_queues;
pub(crate) mod server;

const KINDS: [QueueKind; 2] = [QueueKind::Classic, QueueKind::Quorum];

/// A queue, and a connection of the test's own beside that of the subscription.
struct Scene {
    name: String,
    kind: QueueKind,
    admin: Channel,
    connection: Connection,
}

impl Scene {
    async fn new(test: &str, kind: QueueKind) -> Self {
        Self::on(shared(), test, kind).await
    }

    async fn on(server: &Server, test: &str, kind: QueueKind) -> Self {
        Self::declare(server, test, kind, FieldTable::default()).await
    }

    async fn declare(server: &Server, test: &str, kind: QueueKind, arguments: FieldTable) -> Self {
        let name = format!("{test}.{kind:?}").to_lowercase();
        let connection = named(server, &name, ConnectionProperties::default()).await;
        let admin = rabbitmq::connect(&server.address()).await.unwrap();
        let admin = admin.create_channel().await.unwrap();
        let options = ConfirmSelectOptions::default();
        admin.confirm_select(options).await.unwrap();
        declare(&admin, &name, kind, arguments).await;
        Self {
            name,
            kind,
            admin,
            connection,
        }
    }

    fn queue(&self) -> Queue {
        match self.kind {
            QueueKind::Quorum => Queue::quorum(&self.name),
            _ => Queue::classic(&self.name),
        }
    }

    async fn subscribe(&self) -> Deliveries {
        self.queue().subscribe(&self.connection).await.unwrap()
    }

    fn dead(&self) -> String {
        format!("{}.dead", self.name)
    }

    async fn declare_dead(&self) {
        declare(
            &self.admin,
            &self.dead(),
            QueueKind::Classic,
            FieldTable::default(),
        )
        .await;
    }

    async fn publish(&self, body: &str) {
        self.publish_with(body, BasicProperties::default()).await;
    }

    async fn publish_with(&self, body: &str, properties: BasicProperties) {
        let confirm = self.admin.basic_publish(
            "".into(),
            self.name.as_str().into(),
            BasicPublishOptions::default(),
            body.as_bytes(),
            properties.with_delivery_mode(2),
        );
        assert!(confirm.await.unwrap().await.unwrap().is_ack());
    }

    async fn get(&self, queue: &str) -> Option<BasicGetMessage> {
        let options = BasicGetOptions { no_ack: true };
        self.admin.basic_get(queue.into(), options).await.unwrap()
    }

    /// Waits until `n` jobs wait in the queue for a consumer.
    async fn wait_for_ready(&self, n: u32) {
        let options = QueueDeclareOptions {
            passive: true,
            ..QueueDeclareOptions::default()
        };
        let waiting = async {
            loop {
                let name = self.name.as_str().into();
                let queue = self
                    .admin
                    .queue_declare(name, options, FieldTable::default());
                if queue.await.unwrap().message_count() == n {
                    return;
                }
                sleep(Duration::from_millis(20)).await;
            }
        };
        let waited = timeout(Duration::from_secs(20), waiting).await;
        waited.unwrap_or_else(|_| panic!("{} has {n} jobs within 20 s", self.name));
    }

    /// Asserts that the queue is empty, also of what was unanswered, which goes back first.
    async fn assert_empty(&self, jobs: Deliveries) {
        close(jobs).await;
        let left = self.get(&self.name).await;
        assert!(left.is_none(), "{} has {left:?}", self.name);
    }
}

async fn named(server: &Server, name: &str, properties: ConnectionProperties) -> Connection {
    let properties = properties.with_connection_name(name.into());
    let connected = rabbitmq::connect_with(properties, Default::default(), &server.address()).await;
    connected.unwrap()
}

async fn declare(channel: &Channel, name: &str, kind: QueueKind, mut arguments: FieldTable) {
    let queue_type = format!("{kind:?}").to_lowercase();
    let queue_type = AMQPValue::LongString(queue_type.into());
    arguments.insert("x-queue-type".into(), queue_type);
    let options = QueueDeclareOptions::durable();
    let declared = channel.queue_declare(name.into(), options, arguments);
    declared.await.unwrap();
}

async fn next(jobs: &mut Deliveries) -> Delivery {
    let job = timeout(Duration::from_secs(20), jobs.next()).await;
    job.expect("a job within 20 s").unwrap().unwrap()
}

/// Returns why the stream ends, and asserts that it says so once.
async fn end(jobs: &mut Deliveries) -> SubscriptionError {
    let end = timeout(Duration::from_secs(20), jobs.next()).await;
    let end = end.expect("an end within 20 s").unwrap().unwrap_err();
    assert!(jobs.next().await.is_none());
    end
}

async fn closed(jobs: &mut Deliveries) -> Result<(), SubscriptionError> {
    let closed = poll_fn(|cx| Pin::new(&mut *jobs).poll_closed(cx));
    let closed = timeout(Duration::from_secs(20), closed).await;
    closed.expect("the end within 20 s")
}

async fn stop(jobs: &mut Deliveries) {
    let stopped = poll_fn(|cx| Pin::new(&mut *jobs).poll_stop(cx));
    let stopped = timeout(Duration::from_secs(20), stopped).await;
    stopped.expect("a subscription stops within 20 s");
}

async fn close(jobs: Deliveries) {
    let mut jobs = close_now(jobs).await;
    closed(&mut jobs).await.unwrap();
}

/// Closes the channel, whatever ended the stream.
async fn close_now(mut jobs: Deliveries) -> Deliveries {
    let closed_now = poll_fn(|cx| Pin::new(&mut jobs).poll_close(cx));
    let closed_now = timeout(Duration::from_secs(20), closed_now).await;
    closed_now.expect("a channel closes within 20 s");
    assert!(jobs.next().await.is_none());
    jobs
}

fn reason() -> Reason {
    Reason::completed(Duration::ZERO)
}

async fn settle(tag: DeliveryTag, verdict: Verdict) -> Result<(), DeliveryError> {
    let settled = tag.settle(verdict, reason()).await;
    settled.map_err(|unsettled| {
        assert!(unsettled.tag.is_none(), "no settlement is tried again");
        unsettled.error
    })
}

/// Subscribes until it works: a quorum queue refuses while it has no leader yet.
async fn resubscribe(server: &Server, queue: Queue) -> Deliveries {
    for _ in 0..300 {
        if let Ok(connection) = rabbitmq::connect(&server.address()).await {
            let subscribed = queue.clone().subscribe(&connection);
            match timeout(Duration::from_secs(5), subscribed).await {
                Ok(Ok(jobs)) => return jobs,
                refused => eprintln!("{refused:?}"),
            }
        }
        sleep(Duration::from_millis(100)).await;
    }
    panic!("no subscription after 30 s");
}

async fn quiet(jobs: &mut Deliveries) {
    let job = timeout(Duration::from_millis(300), jobs.next()).await;
    assert!(job.is_err(), "unexpected: {job:?}");
}

#[tokio::test]
async fn ack_removes() {
    for kind in KINDS {
        let scene = Scene::new("ack_removes", kind).await;
        let mut jobs = scene.subscribe().await;
        scene.publish("one").await;
        let job = next(&mut jobs).await;
        assert_eq!(job.as_ref(), b"one");
        assert_eq!(job.tag().deliveries(), Some(1));
        assert_eq!(job.tag().redelivered(), Some(false));
        settle(job.tag(), Verdict::Ack).await.unwrap();
        scene.assert_empty(jobs).await;
    }
}

#[tokio::test]
async fn retry_raises_the_count() {
    for kind in KINDS {
        let scene = Scene::new("retry_raises_the_count", kind).await;
        let mut jobs = scene.subscribe().await;
        scene.publish("one").await;
        for deliveries in 1..=3 {
            let job = next(&mut jobs).await;
            assert_eq!(job.as_ref(), b"one");
            assert_eq!(job.tag().deliveries(), Some(deliveries), "{kind:?}");
            assert_eq!(job.tag().redelivered(), Some(deliveries > 1));
            settle(job.tag(), Verdict::retry()).await.unwrap();
        }
        let job = next(&mut jobs).await;
        settle(job.tag(), Verdict::Ack).await.unwrap();
        scene.assert_empty(jobs).await;
    }
}

#[tokio::test]
async fn release_says_whether_it_is_charged() {
    for kind in KINDS {
        let scene = Scene::new("release_says_whether_it_is_charged", kind).await;
        let mut jobs = scene.subscribe().await;
        scene.publish("one").await;
        let job = next(&mut jobs).await;
        let is_free = job.tag().capabilities().release_is_free();
        settle(job.tag(), Verdict::release()).await.unwrap();

        let job = next(&mut jobs).await;
        assert_eq!(job.tag().redelivered(), Some(true));
        let deliveries = job.tag().deliveries();
        match kind {
            QueueKind::Quorum if version() < Version::V4_3 => {
                assert_eq!((is_free, deliveries), (false, Some(2)));
            }
            _ => assert_eq!((is_free, deliveries), (true, Some(1))),
        }
        settle(job.tag(), Verdict::Ack).await.unwrap();
        scene.assert_empty(jobs).await;
    }
}

#[tokio::test]
async fn a_delayed_retry_is_not_seen_before_its_time() {
    for kind in KINDS {
        let scene = Scene::new("a_delayed_retry_is_not_seen_before_its_time", kind).await;
        let mut jobs = scene.subscribe().await;
        // An expiration would end the wait too early, and then drop the job.
        let properties = BasicProperties::default().with_expiration("200".into());
        scene.publish_with("one", properties).await;
        let delay = Duration::from_millis(600);
        let mut settled = None;
        for deliveries in 1..=4 {
            let job = next(&mut jobs).await;
            assert_eq!(job.as_ref(), b"one");
            assert_eq!(job.tag().deliveries(), Some(deliveries), "{kind:?}");
            if let Some(waited) = settled.map(|at: Instant| at.elapsed()) {
                assert!(waited >= delay, "{kind:?} came after {waited:?}");
            }
            settled = Some(Instant::now());
            let verdict = Verdict::retry_after(delay);
            assert!(job.tag().capabilities().can(verdict));
            settle(job.tag(), verdict).await.unwrap();
        }
        let job = next(&mut jobs).await;
        settle(job.tag(), Verdict::Ack).await.unwrap();
        scene.assert_empty(jobs).await;
    }
}

#[tokio::test]
async fn a_short_delay_does_not_wait_for_a_long_one() {
    for kind in KINDS {
        let scene = Scene::new("a_short_delay_does_not_wait_for_a_long_one", kind).await;
        let mut jobs = scene.subscribe().await;
        scene.publish("long").await;
        scene.publish("short").await;
        for delay in [60_000, 300] {
            let verdict = Verdict::retry_after(Duration::from_millis(delay));
            settle(next(&mut jobs).await.tag(), verdict).await.unwrap();
        }
        let job = next(&mut jobs).await;
        assert_eq!(job.as_ref(), b"short");
        settle(job.tag(), Verdict::Ack).await.unwrap();
        let waits = format!("{}.retry.quorum.65536", scene.name);
        let job = scene.get(&waits).await.unwrap();
        assert_eq!(job.data, b"long");
        close(jobs).await;
    }
}

#[tokio::test]
async fn a_delay_that_is_too_long_is_refused() {
    let scene = Scene::new("a_delay_that_is_too_long_is_refused", QueueKind::Classic).await;
    let mut jobs = scene.subscribe().await;
    scene.publish("one").await;
    let verdict = Verdict::retry_after(Duration::from_secs(86_400 * 30));
    let error = settle(next(&mut jobs).await.tag(), verdict).await;
    assert!(
        matches!(error, Err(DeliveryError::DelayTooLong(_))),
        "{error:?}"
    );
    close(jobs).await;
    assert!(scene.get(&scene.name).await.is_some());
}

#[tokio::test]
async fn what_is_republished_keeps_its_properties() {
    let scene = Scene::new(
        "what_is_republished_keeps_its_properties",
        QueueKind::Classic,
    )
    .await;
    let mut jobs = scene.subscribe().await;
    let mut headers = FieldTable::default();
    headers.insert("x-mine".into(), AMQPValue::LongLongInt(7));
    let properties = BasicProperties::default()
        .with_headers(headers)
        .with_message_id("id".into())
        .with_content_type("text/plain".into())
        .with_user_id("guest".into());
    scene.publish_with("one", properties).await;
    let first = next(&mut jobs).await;
    settle(first.tag(), Verdict::retry()).await.unwrap();

    let second = next(&mut jobs).await;
    let properties = second.properties();
    assert_eq!(properties.message_id(), first.properties().message_id());
    assert_eq!(properties.content_type(), first.properties().content_type());
    assert_eq!(properties.delivery_mode(), &Some(2));
    let headers = properties.headers().as_ref().unwrap().inner();
    assert_eq!(headers["x-mine"], AMQPValue::LongLongInt(7));
    let queue = AMQPValue::LongString(scene.name.as_str().into());
    assert_eq!(headers["x-original-routing-key"], queue);
    settle(second.tag(), Verdict::Ack).await.unwrap();
    scene.assert_empty(jobs).await;
}

#[tokio::test]
async fn a_dead_letter_bears_the_reason() {
    for kind in KINDS {
        let scene = Scene::new("a_dead_letter_bears_the_reason", kind).await;
        scene.declare_dead().await;
        let queue = scene.queue().dead_letter(scene.dead());
        let mut jobs = queue.subscribe(&scene.connection).await.unwrap();
        scene.publish("poison").await;
        settle(next(&mut jobs).await.tag(), Verdict::retry())
            .await
            .unwrap();
        let job = next(&mut jobs).await;
        assert!(job.tag().capabilities().has_dead_letter());
        let mut reason = reason();
        reason.kind = OutcomeKind::Panicked;
        // It is cut at the boundary of a character.
        reason.message = Some(format!("index 7{}", "é".repeat(5_000)));
        job.tag().settle(Verdict::Reject, reason).await.unwrap();

        let letter = scene.get(&scene.dead()).await.unwrap();
        assert_eq!(letter.data, b"poison");
        let headers = letter.properties.headers().as_ref().unwrap().inner();
        let kind = AMQPValue::LongString("panicked".into());
        assert_eq!(headers["x-outcome-kind"], kind);
        let AMQPValue::LongString(message) = &headers["x-outcome-message"] else {
            panic!("{headers:?}");
        };
        assert_eq!(message.len(), 4095);
        assert!(message.as_bytes().starts_with(b"index 7"));
        assert!(
            matches!(headers["x-outcome-time"], AMQPValue::Timestamp(at) if at > 1_700_000_000)
        );
        assert_eq!(headers["x-deliveries"], AMQPValue::LongUInt(2));
        scene.assert_empty(jobs).await;
    }
}

#[tokio::test]
async fn a_dead_letter_that_is_moved_back_is_counted_anew() {
    let test = "a_dead_letter_that_is_moved_back_is_counted_anew";
    let scene = Scene::new(test, QueueKind::Classic).await;
    scene.declare_dead().await;
    let queue = scene.queue().dead_letter(scene.dead());
    let mut jobs = queue.subscribe(&scene.connection).await.unwrap();
    scene.publish("poison").await;
    settle(next(&mut jobs).await.tag(), Verdict::retry())
        .await
        .unwrap();
    settle(next(&mut jobs).await.tag(), Verdict::Reject)
        .await
        .unwrap();
    let letter = scene.get(&scene.dead()).await.unwrap();
    scene
        .publish_with("poison", letter.properties.clone())
        .await;
    let job = next(&mut jobs).await;
    assert_eq!(job.tag().deliveries(), Some(1));
    settle(job.tag(), Verdict::retry()).await.unwrap();
    let job = next(&mut jobs).await;
    assert_eq!(job.tag().deliveries(), Some(2));
    settle(job.tag(), Verdict::Ack).await.unwrap();
    scene.assert_empty(jobs).await;
}

#[tokio::test]
async fn a_rejected_job_goes_where_the_queue_sends_it() {
    for kind in KINDS {
        let test = "a_rejected_job_goes_where_the_queue_sends_it";
        let mut arguments = FieldTable::default();
        let dead = format!("{test}.{kind:?}.dead").to_lowercase();
        let text = |text: &str| AMQPValue::LongString(text.into());
        arguments.insert("x-dead-letter-exchange".into(), text(""));
        arguments.insert("x-dead-letter-routing-key".into(), text(&dead));
        let scene = Scene::declare(shared(), test, kind, arguments).await;
        scene.declare_dead().await;
        let mut jobs = scene.subscribe().await;
        scene.publish("poison").await;
        let job = next(&mut jobs).await;
        assert!(!job.tag().capabilities().has_dead_letter());
        settle(job.tag(), Verdict::Reject).await.unwrap();
        let mut letter = None;
        while letter.is_none() {
            letter = scene.get(&dead).await;
        }
        scene.assert_empty(jobs).await;
    }
}

#[tokio::test]
async fn a_dead_letter_that_nobody_takes_is_an_error_and_not_lost() {
    for kind in KINDS {
        let test = "a_dead_letter_that_nobody_takes_is_an_error_and_not_lost";
        let scene = Scene::new(test, kind).await;
        scene.declare_dead().await;
        let queue = scene.queue().dead_letter(scene.dead());
        let mut jobs = queue.subscribe(&scene.connection).await.unwrap();
        let dead = scene.dead().as_str().into();
        let deleted = scene.admin.queue_delete(dead, Default::default());
        deleted.await.unwrap();
        scene.publish("poison").await;
        let tag = next(&mut jobs).await.tag();
        let unsettled = tag.settle(Verdict::Reject, reason()).await.unwrap_err();
        assert!(unsettled.is_misconfigured());
        let error = unsettled.error;
        assert!(
            matches!(error, DeliveryError::Unroutable { .. }),
            "{error:?}"
        );
        // The channel of the subscription is another one.
        quiet(&mut jobs).await;
        close(jobs).await;
        assert!(scene.get(&scene.name).await.is_some());
    }
}

#[tokio::test]
async fn a_second_settlement_is_refused() {
    for kind in KINDS {
        let scene = Scene::new("a_second_settlement_is_refused", kind).await;
        let mut jobs = scene.subscribe().await;
        scene.publish("one").await;
        scene.publish("two").await;
        let job = next(&mut jobs).await;
        settle(job.tag(), Verdict::Ack).await.unwrap();
        for verdict in [
            Verdict::Ack,
            Verdict::retry(),
            Verdict::Reject,
            Verdict::Abandon,
        ] {
            let error = settle(job.tag(), verdict).await;
            assert!(
                matches!(error, Err(DeliveryError::AlreadySettled)),
                "{error:?}"
            );
        }
        // A second ack on the wire would have closed the channel.
        settle(next(&mut jobs).await.tag(), Verdict::Ack)
            .await
            .unwrap();
        scene.assert_empty(jobs).await;
    }
}

#[tokio::test]
async fn a_keep_alive_is_refused() {
    let scene = Scene::new("a_keep_alive_is_refused", QueueKind::Classic).await;
    let mut jobs = scene.subscribe().await;
    scene.publish("one").await;
    let tag = next(&mut jobs).await.tag();
    assert!(!tag.capabilities().has_keep_alive());
    let error = tag.keep_alive().await;
    assert!(matches!(error, Err(DeliveryError::NoKeepAlive)));
    close(jobs).await;
}

#[tokio::test]
async fn a_closed_channel_gives_its_jobs_back() {
    for kind in KINDS {
        let scene = Scene::new("a_closed_channel_gives_its_jobs_back", kind).await;
        let mut jobs = scene.subscribe().await;
        scene.publish("one").await;
        scene.publish("two").await;
        let stale = next(&mut jobs).await.tag();
        close(jobs).await;
        let error = settle(stale, Verdict::Ack).await;
        assert!(matches!(error, Err(DeliveryError::Stale)), "{error:?}");

        // The end of a worker that does not close its channel is that of a drop.
        let mut jobs = scene.subscribe().await;
        let stale = next(&mut jobs).await.tag();
        drop(jobs);
        let error = settle(stale.clone(), Verdict::Ack).await;
        assert!(matches!(error, Err(DeliveryError::Stale)), "{error:?}");

        let mut jobs = scene.subscribe().await;
        for body in ["one", "two"] {
            let job = next(&mut jobs).await;
            assert_eq!(job.as_ref(), body.as_bytes());
            assert_eq!(job.tag().redelivered(), Some(true));
            settle(job.tag(), Verdict::Ack).await.unwrap();
        }
        scene.assert_empty(jobs).await;
        // A tag that lives on had not kept the channel open.
        drop(stale);
    }
}

#[tokio::test]
async fn the_prefetch_holds() {
    for kind in KINDS {
        let scene = Scene::new("the_prefetch_holds", kind).await;
        let queue = scene.queue().prefetch(3);
        let mut jobs = queue.subscribe(&scene.connection).await.unwrap();
        assert_eq!(jobs.prefetch(), 3);
        for number in 0..10 {
            scene.publish(&number.to_string()).await;
        }
        let mut tags = Vec::new();
        for _ in 0..3 {
            tags.push(next(&mut jobs).await.tag());
        }
        quiet(&mut jobs).await;
        // In any order.
        settle(tags.remove(1), Verdict::Ack).await.unwrap();
        tags.push(next(&mut jobs).await.tag());
        quiet(&mut jobs).await;
        close(jobs).await;
    }
}

#[tokio::test]
async fn a_deleted_queue_ends_the_stream() {
    for kind in KINDS {
        let scene = Scene::new("a_deleted_queue_ends_the_stream", kind).await;
        let mut jobs = scene.subscribe().await;
        scene.publish("one").await;
        let job = next(&mut jobs).await;
        let options = QueueDeleteOptions::default();
        let deleted = scene
            .admin
            .queue_delete(scene.name.as_str().into(), options);
        deleted.await.unwrap();
        let error = end(&mut jobs).await;
        assert!(
            matches!(error, SubscriptionError::Cancelled { .. }),
            "{error:?}"
        );
        // Its channel is open until it is given up.
        settle(job.tag(), Verdict::Ack).await.unwrap();
        poll_fn(|cx| Pin::new(&mut jobs).poll_close(cx)).await;
        let error = settle(job.tag(), Verdict::Ack).await;
        assert!(matches!(error, Err(DeliveryError::AlreadySettled)));
    }
}

#[tokio::test]
async fn a_connection_that_the_server_closes_ends_the_stream() {
    for kind in KINDS {
        let test = "a_connection_that_the_server_closes_ends_the_stream";
        let scene = Scene::new(test, kind).await;
        let mut jobs = scene.subscribe().await;
        scene.publish("one").await;
        let stale = next(&mut jobs).await.tag();
        shared().close_connection(&scene.name);
        // Without the stream being polled, as by a consumer whose service is unready.
        let error = closed(&mut jobs).await.unwrap_err();
        let is_closed = matches!(error, SubscriptionError::ConnectionClosed(_));
        assert!(is_closed, "{error:?}");
        let line = format!("{error:#}");
        assert!(line.contains("closed by the test"), "{line}");
        end(&mut jobs).await;
        let error = settle(stale, Verdict::Ack).await;
        assert!(matches!(error, Err(DeliveryError::Stale)), "{error:?}");

        let connection = rabbitmq::connect(&shared().address()).await.unwrap();
        let mut jobs = scene.queue().subscribe(&connection).await.unwrap();
        let twin = next(&mut jobs).await;
        assert_eq!(twin.tag().redelivered(), Some(true));
        settle(twin.tag(), Verdict::Ack).await.unwrap();
        scene.assert_empty(jobs).await;
    }
}

#[tokio::test]
async fn a_connection_that_the_user_closes_ends_the_stream() {
    let test = "a_connection_that_the_user_closes_ends_the_stream";
    let scene = Scene::new(test, QueueKind::Classic).await;
    let mut jobs = scene.subscribe().await;
    scene.connection.close(200, "OK".into()).await.unwrap();
    let error = end(&mut jobs).await;
    let is_closed = matches!(error, SubscriptionError::ConnectionClosed(_));
    assert!(is_closed, "{error:?}");
}

/// Waits until a connection that was closed has recovered, so that an answer would be sent.
///
/// lapin notices the end of the connection on its runtime, which may have been blocked. A channel that
/// is opened before can stop its I/O thread for good: when it has opened the channel anew, lapin 4.12
/// drops what waited for it, with the last handle of the channel, whose `drop` reads the status that
/// this thread has locked for writing (`ChannelStatus::finalize_connection`).
async fn recovered(connection: &Connection) {
    let recovered = async {
        while connection.status().connected() {
            sleep(Duration::from_millis(5)).await;
        }
        while !connection.status().connected() || connection.create_channel().await.is_err() {
            sleep(Duration::from_millis(20)).await;
        }
    };
    let recovered = timeout(Duration::from_secs(20), recovered).await;
    recovered.expect("lapin recovers within 20 s");
}

#[tokio::test]
async fn the_recovery_of_lapin_sends_no_stale_tag() {
    for kind in KINDS {
        let scene = Scene::new("the_recovery_of_lapin_sends_no_stale_tag", kind).await;
        let name = format!("{}.recovering", scene.name);
        let recovering = ConnectionProperties::default().enable_auto_recover();
        let connection = named(shared(), &name, recovering).await;
        let mut jobs = scene.queue().subscribe(&connection).await.unwrap();
        scene.publish("one").await;
        let stale = next(&mut jobs).await.tag();
        shared().close_connection(&name);
        recovered(&connection).await;
        let error = settle(stale, Verdict::Ack).await;
        assert!(matches!(error, Err(DeliveryError::Stale)), "{error:?}");
        // The stream ends, or lapin has dropped its error with what it had received, and goes on.
        let twin = timeout(Duration::from_secs(20), jobs.next()).await;
        drop(twin.expect("an item within 20 s"));
        drop(jobs);
        let mut jobs = scene.queue().subscribe(&connection).await.unwrap();
        settle(next(&mut jobs).await.tag(), Verdict::Ack)
            .await
            .unwrap();
        scene.assert_empty(jobs).await;
    }
}

#[tokio::test]
async fn the_consumer_timeout_ends_the_subscription() {
    let settings = "{consumer_timeout, 1000}, {channel_tick_interval, 200}";
    let server = Server::start(settings);
    for kind in KINDS {
        let cancels = version() >= Version::V4_3;
        if cancels && kind == QueueKind::Classic {
            continue; // It has none.
        }
        let test = "the_consumer_timeout_ends_the_subscription";
        let scene = Scene::on(&server, test, kind).await;
        let mut jobs = scene.subscribe().await;
        scene.publish("one").await;
        let stale = next(&mut jobs).await.tag();
        let error = end(&mut jobs).await;
        if cancels {
            let is_cancelled = matches!(error, SubscriptionError::Cancelled { .. });
            assert!(is_cancelled, "{error:?}");
        } else {
            let is_closed = matches!(error, SubscriptionError::ChannelClosed(_));
            assert!(is_closed, "{error:?}");
            let error = settle(stale, Verdict::Ack).await;
            assert!(matches!(error, Err(DeliveryError::Stale)), "{error:?}");
        }
        // The connection lives.
        let mut jobs = scene.subscribe().await;
        settle(next(&mut jobs).await.tag(), Verdict::Ack)
            .await
            .unwrap();
        scene.assert_empty(jobs).await;
    }
}

#[tokio::test]
async fn a_retry_whose_channel_ends_while_it_waits_is_not_published() {
    let settings = "{consumer_timeout, 1000}, {channel_tick_interval, 200}";
    let server = Server::start(settings);
    let test = "a_retry_whose_channel_ends_while_it_waits";
    let scene = Scene::on(&server, test, QueueKind::Quorum).await;
    let mut jobs = scene.subscribe().await;
    scene.publish("one").await;
    let tag = next(&mut jobs).await.tag();
    // While it waits to use a new retry queue, the server closes the channel.
    let verdict = Verdict::retry_after(Duration::from_millis(200));
    let (settled, ended) = tokio::join!(settle(tag, verdict), end(&mut jobs));
    match version() >= Version::V4_3 {
        true => {
            let is_cancelled = matches!(ended, SubscriptionError::Cancelled { .. });
            assert!(is_cancelled, "{ended:?}");
            assert!(matches!(settled, Err(DeliveryError::Lost)), "{settled:?}");
            drop(close_now(jobs).await);
        }
        false => {
            let is_closed = matches!(ended, SubscriptionError::ChannelClosed(_));
            assert!(is_closed, "{ended:?}");
            assert!(matches!(settled, Err(DeliveryError::Stale)), "{settled:?}");
        }
    }
    let mut jobs = scene.subscribe().await;
    let job = next(&mut jobs).await;
    assert_eq!(job.as_ref(), b"one");
    settle(job.tag(), Verdict::Ack).await.unwrap();
    // For longer than the delay of a second one.
    sleep(Duration::from_millis(500)).await;
    scene.assert_empty(jobs).await;
}

#[tokio::test]
async fn what_a_stopped_subscription_gives_back_goes_to_others() {
    for kind in KINDS {
        for watched in [false, true] {
            let test = format!("what_a_stopped_subscription_gives_back.{watched}");
            let scene = Scene::new(&test, kind).await;
            for body in ["one", "two", "three", "four", "five", "six"] {
                scene.publish(body).await;
            }
            scene.wait_for_ready(6).await;
            let queue = scene.queue().prefetch(4);
            let mut stopped = queue.subscribe(&scene.connection).await.unwrap();
            let (one, two) = (next(&mut stopped).await, next(&mut stopped).await);
            scene.wait_for_ready(2).await;
            sleep(Duration::from_millis(100)).await;
            if watched {
                // It takes what lapin has received.
                let watch = poll_fn(|cx| Pin::new(&mut stopped).poll_closed(cx));
                assert!(watch.now_or_never().is_none());
            }
            stop(&mut stopped).await;
            stop(&mut stopped).await;
            settle(one.tag(), Verdict::release()).await.unwrap();
            assert!(stopped.next().await.is_none());
            closed(&mut stopped).await.unwrap();

            // The first lives, and has one to answer.
            let mut jobs = scene.subscribe().await;
            let mut came = Vec::new();
            for _ in 0..5 {
                let job = next(&mut jobs).await;
                let body = String::from_utf8(job.as_ref().to_vec()).unwrap();
                let is_free = job.tag().capabilities().release_is_free();
                let was_delivered = ["one", "three", "four"].contains(&&*body);
                let deliveries = if was_delivered && !is_free { 2 } else { 1 };
                assert_eq!(job.tag().deliveries(), Some(deliveries), "{kind:?} {body}");
                settle(job.tag(), Verdict::Ack).await.unwrap();
                came.push(body);
            }
            came.sort_unstable();
            assert_eq!(came, ["five", "four", "one", "six", "three"]);
            settle(two.tag(), Verdict::Ack).await.unwrap();
            close(stopped).await;
            scene.assert_empty(jobs).await;
        }
    }
}

#[tokio::test]
async fn a_consumer_that_drains_leaves_the_others_what_waits() {
    for kind in KINDS {
        let test = "a_consumer_that_drains_leaves_the_others_what_waits";
        let scene = Scene::new(test, kind).await;
        for n in 0..30 {
            scene.publish(&n.to_string()).await;
        }
        let queue = scene.queue().prefetch(10);
        let jobs = queue.subscribe(&scene.connection).await.unwrap();
        // A place is free for each that ends.
        let begun = Arc::new(AtomicUsize::new(0));
        let end = Arc::new(Semaphore::new(0));
        let service = {
            let (begun, end) = (Arc::clone(&begun), Arc::clone(&end));
            ServiceBuilder::new()
                .layer(jobs.gate())
                .layer(SentinelLayer::new(SettlePolicy::new(ack_on_success())).no_timeout())
                .service_fn(move |_: Delivery| {
                    begun.fetch_add(1, Ordering::SeqCst);
                    let end = Arc::clone(&end);
                    async move {
                        end.acquire().await.unwrap().forget();
                        Ok::<_, Infallible>(())
                    }
                })
        };
        let signal = CancellationToken::new();
        let consumer = Consumer::new(jobs, service)
            .with_graceful_shutdown(signal.clone().cancelled_owned())
            .into_future();
        let draining = tokio::spawn(consumer);
        scene.wait_for_ready(20).await;
        let full = async {
            while begun.load(Ordering::SeqCst) < 10 {
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(Duration::from_secs(20), full).await.unwrap();
        signal.cancel();
        // The drain has begun; nothing tells when.
        sleep(Duration::from_millis(200)).await;
        end.add_permits(5);
        sleep(Duration::from_millis(200)).await;
        let mut others = scene.subscribe().await;
        for _ in 0..20 {
            let job = next(&mut others).await;
            assert_eq!(job.tag().redelivered(), Some(false));
            settle(job.tag(), Verdict::Ack).await.unwrap();
        }
        assert!(!draining.is_finished());
        end.add_permits(5);
        let summary = timeout(Duration::from_secs(20), draining).await.unwrap();
        let summary = summary.unwrap().unwrap();
        assert_eq!((summary.answered, begun.load(Ordering::SeqCst)), (10, 10));
        scene.assert_empty(others).await;
    }
}

#[tokio::test]
async fn the_gate_is_as_wide_as_the_prefetch() {
    let test = "the_gate_is_as_wide_as_the_prefetch";
    let scene = Scene::new(test, QueueKind::Classic).await;
    let queue = scene.queue().prefetch(2);
    let jobs = queue.subscribe(&scene.connection).await.unwrap();
    let service = service_fn(|()| pending::<Result<(), Infallible>>());
    let mut service = ServiceBuilder::new().layer(jobs.gate()).service(service);
    let mut calls = Vec::new();
    for _ in 0..2 {
        calls.push(service.ready().await.unwrap().call(()));
    }
    assert!(service.ready().now_or_never().is_none());
    calls.pop();
    assert!(service.ready().now_or_never().is_some());
    close(jobs).await;
}

#[tokio::test]
async fn a_retry_queue_outlives_its_last_job_by_a_week() {
    for kind in KINDS {
        let test = "a_retry_queue_outlives_its_last_job_by_a_week";
        let scene = Scene::new(test, kind).await;
        let mut jobs = scene.subscribe().await;
        scene.publish("one").await;
        let verdict = Verdict::retry_after(Duration::from_millis(512));
        settle(next(&mut jobs).await.tag(), verdict).await.unwrap();
        let code = format!(
            r#"Name = rabbit_misc:r(<<"/">>, queue, <<"{}.retry.quorum.512">>),
            {{ok, Queue}} = rabbit_amqqueue:lookup(Name),
            Arguments = amqqueue:get_arguments(Queue),
            {{_, _, Expires}} = lists:keyfind(<<"x-expires">>, 1, Arguments),
            Expires"#,
            scene.name
        );
        let expires = shared().eval(&code).await;
        assert_eq!(expires.as_deref(), Some("604800512"));
        settle(next(&mut jobs).await.tag(), Verdict::Ack)
            .await
            .unwrap();
        scene.assert_empty(jobs).await;
    }
}

#[tokio::test]
async fn a_killed_server_loses_no_job() {
    let mut server = Server::start("");
    let mut scenes = Vec::new();
    for kind in KINDS {
        let scene = Scene::on(&server, "a_killed_server_loses_no_job", kind).await;
        let is_quorum = kind == QueueKind::Quorum;
        server.has_written(&scene.name, is_quorum).await;
        scene.publish("one").await;
        scene.publish("two").await;
        let mut jobs = scene.subscribe().await;
        let stale = next(&mut jobs).await.tag();
        scenes.push((scene, jobs, stale));
    }
    server.kill();
    let address = server.address_of("guest", "secret");
    let error = rabbitmq::connect(&address).await.unwrap_err();
    assert!(
        matches!(error, ConnectError::Unreachable { .. }),
        "{error:?}"
    );
    let line = format!("{error:#}");
    assert!(line.starts_with("rabbitmq at 127.0.0.1:"), "{line}");
    assert!(!line.contains('\n') && !line.contains("secret"), "{line}");

    let mut stale_tags = Vec::new();
    for (scene, mut jobs, stale) in scenes {
        let error = closed(&mut jobs).await.unwrap_err();
        let is_lost = matches!(error, SubscriptionError::ConnectionLost(_));
        assert!(is_lost, "{error:?}");
        // "two" had come, and is void.
        end(&mut jobs).await;
        stale_tags.push((scene.name, scene.kind, stale));
    }
    server.restart();
    for (name, kind, stale) in stale_tags {
        let error = settle(stale, Verdict::Ack).await;
        assert!(matches!(error, Err(DeliveryError::Stale)), "{error:?}");
        let queue = match kind {
            QueueKind::Quorum => Queue::quorum(&name),
            _ => Queue::classic(&name),
        };
        let mut jobs = resubscribe(&server, queue).await;
        for body in ["one", "two"] {
            let job = next(&mut jobs).await;
            assert_eq!(job.as_ref(), body.as_bytes());
            settle(job.tag(), Verdict::Ack).await.unwrap();
        }
        quiet(&mut jobs).await;
    }
}

#[tokio::test]
async fn a_delayed_retry_outlives_a_kill() {
    let mut server = Server::start("");
    let mut queues = Vec::new();
    for kind in KINDS {
        let scene = Scene::on(&server, "a_delayed_retry_outlives_a_kill", kind).await;
        let is_quorum = kind == QueueKind::Quorum;
        server.has_written(&scene.name, is_quorum).await;
        let mut jobs = scene.subscribe().await;
        scene.publish("one").await;
        let verdict = Verdict::retry_after(Duration::from_secs(3));
        settle(next(&mut jobs).await.tag(), verdict).await.unwrap();
        queues.push(scene.queue());
    }
    // The retry queues were declared for it.
    server.kill();
    server.restart();
    for queue in queues {
        let mut jobs = resubscribe(&server, queue).await;
        let job = next(&mut jobs).await;
        assert_eq!(job.as_ref(), b"one");
        assert_eq!(job.tag().deliveries(), Some(2));
        settle(job.tag(), Verdict::Ack).await.unwrap();
    }
}

#[tokio::test]
async fn a_retry_queue_that_may_be_new_is_not_used_yet() {
    // The server loses a classic one too seldom for a test that kills it.
    let newness = Duration::from_secs(2);
    for kind in KINDS {
        let scene = Scene::new("a_retry_queue_that_may_be_new_is_not_used_yet", kind).await;
        let mut jobs = scene.subscribe().await;
        for (delay, is_new) in [(1, true), (1, false), (2, true), (1, false)] {
            scene.publish("one").await;
            let started = Instant::now();
            let verdict = Verdict::retry_after(Duration::from_millis(delay));
            settle(next(&mut jobs).await.tag(), verdict).await.unwrap();
            assert_eq!(started.elapsed() > newness, is_new, "{kind:?}, {delay} ms");
            let again = next(&mut jobs).await.tag();
            settle(again, Verdict::Ack).await.unwrap();
        }
        scene.assert_empty(jobs).await;
    }
}

#[tokio::test]
async fn a_server_that_is_silent_is_given_up_on() {
    let silent = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let address = silent.local_addr().unwrap();
    let accepted = tokio::spawn(async move { silent.accept().await.unwrap().0 });
    let connecting = format!("amqp://guest:secret@{address}/%2f?connection_timeout=300");
    let started = Instant::now();
    let error = rabbitmq::connect(&connecting).await.unwrap_err();
    let limit = Duration::from_millis(300);
    assert!(started.elapsed() >= limit);
    assert!(
        matches!(error, ConnectError::TimedOut { limit: found, .. } if found == limit),
        "{error:?}"
    );
    let line = format!("rabbitmq at {address} did not answer within 300ms");
    assert_eq!(error.to_string(), line);
    // Nothing is left behind: lapin's thread would wait for as long as the server does.
    let mut server_side = accepted.await.unwrap();
    let mut sent = Vec::new();
    let end = timeout(Duration::from_secs(5), server_side.read_to_end(&mut sent));
    end.await.expect("the connection is closed").unwrap();
}

#[tokio::test]
async fn a_subscription_that_is_not_answered_is_given_up_on() {
    for kind in KINDS {
        let test = "a_subscription_that_is_not_answered_is_given_up_on";
        let scene = Scene::new(test, kind).await;
        let proxy = Proxy::start(shared().host()).await;
        let address = format!("amqp://guest:guest@{}/%2f", proxy.address());
        let connection = rabbitmq::connect(&address).await.unwrap();
        proxy.stall();
        let limit = Duration::from_millis(300);
        let queue = scene.queue().subscribe_timeout(limit);
        let started = Instant::now();
        let error = queue.subscribe(&connection).await.unwrap_err();
        assert!(started.elapsed() >= limit);
        let is_late =
            matches!(&error, SubscriptionError::TimedOut { limit: found, .. } if *found == limit);
        assert!(is_late, "{error:?}");
        let line = format!("no subscription to \"{}\" within 300ms", scene.name);
        assert_eq!(error.to_string(), line);
    }
}

#[tokio::test]
async fn wrong_credentials_are_told_in_a_line() {
    let address = shared().address_of("guest", "secret");
    let error = rabbitmq::connect(&address).await.unwrap_err();
    assert!(matches!(error, ConnectError::Denied { .. }), "{error:?}");
    let line = error.to_string();
    assert!(line.starts_with("rabbitmq at 127.0.0.1:"), "{line}");
    assert!(line.ends_with("refuses the credentials"), "{line}");

    let address = shared().address().replace("%2f", "nowhere");
    let error = rabbitmq::connect(&address).await.unwrap_err();
    assert!(
        matches!(error, ConnectError::NoVirtualHost { .. }),
        "{error:?}"
    );

    for address in ["amqp:guest:secret", "http://guest:secret@x", "secret"] {
        let error = rabbitmq::connect(address).await.unwrap_err();
        assert!(
            matches!(error, ConnectError::InvalidAddress { .. }),
            "{error:?}"
        );
        assert!(
            !format!("{error} {error:?}").contains("secret"),
            "{error:?}"
        );
    }
}

#[tokio::test]
async fn a_queue_that_does_not_exist_is_refused() {
    let connection = rabbitmq::connect(&shared().address()).await.unwrap();
    let error = Queue::classic("no such queue").subscribe(&connection).await;
    let error = error.unwrap_err();
    assert!(
        matches!(error, SubscriptionError::Refused { .. }),
        "{error:?}"
    );
    let error = Queue::classic("x".repeat(250)).subscribe(&connection).await;
    let error = error.unwrap_err();
    assert!(
        matches!(error, SubscriptionError::NameTooLong { .. }),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_classic_queue_taken_for_a_quorum_queue_tells_no_count() {
    // With a name so long that the server has no room to tell the type.
    let scene = Scene::new(&"q".repeat(200), QueueKind::Classic).await;
    let queue = Queue::quorum(&scene.name);
    let mut jobs = queue.subscribe(&scene.connection).await.unwrap();
    scene.publish("one").await;
    settle(next(&mut jobs).await.tag(), Verdict::retry())
        .await
        .unwrap();
    let job = next(&mut jobs).await;
    assert_eq!(job.tag().deliveries(), None);
    assert_eq!(job.tag().redelivered(), Some(true));
    settle(job.tag(), Verdict::Ack).await.unwrap();
    scene.assert_empty(jobs).await;
}

const TRACEPARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

#[tokio::test]
async fn a_tag_says_where_its_job_is_from_and_the_trace_of_its_sender() {
    let scene = Scene::new("a_tag_says_where_its_job_is_from", KINDS[0]).await;
    let queue = &*scene.name;
    let bind = scene.admin.queue_bind(
        queue.into(),
        "amq.direct".into(),
        "created".into(),
        Default::default(),
        FieldTable::default(),
    );
    bind.await.unwrap();
    let mut jobs = scene.subscribe().await;

    // Through the default exchange, where the routing key is the queue, and without any properties.
    scene.publish("one").await;
    let job = next(&mut jobs).await;
    let number = job.tag().number();
    let expected = Messaging::new("rabbitmq", queue).delivery_tag(number);
    assert_eq!(job.tag().messaging(), Some(expected));
    settle(job.tag(), Verdict::Ack).await.unwrap();

    let mut headers = FieldTable::default();
    for (name, value) in [("traceparent", TRACEPARENT), ("tracestate", "k=v")] {
        headers.insert(name.into(), AMQPValue::LongString(value.into()));
    }
    let confirm = scene.admin.basic_publish(
        "amq.direct".into(),
        "created".into(),
        BasicPublishOptions::default(),
        b"two",
        BasicProperties::default()
            .with_message_id("m-7".into())
            .with_headers(headers),
    );
    assert!(confirm.await.unwrap().await.unwrap().is_ack());
    // The second delivery is of a copy, which was republished through the default exchange.
    for verdict in [
        Verdict::retry_after(Duration::from_millis(50)),
        Verdict::Ack,
    ] {
        let job = next(&mut jobs).await;
        let expected = Messaging::new("rabbitmq", format!("amq.direct:created:{queue}"))
            .message_id("m-7")
            .delivery_tag(job.tag().number())
            .traceparent(Some(TRACEPARENT))
            .tracestate(Some("k=v"));
        assert_eq!(job.tag().messaging(), Some(expected), "{verdict}");
        settle(job.tag(), verdict).await.unwrap();
    }
    scene.assert_empty(jobs).await;
}
