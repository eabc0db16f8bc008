//! Subscriptions that are stopped, closed and dropped.

use std::{collections::HashMap, future::poll_fn, pin::Pin, time::Duration};

use futures_util::{FutureExt, StreamExt};
use tokio::time::{sleep, timeout};
use tower_sentinel::{
    Job, Verdict,
    broker::redis::{
        Deliveries, DeliveryError,
        redis::{Value, cmd},
    },
    consumer::Subscription,
    settle::{Lease, Settle},
};

use super::{
    GROUP, STREAM, add, close, count, delayed, group, is_quiet, next, pending, reason,
    server::Server, settle,
};

async fn stop(deliveries: &mut Deliveries) {
    let stopping = poll_fn(|cx| Pin::new(&mut *deliveries).poll_stop(cx));
    timeout(Duration::from_secs(10), stopping).await.unwrap();
}

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
