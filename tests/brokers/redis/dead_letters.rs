//! Dead letters.

use std::time::{SystemTime, UNIX_EPOCH};

use tower_sentinel::{Job, Verdict, settle::Settle};

use super::{add, dead, group, is_quiet, next, pending, server::Server, settle};

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
        ("x-original-destination", "jobs"),
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
