//! Entries that are suspects, and others that a worker has given back.

use std::time::Duration;

use tower_sentinel::{
    Job, Verdict,
    broker::{Envelope, redis::ConsumerGroup},
    settle::Settle,
};

use super::{
    GROUP, STREAM, add, close, dead, group, large::add_large, next, pending, server::Server, settle,
};
use crate::conformance::suspected;

const SUSPECTS: &str = "{jobs}:suspects";

fn watched() -> ConsumerGroup {
    group().suspects(SUSPECTS)
}

/// Also where the server has `XNACK`.
#[tokio::test]
async fn an_entry_that_was_given_back_is_no_suspect() {
    let soon = Duration::from_millis(20);
    let server = Server::start();
    let mut inspect = server.inspect();
    let mut deliveries = watched().connect(server.url()).await.unwrap();
    for verdict in [
        Verdict::retry(),
        Verdict::release(),
        Verdict::retry_after(soon),
        Verdict::release_after(soon),
    ] {
        add(&mut inspect, "one");
        let job = next(&mut deliveries).await;
        assert!(!job.tag().is_suspect());
        settle(&job, verdict).await.unwrap();
        let job = next(&mut deliveries).await;
        assert_eq!(job.redelivered(), Some(true));
        assert!(!job.tag().is_suspect(), "{verdict}");
        settle(&job, Verdict::Ack).await.unwrap();
    }
}

#[tokio::test]
async fn an_entry_that_a_close_gives_back_is_no_suspect() {
    let server = Server::start();
    add(&mut server.inspect(), "one");
    let mut deliveries = watched().connect(server.url()).await.unwrap();
    let _job = next(&mut deliveries).await;
    close(&mut deliveries).await;
    let mut deliveries = watched().connect(server.url()).await.unwrap();
    let job = next(&mut deliveries).await;
    assert_eq!(job.deliveries(), Some(2));
    assert!(!job.tag().is_suspect());
}

#[tokio::test]
async fn a_reclaimed_entry_is_a_suspect_if_there_is_a_stream_for_them() {
    for (group, is_suspect) in [(watched(), true), (group(), false)] {
        let server = Server::start();
        add(&mut server.inspect(), "one");
        let group = group.min_idle(Duration::from_millis(50));
        let mut deliveries = group.connect(server.url()).await.unwrap();
        let first = next(&mut deliveries).await;
        assert!(!first.tag().is_suspect());
        let second = next(&mut deliveries).await;
        assert_eq!(second.tag().is_suspect(), is_suspect);
    }
}

/// Also one that is too large for a script.
#[tokio::test]
async fn a_suspect_keeps_its_origin_in_the_lane() {
    for is_large in [false, true] {
        let server = Server::start();
        let mut inspect = server.inspect();
        match is_large {
            true => add_large(&mut inspect),
            false => add(&mut inspect, "one"),
        };
        let mut deliveries = watched().connect(server.url()).await.unwrap();
        let job = next(&mut deliveries).await;
        let fields = job.fields().count();
        let settling = job.tag().settle(Verdict::Reject, suspected());
        settling.await.unwrap();
        assert_eq!((pending(&mut inspect), dead(&mut inspect).len()), (0, 0));

        let mut lane = watched().lane().connect(server.url()).await.unwrap();
        assert_eq!(lane.prefetch(), 1);
        for (deliveries, verdict) in [(1, Verdict::retry()), (2, Verdict::Reject)] {
            let job = next(&mut lane).await;
            assert_eq!(
                (job.routing_key(), job.deliveries()),
                (STREAM, Some(deliveries))
            );
            // Its own, and those of a suspect, of which one is the message.
            assert_eq!(job.fields().count(), fields + 7);
            settle(&job, verdict).await.unwrap();
        }
        let [letter] = dead(&mut inspect).try_into().unwrap();
        assert_eq!(letter["x-original-destination"], STREAM);
        assert_eq!(letter["x-outcome-kind"], "panicked");
        assert_eq!(letter.len(), fields + 6);
    }
}

#[test]
fn a_lane_has_the_same_settings_and_dead_letters() {
    let group = ConsumerGroup::new(STREAM, GROUP)
        .suspects(SUSPECTS)
        .key_prefix("acme:");
    let lane = group.lane();
    assert_eq!(lane.dead_letter_key(), Some("acme:{jobs}:workers:dead"));
    assert_eq!(lane.delayed_key(), "acme:{jobs}:suspects:workers:delayed");
    assert_eq!(group.no_dead_letter().lane().dead_letter_key(), None);
}
