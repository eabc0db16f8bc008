//! Effects of each verdict on an entry.

use std::time::Duration;

use futures_util::StreamExt;
use tokio::time::{Instant, timeout};
use tower_sentinel::{
    Job, Verdict,
    broker::redis::{ConsumerGroup, DeliveryError, redis::Commands},
    settle::{Settle, Unsettled},
};

use super::{
    STREAM, add, calls, count, dead, delayed, group, is_quiet, next, pending, reason,
    server::Server, settle,
};

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
    let merged = futures_util::stream::select(&mut first, &mut second);
    let again = merged.filter(|next| {
        let found = next.as_ref().is_ok_and(|next| next.as_ref() == b"one");
        std::future::ready(found)
    });
    let again = timeout(Duration::from_secs(10), Box::pin(again).next()).await;
    assert_eq!(count(&again.unwrap().unwrap().unwrap()), 1);
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
