//! Servers that are killed, silent or in trouble, and groups that are gone.

use std::{collections::HashMap, future::poll_fn, pin::Pin, time::Duration};

use futures_util::StreamExt;
use tokio::time::{sleep, timeout};
use tower_sentinel::{
    Job, Verdict,
    broker::redis::{
        DeliveryError, SubscriptionError,
        redis::{Commands, cmd},
    },
    consumer::Subscription,
    settle::{Settle, Unsettled},
};

use super::{
    STREAM, add, close, count, dead, delayed, group, next, pending, reason, server::Server,
    set_maxmemory, settle,
};

// === Closing and losing ===

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
