//! Redis Streams, on a private server for each test.

mod acks;
mod conformance;
mod gone;
mod idle;
mod keys;
mod kills;
mod large;
mod newer;
mod rights;
pub(crate) mod server;

use std::{
    collections::HashMap,
    future::poll_fn,
    pin::{Pin, pin},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use futures_util::{FutureExt, StreamExt};
use tokio::time::{Instant, sleep, timeout};
use tower::{Service, ServiceBuilder, ServiceExt};
use tower_sentinel::{
    Job, SentinelLayer, SettlePolicy, Verdict, ack_on_success,
    broker::redis::{
        ConnectError, ConsumerGroup, Deliveries, Delivery, DeliveryError, SubscriptionError,
        redis::{Commands, Connection, Value, cmd},
    },
    consumer::Subscription,
    outcome::OutcomeKind,
    settle::{Lease, Messaging, Reason, Settle, Unsettled},
};

use self::server::{Server, free_port};

const STREAM: &str = "jobs";
const GROUP: &str = "workers";

fn group() -> ConsumerGroup {
    ConsumerGroup::new(STREAM, GROUP)
        .prefetch(5)
        .poll_interval(Duration::from_millis(20))
}

/// The same with acks that all ask whose the entry is, since their answers may come after others
/// may take it.
fn asking() -> ConsumerGroup {
    group().response_timeout(Duration::from_secs(60))
}

fn add(connection: &mut Connection, payload: &str) -> String {
    connection
        .xadd(STREAM, "*", &[("payload", payload), ("colour", "red")])
        .unwrap()
}

/// Returns how many entries are pending for the group.
fn pending(connection: &mut Connection) -> usize {
    let summary: (usize, Value, Value, Value) = cmd("XPENDING")
        .arg(STREAM)
        .arg(GROUP)
        .query(connection)
        .unwrap();
    summary.0
}

fn delayed(connection: &mut Connection) -> usize {
    connection.zcard(group().delayed_key()).unwrap()
}

type Fields = HashMap<String, String>;

fn dead(connection: &mut Connection) -> Vec<Fields> {
    let key = group().dead_letter_key().unwrap().to_owned();
    let entries: Vec<(String, Fields)> = cmd("XRANGE")
        .arg(key)
        .arg("-")
        .arg("+")
        .query(connection)
        .unwrap();
    entries.into_iter().map(|(_, fields)| fields).collect()
}

async fn next(deliveries: &mut Deliveries) -> Delivery {
    let next = timeout(Duration::from_secs(10), deliveries.next()).await;
    next.expect("nothing is delivered").unwrap().unwrap()
}

/// Returns whether nothing is delivered for a while.
async fn is_quiet(deliveries: &mut Deliveries, millis: u64) -> bool {
    timeout(Duration::from_millis(millis), deliveries.next())
        .await
        .is_err()
}

async fn stop(deliveries: &mut Deliveries) {
    let stopping = poll_fn(|cx| Pin::new(&mut *deliveries).poll_stop(cx));
    timeout(Duration::from_secs(10), stopping).await.unwrap();
}

async fn close(deliveries: &mut Deliveries) {
    let closing = poll_fn(|cx| Pin::new(&mut *deliveries).poll_close(cx));
    timeout(Duration::from_secs(10), closing).await.unwrap();
}

fn reason() -> Reason {
    let mut reason = Reason::completed(Duration::ZERO);
    reason.kind = OutcomeKind::Panicked;
    reason.message = Some("index 7".to_owned());
    reason
}

async fn settle(delivery: &Delivery, verdict: Verdict) -> Result<(), DeliveryError> {
    let settled = delivery.tag().settle(verdict, reason()).await;
    settled.map_err(|unsettled| unsettled.error)
}

fn count(delivery: &Delivery) -> u32 {
    delivery.tag().deliveries().unwrap()
}

// === Verdicts ===

#[tokio::test]
async fn an_entry_has_its_payload_and_all_fields() {
    let server = Server::start();
    let id = add(&mut server.inspect(), "one");
    let mut deliveries = group().connect(server.url()).await.unwrap();
    let delivery = next(&mut deliveries).await;
    assert_eq!(delivery.id(), id);
    assert_eq!(delivery.as_ref(), b"one");
    assert_eq!(delivery.field("colour"), Some(&b"red"[..]));
    let fields: Vec<_> = delivery.fields().collect();
    assert_eq!(
        fields,
        [(&b"payload"[..], &b"one"[..]), (b"colour", b"red")]
    );
    assert_eq!(count(&delivery), 1);
    assert_eq!(delivery.tag().redelivered(), Some(false));
}

#[tokio::test]
async fn an_entry_without_the_payload_field_is_a_job_all_the_same() {
    let server = Server::start();
    let mut inspect = server.inspect();
    let name: &[u8] = &[0xff, 0xfe];
    let () = inspect.xadd(STREAM, "*", &[(name, "odd")]).unwrap();
    let mut deliveries = group().connect(server.url()).await.unwrap();
    let delivery = next(&mut deliveries).await;
    assert_eq!(delivery.payload(), None);
    assert_eq!(delivery.as_ref(), b"");
    assert_eq!(delivery.field(name), Some(&b"odd"[..]));
    settle(&delivery, Verdict::Reject).await.unwrap();
    assert_eq!(pending(&mut inspect), 0);
}

#[tokio::test]
async fn ack_removes_the_entry_from_the_pending_list() {
    let server = Server::start();
    let mut inspect = server.inspect();
    add(&mut inspect, "one");
    let mut deliveries = group().connect(server.url()).await.unwrap();
    let delivery = next(&mut deliveries).await;
    assert_eq!(pending(&mut inspect), 1);
    settle(&delivery, Verdict::Ack).await.unwrap();
    assert_eq!(pending(&mut inspect), 0);
    assert_eq!(delayed(&mut inspect), 0);
    let kept: usize = inspect.xlen(STREAM).unwrap();
    assert_eq!(kept, 1, "another group may want it");
    assert!(is_quiet(&mut deliveries, 200).await);
}

#[tokio::test]
async fn settled_entries_are_deleted_if_so_asked() {
    let server = Server::start();
    let mut inspect = server.inspect();
    for payload in ["one", "two"] {
        add(&mut inspect, payload);
    }
    let group = group().delete_settled();
    let mut deliveries = group.connect(server.url()).await.unwrap();
    settle(&next(&mut deliveries).await, Verdict::Ack)
        .await
        .unwrap();
    settle(&next(&mut deliveries).await, Verdict::Reject)
        .await
        .unwrap();
    let left: usize = inspect.xlen(STREAM).unwrap();
    assert_eq!(left, 0);
    assert_eq!(dead(&mut inspect).len(), 1);
}

#[tokio::test]
async fn retry_delivers_again_and_counts() {
    let server = Server::start();
    let id = add(&mut server.inspect(), "one");
    let mut deliveries = group().connect(server.url()).await.unwrap();
    for expected in 1..=3 {
        let delivery = next(&mut deliveries).await;
        assert_eq!((delivery.id(), delivery.as_ref()), (&*id, &b"one"[..]));
        assert_eq!(count(&delivery), expected);
        assert_eq!(delivery.tag().redelivered(), Some(expected > 1));
        settle(&delivery, Verdict::retry()).await.unwrap();
    }
}

#[tokio::test]
async fn release_delivers_again_and_does_not_count() {
    let server = Server::start();
    add(&mut server.inspect(), "one");
    let mut deliveries = group().connect(server.url()).await.unwrap();
    let later = Verdict::release_after(Duration::from_millis(100));
    for verdict in [Verdict::release(), later, later, Verdict::retry()] {
        let delivery = next(&mut deliveries).await;
        assert!(delivery.tag().capabilities().release_is_free());
        assert_eq!(count(&delivery), 1);
        settle(&delivery, verdict).await.unwrap();
    }
    let delivery = next(&mut deliveries).await;
    assert_eq!(count(&delivery), 2);
    settle(&delivery, Verdict::release()).await.unwrap();
    assert_eq!(count(&next(&mut deliveries).await), 2);
}

#[tokio::test]
async fn a_released_entry_goes_to_another_consumer_at_once() {
    let server = Server::start();
    add(&mut server.inspect(), "one");
    let mut first = group().connect(server.url()).await.unwrap();
    let delivery = next(&mut first).await;
    let mut second = group().connect(server.url()).await.unwrap();
    // The first has no place for it.
    let mut inspect = server.inspect();
    for _ in 0..4 {
        add(&mut inspect, "more");
    }
    let mut held = Vec::new();
    while held.len() < 4 {
        match timeout(Duration::from_millis(50), first.next()).await {
            Ok(more) => held.push(more.unwrap().unwrap()),
            Err(_) => break,
        }
    }
    settle(&delivery, Verdict::release()).await.unwrap();
    let began = Instant::now();
    let merged = futures_util::stream::select(&mut first, &mut second);
    let again = merged.filter(|next| {
        let found = next.as_ref().is_ok_and(|next| next.as_ref() == b"one");
        std::future::ready(found)
    });
    let again = timeout(Duration::from_secs(10), Box::pin(again).next()).await;
    assert_eq!(count(&again.unwrap().unwrap().unwrap()), 1);
    assert!(
        began.elapsed() < Duration::from_secs(2),
        "{:?}",
        began.elapsed()
    );
}

#[tokio::test]
async fn a_delayed_retry_is_not_seen_before_its_time() {
    let server = Server::start();
    let mut inspect = server.inspect();
    add(&mut inspect, "one");
    let mut deliveries = group()
        .min_idle(Duration::from_millis(600))
        .connect(server.url())
        .await
        .unwrap();
    let delivery = next(&mut deliveries).await;
    let delay = Duration::from_millis(1_400);
    let began = Instant::now();
    settle(&delivery, Verdict::retry_after(delay))
        .await
        .unwrap();
    assert_eq!(delayed(&mut inspect), 1);
    assert_eq!(pending(&mut inspect), 0);
    let again = next(&mut deliveries).await;
    let waited = began.elapsed();
    assert!(waited >= delay, "{waited:?}");
    assert!(waited < delay + Duration::from_secs(1), "{waited:?}");
    assert_eq!(count(&again), 2);
    assert_eq!(again.as_ref(), b"one");
    assert_eq!(delayed(&mut inspect), 0);
}

#[tokio::test]
async fn a_delay_without_an_end_is_carried_out() {
    let server = Server::start();
    let mut inspect = server.inspect();
    add(&mut inspect, "one");
    let mut deliveries = group().connect(server.url()).await.unwrap();
    let delivery = next(&mut deliveries).await;
    settle(&delivery, Verdict::retry_after(Duration::MAX))
        .await
        .unwrap();
    assert!(is_quiet(&mut deliveries, 200).await);
    assert_eq!(delayed(&mut inspect), 1);
}

#[tokio::test]
async fn a_dead_letter_keeps_its_fields_and_tells_why() {
    let server = Server::start();
    let mut inspect = server.inspect();
    let id = add(&mut inspect, "one");
    let mut deliveries = group().connect(server.url()).await.unwrap();
    settle(&next(&mut deliveries).await, Verdict::retry())
        .await
        .unwrap();
    let delivery = next(&mut deliveries).await;
    assert!(delivery.tag().capabilities().has_dead_letter());
    settle(&delivery, Verdict::Reject).await.unwrap();
    assert_eq!(pending(&mut inspect), 0);

    let [letter] = dead(&mut inspect).try_into().unwrap();
    let time: u64 = letter["x-outcome-time"].parse().unwrap();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let age = now.as_millis().abs_diff(u128::from(time));
    assert!(age < 10_000, "{age} ms");
    let mut letter: Vec<_> = letter.into_iter().collect();
    letter.retain(|(name, _)| name != "x-outcome-time");
    letter.sort();
    let expected = [
        ("colour", "red"),
        ("payload", "one"),
        ("x-deliveries", "2"),
        ("x-entry-id", &*id),
        ("x-outcome-kind", "panicked"),
        ("x-outcome-message", "index 7"),
    ];
    assert_eq!(letter, expected.map(|(k, v)| (k.to_owned(), v.to_owned())));
    assert!(is_quiet(&mut deliveries, 200).await);
}

#[tokio::test]
async fn without_dead_letters_a_rejected_entry_is_dropped() {
    let server = Server::start();
    let mut inspect = server.inspect();
    add(&mut inspect, "one");
    let group = group().no_dead_letter();
    let mut deliveries = group.connect(server.url()).await.unwrap();
    let delivery = next(&mut deliveries).await;
    assert!(!delivery.tag().capabilities().has_dead_letter());
    settle(&delivery, Verdict::Reject).await.unwrap();
    assert_eq!(pending(&mut inspect), 0);
    assert_eq!(dead(&mut inspect).len(), 0);
}

#[tokio::test]
async fn abandon_sends_nothing_and_frees_the_place() {
    let server = Server::start();
    let mut inspect = server.inspect();
    for payload in ["one", "two"] {
        add(&mut inspect, payload);
    }
    let group = group().prefetch(1);
    let mut deliveries = group.connect(server.url()).await.unwrap();
    let one = next(&mut deliveries).await;
    assert!(is_quiet(&mut deliveries, 200).await);
    settle(&one, Verdict::Abandon).await.unwrap();
    assert_eq!(next(&mut deliveries).await.as_ref(), b"two");
    assert_eq!(pending(&mut inspect), 2);
}

#[tokio::test]
async fn a_second_settlement_is_refused_locally() {
    let server = Server::start();
    let mut inspect = server.inspect();
    add(&mut inspect, "one");
    let mut deliveries = group().connect(server.url()).await.unwrap();
    let delivery = next(&mut deliveries).await;
    settle(&delivery, Verdict::Ack).await.unwrap();
    let before = calls(&mut inspect);
    let Unsettled { tag, error, .. } = delivery
        .tag()
        .settle(Verdict::retry(), reason())
        .await
        .unwrap_err();
    assert!(tag.is_none());
    assert!(matches!(error, DeliveryError::AlreadySettled), "{error}");
    assert_eq!(calls(&mut inspect), before);
    assert_eq!(delayed(&mut inspect), 0);
}

/// Returns how many commands were sent that ack.
fn calls(connection: &mut Connection) -> u64 {
    calls_of(connection, "xack")
}

/// Forgets what was counted, such as what a connect tries.
fn forget_calls(connection: &mut Connection) {
    let () = cmd("CONFIG").arg("RESETSTAT").query(connection).unwrap();
}

/// Returns how often the server ran a command, in scripts or by itself.
fn calls_of(connection: &mut Connection, command: &str) -> u64 {
    let info: String = cmd("INFO").arg("commandstats").query(connection).unwrap();
    let calls = info.lines().find_map(|line| {
        let stats = line.strip_prefix("cmdstat_")?.strip_prefix(command)?;
        let calls = stats.strip_prefix(":calls=")?;
        calls.split(',').next()?.parse().ok()
    });
    calls.unwrap_or(0)
}

#[tokio::test]
async fn another_group_sees_each_entry_once() {
    let server = Server::start();
    add(&mut server.inspect(), "one");
    let mut first = group().connect(server.url()).await.unwrap();
    settle(&next(&mut first).await, Verdict::retry())
        .await
        .unwrap();
    settle(&next(&mut first).await, Verdict::release())
        .await
        .unwrap();
    settle(&next(&mut first).await, Verdict::Ack).await.unwrap();
    let other = ConsumerGroup::new(STREAM, "others");
    let mut second = other.connect(server.url()).await.unwrap();
    let delivery = next(&mut second).await;
    assert_eq!((delivery.as_ref(), count(&delivery)), (&b"one"[..], 1));
    assert!(is_quiet(&mut second, 300).await);
}

// === What traces say of it ===

const TRACEPARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

#[tokio::test]
async fn a_tag_says_its_stream_the_id_of_the_entry_and_the_trace_of_its_sender() {
    let server = Server::start();
    let mut connection = server.inspect();
    let without = add(&mut connection, "one");
    let fields = [
        ("payload", &b"two"[..]),
        ("traceparent", TRACEPARENT.as_bytes()),
        ("tracestate", b"\xff"),
    ];
    let with: String = connection.xadd(STREAM, "*", &fields).unwrap();
    let mut deliveries = group().connect(server.url()).await.unwrap();

    let delivery = next(&mut deliveries).await;
    let expected = Messaging::new("redis", STREAM).message_id(without);
    assert_eq!(delivery.tag().messaging(), Some(expected));

    let delivery = next(&mut deliveries).await;
    let expected = Messaging::new("redis", STREAM)
        .message_id(with)
        .traceparent(Some(TRACEPARENT));
    assert_eq!(delivery.tag().messaging(), Some(expected));
    assert_eq!(delivery.payload(), Some(&b"two"[..]));
}

// === Prefetch ===

#[tokio::test]
async fn the_prefetch_is_that_of_the_other_brokers() {
    let server = Server::start();
    let group = ConsumerGroup::new(STREAM, GROUP);
    let deliveries = group.connect(server.url()).await.unwrap();
    assert_eq!(deliveries.prefetch(), 64);
}

#[tokio::test]
async fn no_more_than_the_prefetch_is_unanswered() {
    let server = Server::start();
    let mut inspect = server.inspect();
    for payload in 0..20 {
        add(&mut inspect, &payload.to_string());
    }
    let mut deliveries = group().connect(server.url()).await.unwrap();
    let mut held = Vec::new();
    for _ in 0..5 {
        held.push(next(&mut deliveries).await);
    }
    assert!(is_quiet(&mut deliveries, 200).await);
    assert_eq!(pending(&mut inspect), 5);
    let verdicts = [
        Verdict::Ack,
        Verdict::Reject,
        Verdict::retry(),
        Verdict::release(),
    ];
    for round in 0..40 {
        let verdict = verdicts[round % 4];
        settle(&held.swap_remove(round * 7 % 5), verdict)
            .await
            .unwrap();
        held.push(next(&mut deliveries).await);
        let pending = pending(&mut inspect);
        assert!(pending <= 5, "{pending} after {round}");
        if inspect_is_done(&mut inspect) {
            break;
        }
    }
}

fn inspect_is_done(connection: &mut Connection) -> bool {
    dead(connection).len() >= 5
}

#[tokio::test]
async fn new_entries_are_read_though_others_come_back_for_ever() {
    let server = Server::start();
    let mut inspect = server.inspect();
    add(&mut inspect, "bad");
    let group = group().prefetch(1);
    let mut deliveries = group.connect(server.url()).await.unwrap();
    let bad = next(&mut deliveries).await;
    add(&mut inspect, "good");
    // From now on there is something of both kinds whenever the reader looks.
    sleep(Duration::from_millis(100)).await;
    settle(&bad, Verdict::retry()).await.unwrap();
    for _ in 0..10 {
        let delivery = next(&mut deliveries).await;
        if delivery.as_ref() == b"good" {
            return;
        }
        settle(&delivery, Verdict::retry()).await.unwrap();
    }
    panic!("the new entry is never read");
}

// === Leases ===

#[tokio::test]
async fn keep_alive_holds_an_entry_past_the_idle_time() {
    let server = Server::start();
    add(&mut server.inspect(), "one");
    let group = group().min_idle(Duration::from_secs(1));
    let mut first = group.connect(server.url()).await.unwrap();
    let mut second = group.connect(server.url()).await.unwrap();
    let both = |first: &mut Deliveries, second: &mut Deliveries| {
        first.next().now_or_never().is_none() && second.next().now_or_never().is_none()
    };
    let merged = futures_util::stream::select(&mut first, &mut second)
        .next()
        .await;
    let delivery = merged.unwrap().unwrap();
    for _ in 0..15 {
        sleep(Duration::from_millis(200)).await;
        assert_eq!(delivery.tag().keep_alive().await.unwrap(), Lease::Held);
        assert!(both(&mut first, &mut second));
    }
    assert_eq!(count(&delivery), 1);
    settle(&delivery, Verdict::Ack).await.unwrap();
}

#[tokio::test]
async fn a_job_that_passes_the_default_limit_is_settled_before_others_take_it() {
    let server = Server::start();
    add(&mut server.inspect(), "one");
    let group = group().min_idle(Duration::from_secs(3));
    let mut mine = group.connect(server.url()).await.unwrap();
    let mut worker = ServiceBuilder::new()
        .layer(SentinelLayer::new(SettlePolicy::new(ack_on_success())))
        .service_fn(|_: Delivery| std::future::pending::<Result<(), DeliveryError>>());
    let delivery = next(&mut mine).await;
    assert_eq!(delivery.lease(), Some(Duration::from_secs(3)));
    // Others look for what is idle.
    let mut others = group.connect(server.url()).await.unwrap();
    let settled = worker.ready().await.unwrap().call(delivery).await.unwrap();
    assert_eq!(settled.verdict, Verdict::retry());
    let both = futures_util::stream::select(&mut mine, &mut others);
    let next = timeout(Duration::from_secs(10), pin!(both).next()).await;
    let delivery = next.expect("a second delivery").unwrap().unwrap();
    assert_eq!(count(&delivery), 2);
    settle(&delivery, Verdict::Ack).await.unwrap();
}

#[tokio::test]
async fn a_lease_that_was_lost_is_told_and_settles_nothing() {
    let server = Server::start();
    let mut inspect = server.inspect();
    let id = add(&mut inspect, "one");
    let mut deliveries = asking().connect(server.url()).await.unwrap();
    let delivery = next(&mut deliveries).await;
    steal(&mut inspect, &id);
    assert_eq!(delivery.tag().keep_alive().await.unwrap(), Lease::Lost);
    for verdict in [
        Verdict::Ack,
        Verdict::retry(),
        Verdict::release(),
        Verdict::Reject,
    ] {
        let id = add(&mut inspect, "more");
        let delivery = next(&mut deliveries).await;
        steal(&mut inspect, &id);
        let error = settle(&delivery, verdict).await.unwrap_err();
        assert!(matches!(error, DeliveryError::Lost), "{verdict}: {error}");
    }
    assert_eq!(pending(&mut inspect), 5);
    assert_eq!(delayed(&mut inspect), 0);
    assert_eq!(dead(&mut inspect).len(), 0);
}

/// Gives the entry to another consumer. Its count stays, so that the owner alone tells.
fn steal(connection: &mut Connection, id: &str) {
    let _: Value = cmd("XCLAIM")
        .arg(STREAM)
        .arg(GROUP)
        .arg("thief")
        .arg(0)
        .arg(id)
        .arg("JUSTID")
        .query(connection)
        .unwrap();
}

#[tokio::test]
async fn an_earlier_delivery_to_the_same_consumer_settles_nothing() {
    let server = Server::start();
    let mut inspect = server.inspect();
    add(&mut inspect, "one");
    let group = group().min_idle(Duration::from_millis(600));
    let mut deliveries = group.connect(server.url()).await.unwrap();
    let first = next(&mut deliveries).await;
    let again = next(&mut deliveries).await;
    assert_eq!((again.id(), count(&again)), (first.id(), 2));
    assert_eq!(first.tag().keep_alive().await.unwrap(), Lease::Lost);
    let error = settle(&first, Verdict::Ack).await.unwrap_err();
    assert!(matches!(error, DeliveryError::Lost), "{error}");
    assert_eq!(pending(&mut inspect), 1);
    settle(&again, Verdict::Ack).await.unwrap();
    assert_eq!(pending(&mut inspect), 0);
}

#[tokio::test]
async fn what_a_dead_consumer_left_is_reclaimed_with_its_count_raised() {
    let server = Server::start();
    let mut inspect = server.inspect();
    let ids: Vec<_> = (0..12).map(|n| add(&mut inspect, &n.to_string())).collect();
    let () = inspect.xgroup_create(STREAM, GROUP, "0").unwrap();
    // A consumer that read and was never heard of again.
    let _: Value = cmd("XREADGROUP")
        .arg("GROUP")
        .arg(GROUP)
        .arg("dead")
        .arg("STREAMS")
        .arg(STREAM)
        .arg(">")
        .query(&mut inspect)
        .unwrap();
    let group = group().min_idle(Duration::from_millis(700));
    let mut deliveries = group.connect(server.url()).await.unwrap();
    let mut seen = HashMap::new();
    while seen.len() < ids.len() {
        let delivery = next(&mut deliveries).await;
        seen.insert(delivery.id().to_owned(), count(&delivery));
        settle(&delivery, Verdict::Ack).await.unwrap();
    }
    for id in &ids {
        assert_eq!(seen[id], 2, "{id}");
    }
    assert_eq!(pending(&mut inspect), 0);
}

#[tokio::test]
async fn an_entry_that_waited_too_long_is_not_handed_out() {
    let server = Server::start();
    add(&mut server.inspect(), "one");
    let group = group().prefetch(1).min_idle(Duration::from_millis(700));
    let mut paused = group.connect(server.url()).await.unwrap();
    while pending(&mut server.inspect()) < 1 {
        sleep(Duration::from_millis(10)).await;
    }
    sleep(Duration::from_millis(800)).await;
    let mut other = group.connect(server.url()).await.unwrap();
    let delivery = next(&mut other).await;
    assert_eq!(count(&delivery), 2);
    settle(&delivery, Verdict::Ack).await.unwrap();
    assert!(is_quiet(&mut paused, 300).await);
    // Its place is free again.
    close(&mut other).await;
    add(&mut server.inspect(), "two");
    assert_eq!(next(&mut paused).await.as_ref(), b"two");
}

// === Closing and losing ===

#[tokio::test]
async fn close_gives_back_what_was_not_answered() {
    let server = Server::start();
    let mut inspect = server.inspect();
    let ids: Vec<_> = (0..5).map(|n| add(&mut inspect, &n.to_string())).collect();
    let mut first = group().connect(server.url()).await.unwrap();
    let taken = next(&mut first).await;
    let tag = taken.tag();
    while pending(&mut inspect) < 5 {
        sleep(Duration::from_millis(10)).await;
    }
    close(&mut first).await;
    assert!(first.next().await.is_none());
    let closed = poll_fn(|cx| Pin::new(&mut first).poll_closed(cx)).await;
    assert!(closed.is_ok());
    assert_eq!(pending(&mut inspect), 0);
    let consumers: Vec<Value> = cmd("XINFO")
        .arg("CONSUMERS")
        .arg(STREAM)
        .arg(GROUP)
        .query(&mut inspect)
        .unwrap();
    assert!(consumers.is_empty(), "{consumers:?}");

    let unsettled = tag.settle(Verdict::Ack, reason()).await.unwrap_err();
    assert!(matches!(unsettled.error, DeliveryError::Stale));
    let mut second = group().connect(server.url()).await.unwrap();
    let mut counts = HashMap::new();
    for _ in 0..5 {
        let delivery = next(&mut second).await;
        counts.insert(delivery.id().to_owned(), count(&delivery));
    }
    for id in &ids {
        let expected = if *id == taken.id() { 2 } else { 1 };
        assert_eq!(counts[id], expected, "{id}");
    }
}

#[tokio::test]
async fn a_stopped_subscription_reads_nothing_more_and_its_tags_are_valid() {
    let server = Server::start();
    let mut inspect = server.inspect();
    for payload in ["one", "two", "three"] {
        add(&mut inspect, payload);
    }
    let mut stopped = group().connect(server.url()).await.unwrap();
    let (one, two) = (next(&mut stopped).await, next(&mut stopped).await);
    while pending(&mut inspect) < 3 {
        sleep(Duration::from_millis(10)).await;
    }
    stop(&mut stopped).await;
    stop(&mut stopped).await;
    // It makes room, where there is some already. A read that was under way may bring one entry.
    settle(&one, Verdict::release()).await.unwrap();
    for n in 0..20 {
        add(&mut inspect, &n.to_string());
        sleep(Duration::from_millis(5)).await;
    }
    assert!(is_quiet(&mut stopped, 100).await);
    assert_eq!(pending(&mut inspect), 1);

    let mut others = group().prefetch(50).connect(server.url()).await.unwrap();
    for _ in 0..22 {
        let delivery = next(&mut others).await;
        assert_eq!(count(&delivery), 1);
        settle(&delivery, Verdict::Ack).await.unwrap();
    }
    assert_eq!(two.tag().keep_alive().await.unwrap(), Lease::Held);
    settle(&two, Verdict::Ack).await.unwrap();
    close(&mut stopped).await;
    assert!(stopped.next().await.is_none());
    assert!(is_quiet(&mut others, 100).await);
    assert_eq!((pending(&mut inspect), delayed(&mut inspect)), (0, 0));
}

#[tokio::test]
async fn a_stop_that_had_no_time_leaves_the_rest_to_the_close() {
    let server = Server::start();
    let mut inspect = server.inspect();
    for payload in ["one", "two", "three"] {
        add(&mut inspect, payload);
    }
    let mut deliveries = group().connect(server.url()).await.unwrap();
    let one = next(&mut deliveries).await;
    while pending(&mut inspect) < 3 {
        sleep(Duration::from_millis(10)).await;
    }
    let begun = poll_fn(|cx| Pin::new(&mut deliveries).poll_stop(cx));
    assert!(begun.now_or_never().is_none());
    settle(&one, Verdict::Ack).await.unwrap();
    close(&mut deliveries).await;
    assert_eq!((pending(&mut inspect), delayed(&mut inspect)), (0, 2));
    let mut others = group().connect(server.url()).await.unwrap();
    for _ in 0..2 {
        assert_eq!(count(&next(&mut others).await), 1);
    }
}

#[tokio::test]
async fn a_dropped_subscription_gives_back_in_the_background() {
    let server = Server::start();
    add(&mut server.inspect(), "one");
    let mut first = group().connect(server.url()).await.unwrap();
    drop(next(&mut first).await);
    drop(first);
    let mut second = group().connect(server.url()).await.unwrap();
    assert_eq!(count(&next(&mut second).await), 2);
}

#[tokio::test]
async fn a_killed_server_is_noticed_though_nobody_polls_the_stream() {
    let mut server = Server::start();
    add(&mut server.inspect(), "one");
    let group = group().prefetch(1);
    let mut deliveries = group.connect(server.url()).await.unwrap();
    let delivery = next(&mut deliveries).await;
    sleep(Duration::from_millis(200)).await;
    server.kill();
    let closed = poll_fn(|cx| Pin::new(&mut deliveries).poll_closed(cx));
    // The next ping is later than that.
    let closed = timeout(Duration::from_millis(500), closed).await.unwrap();
    assert!(matches!(closed, Err(SubscriptionError::Disconnected(_))));
    let told = deliveries.next().await.unwrap().unwrap_err();
    assert!(matches!(told, SubscriptionError::Disconnected(_)), "{told}");
    assert!(deliveries.next().await.is_none());
    let unsettled = delivery.tag().settle(Verdict::Ack, reason()).await;
    let Unsettled { tag, error, .. } = unsettled.unwrap_err();
    assert!(tag.is_none());
    assert!(matches!(error, DeliveryError::Stale), "{error}");
    close(&mut deliveries).await;
}

#[tokio::test]
async fn a_killed_server_loses_nothing_and_a_stale_tag_is_refused() {
    let mut server = Server::start();
    let mut inspect = server.inspect();
    for payload in ["acked", "delayed", "held", "new"] {
        add(&mut inspect, payload);
    }
    let group = group().prefetch(3).min_idle(Duration::from_secs(1));
    let mut deliveries = group.connect(server.url()).await.unwrap();
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(next(&mut deliveries).await);
    }
    settle(&held[0], Verdict::Ack).await.unwrap();
    let delay = Verdict::retry_after(Duration::from_millis(50));
    settle(&held[1], delay).await.unwrap();
    server.kill();
    server.restart();

    let mut deliveries = group.connect(server.url()).await.unwrap();
    let mut counts = HashMap::new();
    while counts.len() < 3 {
        let delivery = next(&mut deliveries).await;
        let payload = String::from_utf8(delivery.as_ref().to_vec()).unwrap();
        counts.insert(payload, count(&delivery));
        let old = &held[2];
        if delivery.id() == old.id() {
            let error = settle(old, Verdict::Ack).await.unwrap_err();
            assert!(matches!(error, DeliveryError::Stale), "{error}");
        }
        settle(&delivery, Verdict::Ack).await.unwrap();
    }
    assert_eq!(counts["delayed"], 2);
    assert_eq!(counts["held"], 2);
    // It may have been read just before the kill.
    assert!(counts["new"] <= 2);
    assert_eq!(pending(&mut server.inspect()), 0);
}

#[tokio::test]
async fn a_group_that_is_gone_ends_the_stream() {
    let server = Server::start();
    let mut inspect = server.inspect();
    let mut deliveries = group().connect(server.url()).await.unwrap();
    let () = inspect.del(STREAM).unwrap();
    let ended = timeout(Duration::from_secs(5), deliveries.next()).await;
    let error = ended.unwrap().unwrap().unwrap_err();
    assert!(matches!(error, SubscriptionError::Refused(_)), "{error}");
}

// === Connecting ===

#[tokio::test]
async fn a_server_that_is_down_is_named() {
    let port = free_port();
    let url = format!("redis://user:hidden@127.0.0.1:{port}");
    let error = group().connect(url).await.unwrap_err();
    assert!(matches!(error, ConnectError::Unreachable { .. }), "{error}");
    let message = format!("{error:#}");
    let start = format!("redis at 127.0.0.1:{port} can't be reached: ");
    assert!(message.starts_with(&start), "{message}");
    assert!(
        !message.contains("hidden") && !message.contains('\n'),
        "{message}"
    );
}

#[tokio::test]
async fn wrong_credentials_are_told_and_not_repeated() {
    let server = Server::with(&["--requirepass", "secret"]);
    let address = server.host();
    for user in ["", ":wrong@"] {
        let url = format!("redis://{user}{address}");
        let error = group().connect(url).await.unwrap_err();
        assert!(matches!(error, ConnectError::Denied { .. }), "{error}");
        let message = format!("{error:#}");
        let start = format!("redis at {address} refuses the credentials: ");
        assert!(message.starts_with(&start), "{message}");
        assert!(
            !message.contains(":wrong") && !message.contains('\n'),
            "{message}"
        );
    }
    let url = format!("redis://:secret@{address}");
    assert!(group().connect(url).await.is_ok());
}

#[tokio::test]
async fn a_key_that_is_no_stream_is_told() {
    let server = Server::start();
    let () = server.inspect().set(STREAM, "text").unwrap();
    let error = group().connect(server.url()).await.unwrap_err();
    assert!(matches!(error, ConnectError::Group { .. }), "{error}");
    let error = group().connect("amqp://127.0.0.1").await.unwrap_err();
    assert!(matches!(error, ConnectError::InvalidAddress(_)), "{error}");
}

#[test]
fn keys_are_in_the_slot_of_their_stream() {
    for (stream, delayed) in [
        ("jobs", "{jobs}:workers:delayed"),
        ("{acme}:jobs", "{acme}:jobs:workers:delayed"),
    ] {
        let group = ConsumerGroup::new(stream, GROUP);
        assert_eq!(group.delayed_key(), delayed);
    }
}

// === Trouble on the server ===

#[tokio::test]
async fn a_settlement_that_the_server_refuses_as_a_whole_gives_its_tag_back() {
    let server = Server::start();
    let mut inspect = server.inspect();
    add(&mut inspect, "one");
    let mut deliveries = group().connect(server.url()).await.unwrap();
    let delivery = next(&mut deliveries).await;
    for verdict in [Verdict::retry(), Verdict::release(), Verdict::Reject] {
        set_maxmemory(&mut inspect, "1");
        let unsettled = delivery.tag().settle(verdict, reason()).await;
        set_maxmemory(&mut inspect, "0");
        let Unsettled { tag, error, .. } = unsettled.unwrap_err();
        assert!(tag.is_some(), "{verdict}: {error}");
        assert_eq!(pending(&mut inspect), 1, "{verdict}");
        assert_eq!(delayed(&mut inspect), 0, "{verdict}");
        assert_eq!(dead(&mut inspect).len(), 0, "{verdict}");
    }
    settle(&delivery, Verdict::retry()).await.unwrap();
    assert_eq!(count(&next(&mut deliveries).await), 2);
}

fn set_maxmemory(connection: &mut Connection, bytes: &str) {
    let () = cmd("CONFIG")
        .arg("SET")
        .arg("maxmemory")
        .arg(bytes)
        .query(connection)
        .unwrap();
}

#[tokio::test]
async fn a_server_that_falls_silent_is_noticed_though_nobody_polls_the_stream() {
    let server = Server::start();
    add(&mut server.inspect(), "one");
    let group = group()
        .prefetch(1)
        .response_timeout(Duration::from_millis(300));
    let mut deliveries = group.connect(server.url()).await.unwrap();
    let delivery = next(&mut deliveries).await;
    server.pause();
    let closed = poll_fn(|cx| Pin::new(&mut deliveries).poll_closed(cx));
    let closed = timeout(Duration::from_secs(5), closed).await.unwrap();
    assert!(matches!(closed, Err(SubscriptionError::Disconnected(_))));
    let unsettled = delivery.tag().settle(Verdict::Ack, reason()).await;
    let error = unsettled.unwrap_err().error;
    assert!(matches!(error, DeliveryError::Stale), "{error}");
}

#[tokio::test]
async fn an_entry_that_was_deleted_can_be_acked_and_not_given_back() {
    let server = Server::start();
    let mut inspect = server.inspect();
    let mut deliveries = group().connect(server.url()).await.unwrap();
    let verdicts = [
        (Verdict::Ack, true),
        (Verdict::retry(), false),
        (Verdict::release(), false),
        (Verdict::Reject, false),
    ];
    for (verdict, settles) in verdicts {
        let id = add(&mut inspect, "one");
        let delivery = next(&mut deliveries).await;
        let () = inspect.xdel(STREAM, &[&id]).unwrap();
        match settle(&delivery, verdict).await {
            Ok(()) => assert!(settles, "{verdict}"),
            Err(error) => {
                assert!(matches!(error, DeliveryError::Gone), "{error}");
                assert!(!settles, "{verdict}: {error}");
            }
        }
        assert_eq!(pending(&mut inspect), 0, "{verdict}");
    }
    assert_eq!(delayed(&mut inspect), 0);
    assert_eq!(dead(&mut inspect).len(), 0);
}

#[tokio::test]
async fn scripts_that_the_server_forgot_are_loaded_again() {
    let server = Server::start();
    let mut inspect = server.inspect();
    for payload in ["one", "two"] {
        add(&mut inspect, payload);
    }
    let mut deliveries = group().connect(server.url()).await.unwrap();
    settle(&next(&mut deliveries).await, Verdict::Ack)
        .await
        .unwrap();
    let () = cmd("SCRIPT").arg("FLUSH").query(&mut inspect).unwrap();
    settle(&next(&mut deliveries).await, Verdict::Ack)
        .await
        .unwrap();
    assert_eq!(pending(&mut inspect), 0);
}
