//! Primaries and replicas: connections, failovers by hand, and settlements that wait for replicas.

use std::{future::poll_fn, pin::Pin, time::Duration};

use tokio::time::timeout;
use tower_sentinel::{
    Job, Verdict,
    broker::redis::{
        ConnectError, Deliveries, DeliveryError, SubscriptionError,
        redis::{Connection, Value, cmd},
    },
    consumer::Subscription,
    settle::{Settle, Unsettled},
};

use super::{
    add, calls_of, dead, forget_calls, group, next, pending, reason,
    server::{QUICK, Server},
    settle,
    work::{Work, publish},
};
use crate::port::free_port;

fn pair() -> (Server, Server) {
    let primary = Server::with(&QUICK);
    let replica = primary.replica();
    (primary, replica)
}

/// Makes the two servers change places.
fn swap(primary: &Server, replica: &Server) {
    primary.has_replicated();
    let () = cmd("REPLICAOF")
        .arg("NO")
        .arg("ONE")
        .query(&mut replica.inspect())
        .unwrap();
    let () = cmd("REPLICAOF")
        .arg("127.0.0.1")
        .arg(replica.port)
        .query(&mut primary.inspect())
        .unwrap();
}

async fn closed(deliveries: &mut Deliveries) -> SubscriptionError {
    let closed = poll_fn(|cx| Pin::new(&mut *deliveries).poll_closed(cx));
    let closed = timeout(Duration::from_secs(10), closed).await;
    closed.expect("the subscription goes on").unwrap_err()
}

// === Connecting ===

#[tokio::test]
async fn a_replica_is_refused_as_a_replica() {
    let (_primary, replica) = pair();
    let error = group().connect(replica.url()).await.unwrap_err();
    assert!(matches!(error, ConnectError::ReadOnly { .. }), "{error}");
    let message = format!("{error:#}");
    let start = format!(
        "redis at {} is a read-only replica: ReadOnly: ",
        replica.host()
    );
    assert!(message.starts_with(&start), "{message}");
}

#[tokio::test]
async fn of_several_addresses_the_primary_is_used() {
    let (primary, replica) = pair();
    let both = [replica.url(), primary.url()];
    for addresses in [both.to_vec(), vec![both.join(",")]] {
        let connector = group().connector(addresses);
        // Each begins with another address.
        for _ in 0..2 {
            let mut connector = connector.clone();
            let connecting = tower_sentinel::consumer::Connect::connect(&mut connector, 1);
            let mut deliveries = connecting.await.unwrap();
            add(&mut primary.inspect(), "one");
            settle(&next(&mut deliveries).await, Verdict::Ack)
                .await
                .unwrap();
        }
    }
}

#[tokio::test]
async fn the_error_of_a_round_has_each_address_with_its_reason() {
    let (_primary, replica) = pair();
    let silent = Server::start();
    silent.pause();
    let down = free_port();
    let with_password = |host: &str| format!("redis://user:s3cr3t@{host}");
    // The replica has no such user, so it gets none.
    let addresses = [
        replica.url(),
        with_password(&silent.host()),
        with_password(&format!("127.0.0.1:{down}")),
    ];
    let group = group()
        .connect_timeout(Duration::from_secs(3))
        .response_timeout(Duration::from_secs(600));
    let connecting = timeout(Duration::from_secs(60), group.connect(&addresses));
    let error = connecting.await.unwrap().unwrap_err();
    let ConnectError::AllFailed { errors } = &error else {
        panic!("{error}");
    };
    assert_eq!(errors.len(), 3);
    let message = error.to_string();
    for part in [
        "none of 3 addresses of redis works: ".to_owned(),
        format!(
            "redis at {} is a read-only replica: ReadOnly: ",
            replica.host()
        ),
        format!("redis at {} can't be reached: ", silent.host()),
        format!("redis at 127.0.0.1:{down} can't be reached: "),
    ] {
        assert!(message.contains(&part), "{message}");
    }
    for text in [
        message,
        format!("{error:?}"),
        format!("{:?}", group.connector(&addresses)),
    ] {
        assert!(!text.contains("s3cr3t") && !text.contains("user"), "{text}");
    }
    silent.resume();
}

#[tokio::test]
async fn an_address_that_is_wrong_is_told_and_not_repeated() {
    for addresses in [
        vec!["redis://127.0.0.1", "redis://user:s3/cr3t@127.0.0.1"],
        vec!["redis://user:s3cr3t@127.0.0.1:x"],
        vec!["user:s3cr3t@127.0.0.1"],
        vec![],
    ] {
        let error = group().connect(&addresses).await.unwrap_err();
        assert!(matches!(error, ConnectError::InvalidAddress(_)), "{error}");
        let message = format!("{error:#}");
        assert!(!message.contains("cr3t"), "{message}");
    }
}

// === Failover ===

#[tokio::test]
async fn a_session_ends_when_its_server_becomes_a_replica() {
    let (primary, replica) = pair();
    let mut deliveries = group().connect(primary.url()).await.unwrap();
    swap(&primary, &replica);
    let error = closed(&mut deliveries).await;
    assert!(
        matches!(
            error,
            SubscriptionError::ReadOnly(_) | SubscriptionError::Disconnected(_)
        ),
        "{error}"
    );
}

#[tokio::test]
async fn a_settlement_that_meets_a_replica_gives_its_tag_back_and_ends_the_session() {
    let verdicts = [
        Verdict::Ack,
        Verdict::retry(),
        Verdict::retry_after(Duration::from_millis(1)),
        Verdict::Reject,
    ];
    for verdict in verdicts {
        let (primary, replica) = pair();
        add(&mut primary.inspect(), "one");
        // Its only place is taken, so it reads nothing meanwhile.
        let mut deliveries = group().prefetch(1).connect(primary.url()).await.unwrap();
        let delivery = next(&mut deliveries).await;
        swap(&primary, &replica);
        let unsettled = delivery.tag().settle(verdict, reason()).await;
        let Unsettled { tag, error, .. } = unsettled.unwrap_err();
        assert!(
            matches!(error, DeliveryError::ReadOnly(_)),
            "{verdict}: {error}"
        );
        assert!(tag.is_some(), "{verdict}");
        let ended = closed(&mut deliveries).await;
        assert!(
            matches!(ended, SubscriptionError::ReadOnly(_)),
            "{verdict}: {ended}"
        );
        assert!(deliveries.is_gone());
        let error = settle(&delivery, Verdict::Ack).await.unwrap_err();
        assert!(matches!(error, DeliveryError::Stale), "{error}");
        assert_eq!(pending(&mut replica.inspect()), 1, "{verdict}");
        assert_eq!(dead(&mut replica.inspect()).len(), 0, "{verdict}");
    }
}

#[tokio::test]
async fn a_failover_by_hand_under_load_loses_no_job() {
    let (primary, replica) = pair();
    let urls = [primary.url(), replica.url()];
    let work = Work::start(group().min_idle(Duration::from_secs(2)).connector(&urls));
    let mut jobs = publish(&urls, "before", 200).await;
    work.has_done(&jobs).await;
    let publishing = tokio::spawn(async move { publish(&urls, "amid", 500).await });
    let () = cmd("FAILOVER").query(&mut primary.inspect()).unwrap();
    replica.wait_for("replication", "role:master");
    jobs.extend(publishing.await.unwrap());
    work.has_done(&jobs).await;
    work.end().await;
    assert_eq!(pending(&mut replica.inspect()), 0);
}

// === Settlements that wait for replicas ===

fn calls_of_wait(connection: &mut Connection) -> u64 {
    calls_of(connection, "wait")
}

#[tokio::test]
async fn a_settlement_waits_for_the_replicas() {
    let (primary, replica) = pair();
    let mut inspect = primary.inspect();
    let waiting = group().wait_replicas(1, Duration::from_secs(4));
    let mut deliveries = waiting.connect(primary.url()).await.unwrap();
    for verdict in [Verdict::Ack, Verdict::Reject] {
        add(&mut inspect, "one");
        let delivery = next(&mut deliveries).await;
        settle(&delivery, verdict).await.unwrap();
        // Without a pause: the replica has it when the settlement ends.
        assert_eq!(pending(&mut replica.inspect()), 0, "{verdict}");
    }
    add(&mut inspect, "one");
    settle(&next(&mut deliveries).await, Verdict::retry())
        .await
        .unwrap();
    settle(&next(&mut deliveries).await, Verdict::Ack)
        .await
        .unwrap();
    assert_eq!(dead(&mut replica.inspect()).len(), 1);
}

#[tokio::test]
async fn a_settlement_that_too_few_replicas_have_is_moot_and_done() {
    let (primary, replica) = pair();
    let mut inspect = primary.inspect();
    let waiting = group()
        .prefetch(30)
        .wait_replicas(1, Duration::from_millis(300));
    let mut deliveries = waiting.connect(primary.url()).await.unwrap();
    for _ in 0..30 {
        add(&mut inspect, "one");
    }
    let mut taken = Vec::new();
    for _ in 0..30 {
        taken.push(next(&mut deliveries).await);
    }
    replica.pause();
    forget_calls(&mut inspect);
    let settling = taken.iter().enumerate().map(|(n, delivery)| {
        let verdict = match n % 3 {
            0 => Verdict::retry_after(Duration::from_secs(60)),
            1 => Verdict::Reject,
            _ => Verdict::Ack,
        };
        delivery.tag().settle(verdict, reason())
    });
    for unsettled in futures_util::future::join_all(settling).await {
        let unsettled = unsettled.unwrap_err();
        assert!(unsettled.is_moot());
        let error = unsettled.error;
        let DeliveryError::NotReplicated { confirmed, wanted } = error else {
            panic!("{error}");
        };
        assert_eq!((confirmed, wanted), (0, 1));
    }
    // Each was done on the primary, and they have shared the waits.
    assert_eq!(pending(&mut inspect), 0);
    let waits = calls_of_wait(&mut inspect);
    assert!((1..=3).contains(&waits), "{waits}");

    replica.resume();
    // It may need some time to catch up.
    loop {
        add(&mut inspect, "one");
        let delivery = next(&mut deliveries).await;
        match settle(&delivery, Verdict::Ack).await {
            Ok(()) => break,
            Err(error) => assert!(
                matches!(error, DeliveryError::NotReplicated { .. }),
                "{error}"
            ),
        }
    }
}

#[tokio::test]
async fn no_settlement_waits_by_default() {
    let server = Server::start();
    let mut inspect = server.inspect();
    add(&mut inspect, "one");
    let mut deliveries = group().connect(server.url()).await.unwrap();
    settle(&next(&mut deliveries).await, Verdict::Ack)
        .await
        .unwrap();
    assert_eq!(calls_of_wait(&mut inspect), 0);
}

#[tokio::test]
async fn the_right_to_wait_is_needed_only_to_wait() {
    let server = Server::start();
    let mut allow = cmd("ACL");
    allow
        .arg("SETUSER")
        .arg("alice")
        .arg(&["on", ">secret", "~*", "+@all", "-wait"]);
    let _: Value = allow.query(&mut server.inspect()).unwrap();
    let url = format!("redis://alice:secret@{}", server.host());
    let waiting = group().wait_replicas(1, Duration::from_millis(100));
    let error = waiting.connect(&url).await.unwrap_err();
    assert!(error.to_string().ends_with("grant +wait"), "{error}");
    assert!(group().connect(&url).await.is_ok());
}
