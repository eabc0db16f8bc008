//! The keys of a group, and the slots that a cluster keeps them in.

use std::time::Duration;

use tokio::time::sleep;
use tower_sentinel::{
    Verdict,
    broker::redis::{
        ConnectError, ConsumerGroup,
        redis::{Commands, cmd},
    },
};

use super::{GROUP, STREAM, add, group, next, server::Server, settle};
use crate::port::free_port;

#[tokio::test]
async fn a_prefix_is_that_of_the_keys_that_are_made() {
    let server = Server::start();
    let mut inspect = server.inspect();
    let prefixed = group().key_prefix("acme:");
    let mut deliveries = prefixed.connect(server.url()).await.unwrap();
    for verdict in [
        Verdict::retry_after(Duration::from_secs(60)),
        Verdict::Reject,
    ] {
        add(&mut inspect, "one");
        settle(&next(&mut deliveries).await, verdict).await.unwrap();
    }
    let mut keys: Vec<String> = inspect.keys("*").unwrap();
    keys.sort();
    assert_eq!(
        keys,
        [
            "acme:{jobs}:workers:dead",
            "acme:{jobs}:workers:delayed",
            STREAM
        ]
    );
}

#[test]
fn a_name_for_dead_letters_is_kept_whatever_the_prefix() {
    let named = ConsumerGroup::new(STREAM, GROUP)
        .dead_letter("failed")
        .key_prefix("acme:");
    assert_eq!(named.dead_letter_key(), Some("failed"));
    let dropped = ConsumerGroup::new(STREAM, GROUP)
        .no_dead_letter()
        .key_prefix("acme:");
    assert_eq!(dropped.dead_letter_key(), None);
    let again = ConsumerGroup::new(STREAM, GROUP)
        .key_prefix("acme:")
        .key_prefix("");
    assert_eq!(again.dead_letter_key(), Some("{jobs}:workers:dead"));
}

#[tokio::test]
async fn dead_letters_in_another_slot_are_refused_by_a_cluster_at_connect() {
    let port = free_port().to_string();
    let server = Server::with(&["--cluster-enabled", "yes", "--cluster-port", &port]);
    let mut inspect = server.inspect();
    let () = cmd("CLUSTER")
        .arg("ADDSLOTSRANGE")
        .arg(&[0, 16_383])
        .query(&mut inspect)
        .unwrap();
    loop {
        let info: String = cmd("CLUSTER").arg("INFO").query(&mut inspect).unwrap();
        if info.contains("cluster_state:ok") {
            break;
        }
        sleep(Duration::from_millis(50)).await;
    }
    let error = group()
        .dead_letter("failed")
        .connect(server.url())
        .await
        .unwrap_err();
    let message = error.to_string();
    assert!(
        matches!(&error, ConnectError::OtherSlot { stream, key, .. } if stream == STREAM && key == "failed"),
        "{message}"
    );
    assert!(message.contains("{jobs}"), "{message}");

    let same_slot = group().dead_letter("{jobs}:failed").key_prefix("acme:");
    let mut deliveries = same_slot.connect(server.url()).await.unwrap();
    add(&mut inspect, "one");
    settle(&next(&mut deliveries).await, Verdict::retry())
        .await
        .unwrap();
    settle(&next(&mut deliveries).await, Verdict::Reject)
        .await
        .unwrap();
    let kept: usize = inspect.xlen("{jobs}:failed").unwrap();
    assert_eq!(kept, 1);
}

#[tokio::test]
async fn dead_letters_may_have_any_name_elsewhere() {
    let server = Server::start();
    let mut inspect = server.inspect();
    let mut deliveries = group()
        .dead_letter("failed")
        .connect(server.url())
        .await
        .unwrap();
    add(&mut inspect, "one");
    settle(&next(&mut deliveries).await, Verdict::Reject)
        .await
        .unwrap();
    let kept: usize = inspect.xlen("failed").unwrap();
    assert_eq!(kept, 1);
}
