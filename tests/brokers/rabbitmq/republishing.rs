//! Republished jobs, and jobs that can't be republished.

use std::{
    future::IntoFuture,
    io::{Read, Write},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::time::timeout;
use tower::{ServiceBuilder, service_fn};
use tower_sentinel::{
    Consumer, DecisionExt, Job, SentinelLayer, SettlePolicy, Verdict, ack_on_success,
    broker::rabbitmq::{
        self, ConnectError, Connection, Delivery, DeliveryError, DeliveryTag, QueueKind, Right,
        SubscriptionError,
        lapin::{
            BasicProperties,
            options::BasicPublishOptions,
            types::{AMQPValue, FieldTable},
        },
    },
    outcome::OutcomeKind,
    settle::{Reason, Settle},
};

use super::{
    KINDS, Scene, close, end, next, quiet, reason,
    server::{Server, shared},
    settle,
};
use crate::conformance::eventually;

fn text(text: &str) -> AMQPValue {
    AMQPValue::LongString(text.into())
}

fn because(message: String) -> Reason {
    let mut reason = reason();
    reason.kind = OutcomeKind::Failed;
    reason.message = Some(message);
    reason
}

/// Properties of which a frame of `frame_max` bytes has room for just `left` more.
fn filling(frame_max: usize, left: usize) -> BasicProperties {
    // The frame's own bytes; flags, the header's name, type and lengths, and the delivery mode.
    let length = frame_max - 20 - left - (2 + 4 + 1 + 1 + 1 + 4 + 1);
    let mut headers = FieldTable::default();
    headers.insert("t".into(), text(&"x".repeat(length)));
    BasicProperties::default().with_headers(headers)
}

#[tokio::test]
async fn a_reason_is_cut_to_the_frame() {
    let scene = Scene::new("a_reason_is_cut_to_the_frame", QueueKind::Classic).await;
    scene.declare_dead().await;
    let address = format!("{}&frame_max=8192", shared().address());
    let connection = rabbitmq::connect(&address).await.unwrap();
    let queue = scene.queue().dead_letter(scene.dead());
    let mut jobs = queue.subscribe(&connection).await.unwrap();
    scene.publish_with("poison", filling(8_192, 3_000)).await;
    let tag = next(&mut jobs).await.tag();
    let long = because("é".repeat(5_000));
    tag.settle(Verdict::Reject, long).await.unwrap();
    let letter = scene.get(&scene.dead()).await.unwrap();
    let headers = letter.properties.headers().as_ref().unwrap().inner();
    let AMQPValue::LongString(message) = &headers["x-outcome-message"] else {
        panic!("{headers:?}");
    };
    assert!((2_700..3_000).contains(&message.len()), "{}", message.len());
    scene.assert_empty(jobs).await;
}

#[tokio::test]
async fn our_headers_give_way_to_those_of_the_job() {
    let test = "our_headers_give_way_to_those_of_the_job";
    let scene = Scene::new(test, QueueKind::Classic).await;
    scene.declare_dead().await;
    let queue = scene.queue().dead_letter(scene.dead());
    let mut jobs = queue.subscribe(&scene.connection).await.unwrap();
    // Room for the count of a retry, which takes 18 bytes, and no more.
    scene.publish_with("full", filling(131_072, 18)).await;
    let job = next(&mut jobs).await;
    settle(job.tag(), Verdict::retry()).await.unwrap();
    let job = next(&mut jobs).await;
    assert_eq!(job.tag().deliveries(), Some(2));
    let failed = because("bad".into());
    job.tag().settle(Verdict::Reject, failed).await.unwrap();
    let letter = scene.get(&scene.dead()).await.unwrap();
    assert_eq!(letter.data, b"full");
    scene.assert_empty(jobs).await;
}

#[tokio::test]
async fn a_job_whose_headers_leave_no_room_fails_alone() {
    // Not on a quorum queue: the count that the server adds would not fit into its frame.
    let test = "a_job_whose_headers_leave_no_room_fails_alone";
    let scene = Scene::new(test, QueueKind::Classic).await;
    scene.declare_dead().await;
    let queue = scene.queue().dead_letter(scene.dead());
    let mut jobs = queue.subscribe(&scene.connection).await.unwrap();
    scene.publish_with("full", filling(131_072, 17)).await;
    scene.publish("other").await;
    let full = next(&mut jobs).await.tag();
    let other = next(&mut jobs).await.tag();
    let verdict = Verdict::retry_after(Duration::from_secs(1));
    let unsettled = full.settle(verdict, reason()).await.unwrap_err();
    assert!(unsettled.is_moot());
    let error = unsettled.error;
    assert!(
        matches!(
            error,
            DeliveryError::NoRoom {
                size: 131_053,
                limit: 131_052
            }
        ),
        "{error:?}"
    );
    // The channel lives, and the other one's settlement republishes.
    settle(other, Verdict::Reject).await.unwrap();
    assert_eq!(scene.get(&scene.dead()).await.unwrap().data, b"other");
    // It had not kept its place.
    let full = next(&mut jobs).await;
    assert_eq!(full.as_ref(), b"full");
    settle(full.tag(), Verdict::Reject).await.unwrap();
    assert_eq!(scene.get(&scene.dead()).await.unwrap().data, b"full");
    scene.assert_empty(jobs).await;
}

#[tokio::test]
async fn a_handler_sees_where_its_job_was_first_published() {
    let scene = Scene::new("a_handler_sees_where_its_job_was", KINDS[0]).await;
    let bind = scene.admin.queue_bind(
        scene.name.as_str().into(),
        "amq.direct".into(),
        "created".into(),
        Default::default(),
        FieldTable::default(),
    );
    bind.await.unwrap();
    let mut jobs = scene.subscribe().await;
    let confirm = scene.admin.basic_publish(
        "amq.direct".into(),
        "created".into(),
        BasicPublishOptions::default(),
        b"one",
        BasicProperties::default(),
    );
    assert!(confirm.await.unwrap().await.unwrap().is_ack());
    let raw = [("amq.direct", "created"), ("", &*scene.name)];
    for raw in [raw[0], raw[1], raw[1]] {
        let job = next(&mut jobs).await;
        assert_eq!(
            (job.exchange(), job.routing_key()),
            ("amq.direct", "created")
        );
        assert_eq!((job.raw_exchange(), job.raw_routing_key()), raw);
        settle(job.tag(), Verdict::retry()).await.unwrap();
    }
    settle(next(&mut jobs).await.tag(), Verdict::Ack)
        .await
        .unwrap();
    scene.assert_empty(jobs).await;
}

/// Creates a user with `permissions`, and connects as it.
async fn user(name: &str, permissions: [&str; 3]) -> Connection {
    let server = shared();
    server.ctl(&["add_user", name, "secret"]);
    let [configure, write, read] = permissions;
    server.ctl(&["set_permissions", name, configure, write, read]);
    let address = server.address_of(name, "secret");
    rabbitmq::connect(&address).await.unwrap()
}

#[tokio::test]
async fn a_missing_right_is_named_and_stops_the_consumer() {
    for (right, permissions, resource) in [
        (
            Right::Configure,
            ["^$", ".*", ".*"],
            "queue \"missing.classic.retry.quorum.",
        ),
        (
            Right::Write,
            [".*", "^missing", ".*"],
            "the default exchange",
        ),
        (
            Right::Read,
            [".*", ".*", "^missing.classic$"],
            "queue \"missing.classic.retry.quorum.",
        ),
    ] {
        let scene = Scene::new("missing", KINDS[0]).await;
        let name = format!("missing-{right}");
        let connection = user(&name, permissions).await;
        let jobs = scene.queue().subscribe(&connection).await.unwrap();
        scene.publish("one").await;
        let runs = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&runs);
        let fails = service_fn(move |_: Delivery| {
            counted.fetch_add(1, Ordering::SeqCst);
            async { Err::<(), _>(std::io::Error::other("bad")) }
        });
        let delay = Duration::from_millis(64);
        let decision = ack_on_success().backoff(delay..=delay);
        let service = ServiceBuilder::new()
            .layer(SentinelLayer::new(SettlePolicy::new(decision)))
            .service(fails);
        let consumer = Consumer::new(jobs, service).into_future();
        let ended = timeout(Duration::from_secs(20), consumer).await;
        let error = ended.expect("the consumer ends").unwrap_err();
        let printed = format!("{error} {error:?}");
        assert!(printed.contains(&format!("right: {right:?}")), "{printed}");
        let line = format!("the user has no right to {right} {resource}");
        assert!(printed.contains(&line), "{printed}");
        assert_eq!(runs.load(Ordering::SeqCst), 1);
        scene.wait_for_ready(1).await;
        let name = scene.name.as_str().into();
        let deleted = scene.admin.queue_delete(name, Default::default());
        deleted.await.unwrap();
    }
}

#[tokio::test]
async fn a_dead_letter_without_a_target_is_found_at_subscribe() {
    let scene = Scene::new("a_dead_letter_without_a_target", KINDS[0]).await;
    let nowhere = [
        (
            scene.queue().dead_letter("nobody"),
            "there is no queue \"nobody\"",
        ),
        (
            scene.queue().dead_letter_exchange("nobody", "x"),
            "there is no exchange \"nobody\"",
        ),
        (
            scene
                .queue()
                .retry_queue(Duration::from_secs(1), "no-retries"),
            "there is no queue \"no-retries\"",
        ),
    ];
    for (queue, line) in nowhere {
        let error = queue.subscribe(&scene.connection).await.unwrap_err();
        assert!(
            matches!(error, SubscriptionError::NoTarget { .. }),
            "{error:?}"
        );
        assert!(error.to_string().ends_with(line), "{error}");
    }
    // The connection lives.
    close(scene.subscribe().await).await;
}

#[tokio::test]
async fn the_text_of_a_closed_virtual_host_is_the_server_s() {
    let server = shared();
    server.ctl(&["add_user", "limited", "secret"]);
    server.ctl(&["set_permissions", "limited", ".*", ".*", ".*"]);
    server.ctl(&["set_user_limits", "limited", r#"{"max-connections": 0}"#]);
    let address = server.address_of("limited", "secret");
    let error = rabbitmq::connect(&address).await.unwrap_err();
    assert!(
        matches!(error, ConnectError::NoVirtualHost { .. }),
        "{error:?}"
    );
    let line = format!("{error:#}");
    assert!(line.contains("limit"), "{line}");
}

/// Publishes to `queue` by hand, with properties as they go over the wire.
fn publish_raw(server: &Server, queue: &str, properties: &[u8], body: &[u8]) {
    let short = |text: &str| [&[text.len() as u8], text.as_bytes()].concat();
    let long = |text: &[u8]| [&(text.len() as u32).to_be_bytes(), text].concat();
    let mut stream = std::net::TcpStream::connect(server.host()).unwrap();
    stream.write_all(b"AMQP\0\0\x09\x01").unwrap();
    answer(&mut stream);
    let start_ok = [
        long(b""),
        short("PLAIN"),
        long(b"\0guest\0guest"),
        short("en_US"),
    ];
    send(&mut stream, 0, [10, 11], &start_ok.concat());
    answer(&mut stream);
    let tune_ok = [&[0, 9][..], &131_072_u32.to_be_bytes(), &[0, 0]].concat();
    send(&mut stream, 0, [10, 31], &tune_ok);
    send(&mut stream, 0, [10, 40], &[short("/"), vec![0, 0]].concat());
    answer(&mut stream);
    send(&mut stream, 1, [20, 10], &[0]);
    answer(&mut stream);
    let publish = [vec![0, 0], short(""), short(queue), vec![0]].concat();
    send(&mut stream, 1, [60, 40], &publish);
    let size = (body.len() as u64).to_be_bytes();
    let header = [&[0, 60, 0, 0][..], &size, properties].concat();
    frame(&mut stream, 2, 1, &header);
    frame(&mut stream, 3, 1, body);
    // The confirmation of the close shows that all requests before it are done.
    send(
        &mut stream,
        1,
        [20, 40],
        &[vec![0, 200], short("OK"), vec![0; 4]].concat(),
    );
    answer(&mut stream);
}

fn send(stream: &mut std::net::TcpStream, channel: u16, [class, id]: [u16; 2], arguments: &[u8]) {
    let payload = [&class.to_be_bytes()[..], &id.to_be_bytes(), arguments].concat();
    frame(stream, 1, channel, &payload);
}

fn frame(stream: &mut std::net::TcpStream, kind: u8, channel: u16, payload: &[u8]) {
    let size = (payload.len() as u32).to_be_bytes();
    let frame = [&[kind][..], &channel.to_be_bytes(), &size, payload, &[0xce]].concat();
    stream.write_all(&frame).unwrap();
}

fn answer(stream: &mut std::net::TcpStream) {
    let mut head = [0; 7];
    stream.read_exact(&mut head).unwrap();
    let size = u32::from_be_bytes([head[3], head[4], head[5], head[6]]);
    let mut rest = vec![0; size as usize + 1];
    stream.read_exact(&mut rest).unwrap();
}

#[tokio::test]
async fn a_message_that_the_client_can_t_read_is_named() {
    let scene = Scene::new("a_message_that_the_client_can_t_read", KINDS[0]).await;
    // A content type of one byte that is not UTF-8.
    publish_raw(shared(), &scene.name, &[0x80, 0, 1, 0xff], b"job");
    scene.wait_for_ready(1).await;
    let mut jobs = scene.subscribe().await;
    let error = end(&mut jobs).await;
    assert!(
        matches!(&error, SubscriptionError::Unreadable { queue, .. } if *queue == scene.name),
        "{error:?}"
    );
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.starts_with("failed to parse"), "{source}");
    // It is still there, and a client that does not look into it takes it out.
    scene.wait_for_ready(1).await;
    let name = scene.name.as_str().into();
    let purged = scene.admin.queue_purge(name, Default::default());
    assert_eq!(purged.await.unwrap(), 1);
}

/// Sets the alarm; returns when all connections have been notified.
const ALARM: &str = "vm_memory_monitor:set_vm_memory_high_watermark(0), \
    Wait = fun Wait() -> case rabbit_alarm:get_alarms() of [] -> timer:sleep(10), Wait(); _ -> ok end end, \
    Wait()";
const CALM: &str = "vm_memory_monitor:set_vm_memory_high_watermark(0.4)";

#[tokio::test]
async fn a_memory_alarm_holds_up_no_ack() {
    let server = Server::start("");
    for kind in KINDS {
        let scene = Scene::on(&server, "a_memory_alarm_holds_up_no_ack", kind).await;
        let mut jobs = scene.subscribe().await;
        // One job that is published at once, and one that needs a declaration before.
        let again = match kind {
            QueueKind::Classic => Verdict::retry(),
            _ => Verdict::retry_after(Duration::from_millis(64)),
        };
        // So that the connection has published, and is blocked from the first moment of the alarm.
        scene.publish("one").await;
        settle(next(&mut jobs).await.tag(), again).await.unwrap();
        let one = next(&mut jobs).await.tag();
        for _ in 0..20 {
            scene.publish("other").await;
        }
        server.eval(ALARM).await.unwrap();
        // The first publish of an alarm blocks its connection, and waits there half read.
        let retry = tokio::spawn(one.settle(again, reason()));
        for _ in 0..20 {
            let other = next(&mut jobs).await;
            assert_eq!(other.as_ref(), b"other");
            settle(other.tag(), Verdict::Ack).await.unwrap();
        }
        // It ends before its try is given up, which would cost the others their channel.
        assert_blocked(retry.await.unwrap());
        for _ in 0..2 {
            // It comes back during the alarm, so the server has all the acks that came before.
            let one = next(&mut jobs).await;
            assert_eq!(one.as_ref(), b"one");
            let row = format!("{}\t1", scene.name);
            let is_alone = async || {
                let left = server.list(&["list_queues", "name", "messages"]).await;
                left.lines().any(|line| line == row)
            };
            eventually(true, is_alone).await;
            assert_blocked(one.tag().settle(again, reason()).await);
        }
        settle(next(&mut jobs).await.tag(), Verdict::Ack)
            .await
            .unwrap();
        server.eval(CALM).await.unwrap();
        // Only the first of three retries was sent.
        let one = next(&mut jobs).await;
        assert_eq!(one.as_ref(), b"one");
        settle(one.tag(), again).await.unwrap();
        let one = next(&mut jobs).await;
        assert_eq!(one.as_ref(), b"one");
        settle(one.tag(), Verdict::Ack).await.unwrap();
        quiet(&mut jobs).await;
        scene.assert_empty(jobs).await;
    }
}

#[tokio::test]
async fn an_alarm_brings_no_job_over_the_delivery_limit() {
    let server = Server::start("");
    let mut arguments = FieldTable::default();
    arguments.insert("x-delivery-limit".into(), AMQPValue::LongInt(2));
    let test = "an_alarm_brings_no_job_over_the_delivery_limit";
    let scene = Scene::declare(&server, test, QueueKind::Quorum, arguments).await;
    let queue = scene.queue().delivery_limit(2);
    let mut jobs = queue.subscribe(&scene.connection).await.unwrap();
    scene.publish("one").await;
    let again = Verdict::retry_after(Duration::from_millis(64));
    settle(next(&mut jobs).await.tag(), again).await.unwrap();
    // A rejected job is counted, and from now on no further count is allowed.
    settle(next(&mut jobs).await.tag(), Verdict::retry())
        .await
        .unwrap();
    let mut one = next(&mut jobs).await.tag();
    server.eval(ALARM).await.unwrap();
    let free = one.capabilities().release_is_free();
    for _ in 0..3 {
        assert_blocked(one.settle(Verdict::retry(), reason()).await);
        // If that is counted, the job keeps its place.
        if !free {
            quiet(&mut jobs).await;
            break;
        }
        one = next(&mut jobs).await.tag();
    }
    server.eval(CALM).await.unwrap();
    let one = next(&mut jobs).await;
    assert_eq!(one.as_ref(), b"one");
    settle(one.tag(), Verdict::Ack).await.unwrap();
}

fn assert_blocked(
    settled: Result<(), tower_sentinel::settle::Unsettled<DeliveryTag, DeliveryError>>,
) {
    let unsettled = settled.unwrap_err();
    assert!(unsettled.is_moot());
    let error = unsettled.error;
    assert!(matches!(error, DeliveryError::Blocked), "{error:?}");
}

#[tokio::test]
async fn a_lost_connection_for_publishing_costs_no_session() {
    let name = "tower-sentinel: retries and dead letters";
    let server = Server::start("");
    for kind in KINDS {
        let scene = Scene::on(&server, "a_lost_connection_for_publishing", kind).await;
        scene.declare_dead().await;
        let queue = scene.queue().dead_letter(scene.dead());
        let mut jobs = queue.subscribe(&scene.connection).await.unwrap();
        // So that it is lost with channels of each use, which are idle.
        let verdicts = [
            Verdict::release_after(Duration::from_millis(128)),
            Verdict::Reject,
        ];
        for _ in 0..3 {
            for verdict in verdicts {
                scene.publish("one").await;
                // Before or after the loss is noticed.
                settle(next(&mut jobs).await.tag(), verdict).await.unwrap();
            }
            settle(next(&mut jobs).await.tag(), Verdict::Ack)
                .await
                .unwrap();
            assert_eq!(scene.get(&scene.dead()).await.unwrap().data, b"one");
            server.close_connection(name);
        }
        scene.assert_empty(jobs).await;
    }
}

#[tokio::test]
async fn a_connection_of_lapin_s_publishes_too() {
    let scene = Scene::new("a_connection_of_lapin_s_publishes_too", KINDS[0]).await;
    let address = shared().address();
    let connect = || rabbitmq::lapin::Connection::connect(&address, Default::default());
    let alone = Connection::from(connect().await.unwrap());
    let beside = Connection::from(connect().await.unwrap()).publishing(connect().await.unwrap());
    for connection in [alone, beside] {
        let mut jobs = scene.queue().subscribe(&connection).await.unwrap();
        scene.publish("one").await;
        for verdict in [Verdict::retry(), Verdict::Ack] {
            settle(next(&mut jobs).await.tag(), verdict).await.unwrap();
        }
        scene.assert_empty(jobs).await;
        assert!(!format!("{connection:?}").contains("guest"));
    }
}

#[tokio::test]
async fn a_renewed_password_is_that_of_the_connection_for_publishing_too() {
    let test = "a_renewed_password_is_that_of_both";
    let scene = Scene::new(test, KINDS[0]).await;
    let connection = user("renewed", [".*"; 3]).await;
    shared().ctl(&["change_password", "renewed", "other"]);
    let error = scene.queue().subscribe(&connection).await.unwrap_err();
    let is_denied = matches!(&error, SubscriptionError::NoPublisher { error, .. }
        if matches!(**error, ConnectError::Denied { .. }));
    assert!(is_denied, "{error:?}");
    let renewed = connection.update_secret("other".into(), "renewed by the test".into());
    renewed.await.unwrap();
    let mut jobs = scene.queue().subscribe(&connection).await.unwrap();
    // That one, too.
    let renewed = connection.update_secret("other".into(), "renewed again".into());
    renewed.await.unwrap();
    scene.publish("one").await;
    for verdict in [Verdict::retry(), Verdict::Ack] {
        settle(next(&mut jobs).await.tag(), verdict).await.unwrap();
    }
    scene.assert_empty(jobs).await;
}

/// Arguments of a queue that refuses jobs when it is full.
fn full_at_one() -> FieldTable {
    let mut arguments = FieldTable::default();
    arguments.insert("x-max-length".into(), AMQPValue::LongInt(1));
    arguments.insert("x-overflow".into(), text("reject-publish"));
    arguments
}

#[tokio::test]
async fn a_job_that_its_full_queue_does_not_take_fails_alone() {
    let test = "a_job_that_its_full_queue_does_not_take";
    let scene = Scene::declare(shared(), test, QueueKind::Classic, full_at_one()).await;
    let queue = scene.queue().prefetch(2);
    let mut jobs = queue.subscribe(&scene.connection).await.unwrap();
    scene.publish("one").await;
    let one = next(&mut jobs).await.tag();
    scene.publish("two").await;
    let two = next(&mut jobs).await.tag();
    scene.publish("three").await;
    let settled = one.settle(Verdict::retry(), reason()).await;
    let unsettled = settled.unwrap_err();
    assert!(unsettled.is_moot());
    let error = unsettled.error;
    assert!(matches!(error, DeliveryError::NotConfirmed), "{error:?}");
    // The channel lives, and it had not kept its place.
    let one = next(&mut jobs).await;
    assert_eq!(
        (one.as_ref(), one.tag().redelivered()),
        (&b"one"[..], Some(true))
    );
    settle(two, Verdict::Ack).await.unwrap();
    let three = next(&mut jobs).await.tag();
    // There is room now.
    settle(one.tag(), Verdict::retry()).await.unwrap();
    settle(three, Verdict::Ack).await.unwrap();
    let one = next(&mut jobs).await;
    assert_eq!(
        (one.as_ref(), one.tag().deliveries()),
        (&b"one"[..], Some(2))
    );
    settle(one.tag(), Verdict::Ack).await.unwrap();
    scene.assert_empty(jobs).await;
}
