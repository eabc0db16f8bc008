//! Leases: kept, lost and over.

use std::{collections::HashMap, pin::pin, time::Duration};

use futures_util::{FutureExt, StreamExt};
use tokio::time::{sleep, timeout};
use tower::{Service, ServiceBuilder, ServiceExt};
use tower_sentinel::{
    Job, SentinelLayer, SettlePolicy, Verdict, ack_on_success,
    broker::redis::{
        Deliveries, Delivery, DeliveryError,
        redis::{Commands, Value, cmd},
    },
    consumer::Subscription,
    settle::{Lease, Settle},
};

use super::{
    GROUP, STREAM, add, asking, close, count, dead, delayed, group, is_quiet, next, pending,
    server::Server, settle, steal,
};

#[tokio::test]
async fn a_probe_counts_entries_that_are_due_and_not_those_that_are_not() {
    let server = Server::start();
    let mut inspect = server.inspect();
    let id = add(&mut inspect, "one");
    let mut deliveries = group().prefetch(1).connect(server.url()).await.unwrap();
    let _held = next(&mut deliveries).await;
    let mut waiting = async |score: f64| {
        let () = inspect
            .zadd(group().delayed_key(), format!("{id}:1"), score)
            .unwrap();
        deliveries.probe().unwrap().await.unwrap().waiting
    };
    assert_eq!(waiting(1e15).await, Some(0));
    assert_eq!(waiting(1.0).await, Some(1));
}

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
    // Other consumers look for idle entries.
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

#[tokio::test]
async fn an_earlier_delivery_to_the_same_consumer_settles_nothing() {
    let server = Server::start();
    let mut inspect = server.inspect();
    add(&mut inspect, "one");
    let group = group().min_idle(Duration::from_secs(2));
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
    let group = group().min_idle(Duration::from_secs(2));
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
    let group = group().prefetch(1).min_idle(Duration::from_secs(2));
    let mut paused = group.connect(server.url()).await.unwrap();
    while pending(&mut server.inspect()) < 1 {
        sleep(Duration::from_millis(10)).await;
    }
    sleep(Duration::from_millis(2_100)).await;
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
