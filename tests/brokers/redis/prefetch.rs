//! The prefetch.

use std::time::Duration;

use tokio::time::sleep;
use tower_sentinel::{Verdict, broker::redis::redis::Connection};

use super::{add, dead, group, is_quiet, next, pending, server::Server, settle};

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
