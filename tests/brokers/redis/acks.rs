//! Acks that go to the server together.

use std::{pin::Pin, time::Duration};

use futures_util::{FutureExt, StreamExt, future::join_all};
use tokio::{runtime::Builder, time::timeout};
use tower_sentinel::{
    Job, Verdict,
    broker::redis::{
        ConsumerGroup, Deliveries, Delivery, DeliveryError, DeliveryTag, SubscriptionError,
        redis::{Commands, Connection, Value, cmd},
    },
    settle::{Lease, Settle, Unsettled},
};

use super::{
    GROUP, STREAM, add, asking, calls, calls_of, close, forget_calls, group, is_quiet, next,
    pending, reason, server::Server, steal,
};
use crate::proxy::Proxy;

type Answer = Result<(), Unsettled<DeliveryTag, DeliveryError>>;

/// Delivers `count` new entries, all that the group may have.
async fn deliver(
    server: &Server,
    group: ConsumerGroup,
    url: String,
    count: usize,
) -> (Deliveries, Vec<Delivery>) {
    let mut inspect = server.inspect();
    for n in 0..count {
        add(&mut inspect, &n.to_string());
    }
    let mut deliveries = group.prefetch(count).connect(url).await.unwrap();
    forget_calls(&mut inspect);
    let mut held = Vec::new();
    while held.len() < count {
        held.push(next(&mut deliveries).await);
    }
    (deliveries, held)
}

/// Acks all of them at the same time.
async fn ack_all<'a>(held: impl IntoIterator<Item = &'a Delivery>) -> Vec<Answer> {
    let acks = held
        .into_iter()
        .map(|delivery| delivery.tag().settle(Verdict::Ack, reason()));
    let answers = timeout(Duration::from_secs(10), join_all(acks)).await;
    answers.expect("an ack is not answered")
}

/// Counts the delivery once more, though the same consumer keeps it.
fn deliver_again(connection: &mut Connection, consumer: &str, id: &str) {
    let () = connection
        .xclaim(STREAM, GROUP, consumer, 0, &[id])
        .unwrap();
}

fn lengths(connection: &mut Connection) -> (usize, usize) {
    (pending(connection), connection.xlen(STREAM).unwrap())
}

#[tokio::test]
async fn acks_that_come_together_are_one_command_and_are_each_answered() {
    for (group, left) in [(asking(), 19), (asking().delete_settled(), 2)] {
        let server = Server::start();
        let mut inspect = server.inspect();
        let (deliveries, held) = deliver(&server, group, server.url(), 20).await;
        let ids: Vec<_> = held.iter().map(Delivery::id).collect();
        steal(&mut inspect, ids[3]);
        deliver_again(&mut inspect, deliveries.consumer(), ids[7]);
        let () = inspect.xdel(STREAM, &[ids[11]]).unwrap();

        let answers = ack_all(held.iter().rev()).await;
        for (n, answer) in answers.into_iter().rev().enumerate() {
            match answer {
                Ok(()) => assert!(![3, 7].contains(&n), "{n} is not ours"),
                Err(Unsettled { tag, error, .. }) => {
                    assert!([3, 7].contains(&n), "{n}: {error}");
                    assert!(matches!(error, DeliveryError::Lost), "{n}: {error}");
                    assert!(tag.is_none());
                }
            }
        }
        let together = calls(&mut inspect) == 1 || calls_of(&mut inspect, "xackdel") > 0;
        assert!(together);
        assert_eq!(lengths(&mut inspect), (2, left));
    }
}

#[tokio::test]
async fn acks_of_entries_that_stand_far_apart_are_each_answered() {
    let server = Server::start();
    let mut inspect = server.inspect();
    let (_deliveries, mut held) = deliver(&server, asking(), server.url(), 40).await;
    steal(&mut inspect, held[20].id());
    let apart = [0, 20, 30, 39];
    let answers = ack_all(apart.map(|n| &held[n])).await;
    let settled: Vec<_> = answers.iter().map(Result::is_ok).collect();
    assert_eq!(settled, [true, false, true, true]);
    assert_eq!(calls(&mut inspect), 1);
    assert_eq!(pending(&mut inspect), 37);

    for n in apart.into_iter().rev() {
        held.remove(n);
    }
    assert!(ack_all(&held).await.iter().all(Result::is_ok));
    assert_eq!(pending(&mut inspect), 1);
}

#[tokio::test]
async fn acks_before_others_may_take_the_entries_ask_nothing() {
    let server = Server::start();
    let mut inspect = server.inspect();
    let (_deliveries, held) = deliver(&server, group(), server.url(), 20).await;
    assert!(ack_all(&held).await.iter().all(Result::is_ok));
    assert_eq!(calls_of(&mut inspect, "xpending"), 0);
    assert_eq!(calls(&mut inspect), 1);
    assert_eq!(lengths(&mut inspect), (0, 20));
}

#[tokio::test]
async fn an_early_ack_asks_where_more_depends_on_it() {
    // Entries that are deleted, that are dropped, and that are known to belong to another consumer.
    for (group, verdict, is_known) in [
        (group().delete_settled(), Verdict::Ack, false),
        (group().no_dead_letter(), Verdict::Reject, false),
        (group(), Verdict::Ack, true),
    ] {
        let server = Server::start();
        let mut inspect = server.inspect();
        let (_deliveries, held) = deliver(&server, group, server.url(), 1).await;
        steal(&mut inspect, held[0].id());
        if is_known {
            assert_eq!(held[0].tag().keep_alive().await.unwrap(), Lease::Lost);
        }
        let settled = held[0].tag().settle(verdict, reason()).await;
        let Unsettled { tag, error, .. } = settled.unwrap_err();
        assert!(matches!(error, DeliveryError::Lost), "{verdict}: {error}");
        assert!(tag.is_none());
        assert_eq!(lengths(&mut inspect), (1, 1));
    }
}

#[tokio::test]
async fn an_ack_that_is_not_answered_in_time_ends_the_subscription() {
    let limit = Duration::from_millis(300);
    for group in [group(), group().min_idle(limit)] {
        let server = Server::start();
        let mut inspect = server.inspect();
        let group = group.response_timeout(limit);
        let (mut deliveries, held) = deliver(&server, group, server.url(), 1).await;
        // Writes have to wait; the reader only pings the connection.
        let _: Value = cmd("CLIENT")
            .arg("PAUSE")
            .arg(5_000)
            .arg("WRITE")
            .query(&mut inspect)
            .unwrap();
        let Unsettled { tag, error, .. } = ack_all(&held).await.remove(0).unwrap_err();
        assert!(matches!(error, DeliveryError::Command(_)), "{error}");
        assert!(tag.is_none(), "nobody knows whether it will be done");
        let ended = timeout(Duration::from_secs(2), deliveries.next()).await;
        let ended = ended.expect("its place would never be free");
        assert!(
            matches!(ended, Some(Err(SubscriptionError::Disconnected(_)))),
            "{ended:?}"
        );
    }
}

#[tokio::test]
async fn acks_ask_from_the_time_on_from_which_others_may_take_the_entries() {
    let early = Duration::from_secs(2);
    let limit = Duration::from_secs(5);
    let group = group().response_timeout(limit).min_idle(limit + early);
    let server = Server::start();
    let mut inspect = server.inspect();
    let (mut deliveries, mut held) = deliver(&server, group, server.url(), 6).await;
    let late = held.split_off(3);
    assert!(ack_all(&held).await.iter().all(Result::is_ok));
    assert_eq!(calls_of(&mut inspect, "xpending"), 0);

    tokio::time::sleep(early).await;
    steal(&mut inspect, late[1].id());
    add(&mut inspect, "new");
    let new = next(&mut deliveries).await;
    let together = [&late[0], &late[1], &new, &late[2]];
    let settled: Vec<_> = ack_all(together).await.iter().map(Result::is_ok).collect();
    assert_eq!(settled, [true, false, true, true]);
    assert!(calls_of(&mut inspect, "xpending") > 0);
    // The first three together, the new one, and the two that are still ours.
    assert_eq!(calls(&mut inspect), 3);
    assert_eq!(pending(&mut inspect), 1);
}

#[tokio::test]
async fn early_acks_of_what_was_not_pending_say_so() {
    let server = Server::start();
    let mut inspect = server.inspect();
    let (mut deliveries, held) = deliver(&server, group(), server.url(), 7).await;
    let by_hand: Vec<_> = held[2..].iter().map(Delivery::id).collect();
    let () = inspect.xack(STREAM, GROUP, &by_hand).unwrap();
    for answer in ack_all(&held[..4]).await {
        let Unsettled { tag, error, .. } = answer.unwrap_err();
        assert!(
            matches!(error, DeliveryError::SomeLost { lost: 2, of: 4 }),
            "{error}"
        );
        assert!(tag.is_none());
    }
    assert_eq!(pending(&mut inspect), 0);
    for answer in ack_all(&held[4..]).await {
        let Unsettled { tag, error, .. } = answer.unwrap_err();
        assert!(matches!(error, DeliveryError::Lost), "{error}");
        assert!(tag.is_none());
    }
    // All places are free.
    for n in 0..7 {
        add(&mut inspect, &n.to_string());
    }
    for _ in 0..7 {
        next(&mut deliveries).await;
    }
    // And no more of them.
    add(&mut inspect, "one too many");
    assert!(is_quiet(&mut deliveries, 200).await);
}

#[tokio::test]
async fn a_command_has_a_bounded_number_of_acks() {
    for group in [group(), asking()] {
        let server = Server::start();
        let mut inspect = server.inspect();
        let (_deliveries, held) = deliver(&server, group, server.url(), 150).await;
        assert!(ack_all(&held).await.iter().all(Result::is_ok));
        assert_eq!(pending(&mut inspect), 0);
        assert_eq!(calls(&mut inspect), 3);
    }
}

#[tokio::test]
async fn an_ack_that_is_dropped_takes_nothing_from_the_others() {
    let server = Server::start();
    let mut inspect = server.inspect();
    let (mut deliveries, held) = deliver(&server, group(), server.url(), 5).await;
    let settle = |delivery: &Delivery| delivery.tag().settle(Verdict::Ack, reason());
    let mut acks: Vec<_> = held.iter().map(settle).collect();
    for ack in &mut acks {
        assert!(Pin::new(ack).now_or_never().is_none());
    }
    // The one that came first, and one that joined it.
    drop(acks.remove(3));
    drop(acks.remove(0));
    let answers = timeout(Duration::from_secs(10), join_all(acks)).await;
    assert!(answers.unwrap().iter().all(Result::is_ok));
    assert_eq!(pending(&mut inspect), 0);
    // Those two gave their places up too.
    for n in 0..5 {
        add(&mut inspect, &n.to_string());
    }
    let mut held = Vec::new();
    while held.len() < 5 {
        held.push(next(&mut deliveries).await);
    }
    assert!(ack_all(&held).await.iter().all(Result::is_ok));
}

#[tokio::test]
async fn a_connection_that_is_lost_answers_for_all_acks_under_way() {
    let asking = group().min_idle(Duration::from_millis(500));
    let early = group()
        .min_idle(Duration::from_secs(3))
        .response_timeout(Duration::from_secs(1));
    for group in [asking, early] {
        lose_the_connection(group).await;
    }
}

async fn lose_the_connection(group: ConsumerGroup) {
    let server = Server::start();
    let proxy = Proxy::start(server.host()).await;
    let url = format!("redis://{}", proxy.address());
    let (mut deliveries, held) = deliver(&server, group.clone(), url, 10).await;
    proxy.stall();
    let (answers, ()) = tokio::join!(ack_all(&held), async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        proxy.cut();
    });
    for answer in answers {
        let Unsettled { tag, error, .. } = answer.unwrap_err();
        assert!(matches!(error, DeliveryError::Command(_)), "{error}");
        assert!(tag.is_none(), "nobody knows whether it was done");
    }
    close(&mut deliveries).await;

    let mut deliveries = group.prefetch(10).connect(server.url()).await.unwrap();
    for _ in 0..10 {
        let again = next(&mut deliveries).await;
        assert!(ack_all([&again]).await[0].is_ok());
    }
    assert_eq!(pending(&mut server.inspect()), 0);
}

#[tokio::test]
async fn the_prefetch_is_that_of_the_other_brokers() {
    let server = Server::start();
    let group = ConsumerGroup::new(STREAM, GROUP);
    let deliveries = group.connect(server.url()).await.unwrap();
    assert_eq!(deliveries.prefetch(), 64);
}

#[tokio::test]
async fn acks_that_the_server_refuses_as_a_whole_give_all_tags_back() {
    for group in [group(), asking()] {
        refuse_as_a_whole(group).await;
    }
}

async fn refuse_as_a_whole(group: ConsumerGroup) {
    let server = Server::start();
    let mut inspect = server.inspect();
    let (_deliveries, held) = deliver(&server, group, server.url(), 10).await;
    let mut set_replicas = |least: &str| {
        let _: Value = cmd("CONFIG")
            .arg("SET")
            .arg("min-replicas-to-write")
            .arg(least)
            .query(&mut inspect)
            .unwrap();
    };
    set_replicas("1");
    let refused = ack_all(&held).await;
    set_replicas("0");
    assert_eq!(pending(&mut inspect), 10);
    let again = refused.into_iter().map(|answer| {
        let Unsettled { tag, error, .. } = answer.unwrap_err();
        let tag = tag.unwrap_or_else(|| panic!("{error}"));
        tag.settle(Verdict::Ack, reason())
    });
    assert!(join_all(again).await.iter().all(Result::is_ok));
    assert_eq!(pending(&mut inspect), 0);
}

#[test]
fn an_ack_after_the_end_of_its_connections_runtime_is_answered() {
    let server = Server::start();
    let runtime = || Builder::new_current_thread().enable_all().build().unwrap();
    let connecting = runtime();
    let (_deliveries, held) = connecting.block_on(deliver(&server, group(), server.url(), 2));
    drop(connecting);
    for answer in runtime().block_on(ack_all(&held)) {
        let Unsettled { tag, error, .. } = answer.unwrap_err();
        assert!(matches!(error, DeliveryError::Command(_)), "{error}");
        assert!(tag.is_none());
    }
}
