//! Users without some of the rights.

use std::time::Duration;

use tower_sentinel::{
    Job, Verdict,
    broker::redis::{
        ConnectError, ConsumerGroup,
        redis::{Commands, Connection, Value, cmd},
    },
    consumer::Subscription,
    settle::{Lease, Settle},
};

use super::{
    GROUP, STREAM, add, close, count, dead, group, large::add_large, next, pending, server::Server,
    settle,
};

/// Returns the commands and keys that the documentation lists.
fn documented() -> Vec<&'static str> {
    let docs = include_str!("../../../src/_guide/redis.md");
    let (_, list) = docs.split_once("ACL SETUSER").unwrap();
    let (list, _) = list.split_once("```").unwrap();
    let words = list.split_ascii_whitespace();
    words.filter(|word| word.starts_with(['~', '+'])).collect()
}

/// Creates a user with these rights, and returns the address with it.
fn allow(server: &Server, rights: &[&str]) -> String {
    let () = cmd("ACL")
        .arg("SETUSER")
        .arg("alice")
        .arg(&["reset", "on", ">secret"])
        .arg(rights)
        .query(&mut server.inspect())
        .unwrap();
    format!("redis://alice:secret@127.0.0.1:{}", server.port)
}

fn denials(connection: &mut Connection) -> Vec<Value> {
    cmd("ACL").arg("LOG").query(connection).unwrap()
}

#[tokio::test]
async fn a_probe_names_the_rights_that_it_lacks() {
    let server = Server::start();
    let url = allow(&server, &documented());
    let deliveries = group().connect(&*url).await.unwrap();
    let error = deliveries.probe().unwrap().await.unwrap_err();
    let error = format!("{error:#}");
    let expected = "the broker can't be probed: the request to redis failed: ";
    assert!(error.starts_with(expected), "{error}");
    allow(
        &server,
        &[&documented()[..], &["+xinfo|groups", "+zcount"]].concat(),
    );
    let deliveries = group().connect(&*url).await.unwrap();
    add(&mut server.inspect(), "one");
    deliveries.probe().unwrap().await.unwrap();
}

#[tokio::test]
async fn the_documented_rights_are_enough() {
    let server = Server::start();
    let mut inspect = server.inspect();
    let url = allow(&server, &documented());
    let impatient = group().min_idle(Duration::from_millis(700));
    let mut deliveries = impatient.connect(&*url).await.unwrap();
    // `connect` finds out that newer commands are forbidden by trying them.
    let () = cmd("ACL")
        .arg("LOG")
        .arg("RESET")
        .query(&mut inspect)
        .unwrap();
    add(&mut inspect, "one");
    for verdict in [
        Verdict::retry(),
        Verdict::retry_after(Duration::from_millis(1)),
        Verdict::release(),
        Verdict::Reject,
    ] {
        settle(&next(&mut deliveries).await, verdict).await.unwrap();
    }
    add(&mut inspect, "two");
    let kept = next(&mut deliveries).await;
    assert_eq!(kept.tag().keep_alive().await.unwrap(), Lease::Held);
    let reclaimed = next(&mut deliveries).await;
    assert_eq!(count(&reclaimed), 2);
    settle(&reclaimed, Verdict::Ack).await.unwrap();
    add(&mut inspect, "given back");
    next(&mut deliveries).await;
    close(&mut deliveries).await;
    assert_eq!((pending(&mut inspect), dead(&mut inspect).len()), (0, 1));
    let denied = denials(&mut inspect);
    assert!(denied.is_empty(), "{denied:?}");

    add_large(&mut inspect);
    let mut deliveries = group().connect(&*url).await.unwrap();
    for _ in 0..2 {
        settle(&next(&mut deliveries).await, Verdict::Reject)
            .await
            .unwrap();
    }
    assert_eq!((pending(&mut inspect), dead(&mut inspect).len()), (0, 3));
}

#[tokio::test]
async fn a_right_that_is_missing_is_named_at_connect() {
    let server = Server::start();
    let rights = documented();
    for missing in &rights {
        let others: Vec<_> = rights
            .iter()
            .copied()
            .filter(|right| right != missing)
            .collect();
        let url = allow(&server, &others);
        let error = group().connect(&*url).await.expect_err(missing);
        let message = error.to_string();
        let ConnectError::Forbidden { command, key, .. } = &error else {
            panic!("{missing}: {error}");
        };
        match missing.strip_prefix('+') {
            Some(right) => {
                assert_eq!(command.to_lowercase().replace(' ', "|"), right);
                assert!(message.contains(missing), "{missing}: {message}");
            }
            None => {
                let key = key.as_deref().unwrap();
                let pattern = missing.trim_start_matches('~').trim_end_matches('*');
                assert!(key.starts_with(pattern), "{missing}: {message}");
                assert!(message.contains(key), "{missing}: {message}");
            }
        }
        assert!(
            !message.contains("alice") && !message.contains('\n'),
            "{message}"
        );
        assert!(!message.contains("secret"), "{message}");
    }
    // Nothing is left behind of the tries.
    let url = allow(&server, &rights);
    let deliveries = group().connect(&*url).await.unwrap();
    let consumers: Vec<Value> = cmd("XINFO")
        .arg("CONSUMERS")
        .arg(STREAM)
        .arg(GROUP)
        .query(&mut server.inspect())
        .unwrap();
    assert!(consumers.len() <= 1, "{consumers:?}");
    drop(deliveries);
}

#[tokio::test]
async fn what_only_some_groups_need_is_asked_of_them_alone() {
    let server = Server::start();
    let url = allow(&server, &documented());
    let forbidden = |group: ConsumerGroup| {
        let url = url.clone();
        async move {
            match group.connect(&*url).await.unwrap_err() {
                ConnectError::Forbidden { command, key, .. } => (command, key.unwrap()),
                error => panic!("{error}"),
            }
        }
    };
    let of_failed = ("XADD", "failed".to_owned());
    assert_eq!(forbidden(group().dead_letter("failed")).await, of_failed);
    let of_deletion = ("XDEL", STREAM.to_owned());
    assert_eq!(forbidden(group().delete_settled()).await, of_deletion);

    let mut others = documented();
    others.retain(|right| *right != "+xadd");
    let url = allow(&server, &others);
    drop(group().no_dead_letter().connect(&*url).await.unwrap());
    let kept: usize = server.inspect().exists(STREAM).unwrap();
    assert_eq!(kept, 1);
}
