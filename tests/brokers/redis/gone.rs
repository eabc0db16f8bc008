//! Settlements that the server no longer waits for.

use std::io;

use futures_util::future::join_all;
use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
use tower_sentinel::{
    Job, SentinelLayer, SettlePolicy, Verdict, ack_on_success,
    broker::redis::redis::{Commands, cmd},
    consumer::{Escalate, Escalation},
    settle::Settle,
};

use super::{GROUP, STREAM, add, asking, group, next, pending, reason, server::Server, steal};

#[tokio::test]
async fn an_entry_that_was_trimmed_costs_its_channel_nothing() {
    let server = Server::start();
    let mut inspect = server.inspect();
    add(&mut inspect, "one");
    let mut deliveries = group().connect(server.url()).await.unwrap();
    let delivery = next(&mut deliveries).await;
    let () = cmd("XTRIM")
        .arg(STREAM)
        .arg("MAXLEN")
        .arg(0)
        .query(&mut inspect)
        .unwrap();
    let mut worker = ServiceBuilder::new()
        .layer(SentinelLayer::new(SettlePolicy::new(ack_on_success())))
        .service(service_fn(|_| async {
            Err::<(), _>(io::Error::other("bad"))
        }));
    let failed = worker
        .ready()
        .await
        .unwrap()
        .call(delivery)
        .await
        .unwrap_err();
    assert_eq!(pending(&mut inspect), 0);
    assert_ne!(failed.escalation(), Escalation::Channel, "{failed}");
}

#[tokio::test]
async fn what_another_consumer_has_or_has_acked_is_moot() {
    for (asks, verdict) in [
        (true, Verdict::Ack),
        (false, Verdict::Ack),
        (true, Verdict::retry()),
        (true, Verdict::release()),
        (true, Verdict::Reject),
    ] {
        let server = Server::start();
        let mut inspect = server.inspect();
        let id = add(&mut inspect, "one");
        let group = if asks { asking() } else { group() };
        let mut deliveries = group.prefetch(1).connect(server.url()).await.unwrap();
        let delivery = next(&mut deliveries).await;
        match asks {
            true => steal(&mut inspect, &id),
            false => drop(
                inspect
                    .xack::<_, _, _, usize>(STREAM, GROUP, &[&id])
                    .unwrap(),
            ),
        }
        let unsettled = delivery.tag().settle(verdict, reason()).await.unwrap_err();
        assert!(unsettled.is_moot(), "{verdict}: {unsettled}");
        // Its place is free.
        add(&mut inspect, "two");
        assert_eq!(next(&mut deliveries).await.as_ref(), b"two");
    }
}

#[tokio::test]
async fn early_acks_of_which_some_were_lost_are_moot() {
    let server = Server::start();
    let mut inspect = server.inspect();
    add(&mut inspect, "one");
    add(&mut inspect, "two");
    let mut deliveries = group().connect(server.url()).await.unwrap();
    let held = [next(&mut deliveries).await, next(&mut deliveries).await];
    let () = inspect.xack(STREAM, GROUP, &[held[0].id()]).unwrap();
    let acks = held
        .each_ref()
        .map(|delivery| delivery.tag().settle(Verdict::Ack, reason()));
    for answer in join_all(acks).await {
        let unsettled = answer.unwrap_err();
        assert!(unsettled.is_moot(), "{unsettled}");
    }
    assert_eq!(pending(&mut inspect), 0);
}
