//! Order in which jobs go to consumers.

use std::panic::catch_unwind;

use futures_util::{FutureExt, StreamExt};
use tokio::time::sleep;
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_sentinel::{
    Job, Verdict,
    broker::memory::{Broker, DeliveryError},
    settle::{Messaging, Settle},
};

use super::{LEASE, SECOND, assert_idle, counts, payloads, queue, settle, take, take_all};

// === delivering ===

#[test]
fn jobs_come_in_the_order_in_which_they_were_published() {
    let queue = queue();
    (1..=3).for_each(|job| queue.publish(job));
    let mut jobs = queue.subscribe(10).unwrap();
    let deliveries = take_all(&mut jobs);
    assert_eq!(payloads(&deliveries), [1, 2, 3]);
    for job in &deliveries {
        assert_eq!(job.tag().deliveries(), Some(1));
        assert_eq!(job.tag().redelivered(), Some(false));
    }
    assert_eq!(counts(&queue), (0, 0, 3, 0, 0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_waiting_consumer_is_woken_by_what_is_published() {
    let queue = queue();
    let mut jobs = queue.subscribe(1).unwrap();
    let waiting = tokio::spawn(async move { jobs.next().await.unwrap().unwrap().into_payload() });
    sleep(SECOND).await;
    queue.publish(7);
    assert_eq!(waiting.await.unwrap(), 7);
}

#[test]
fn prefetch_holds_for_each_consumer() {
    let queue = queue();
    (0..10).for_each(|job| queue.publish(job));
    let mut two = queue.subscribe(2).unwrap();
    let mut three = queue.subscribe(3).unwrap();
    let held = take_all(&mut two);
    assert_eq!(held.len(), 2);
    assert_eq!(take_all(&mut three).len(), 3);
    assert_eq!(counts(&queue), (5, 0, 5, 0, 0, 0));

    settle(&held[1], Verdict::Ack).unwrap();
    assert_eq!(take_all(&mut two).len(), 1);
    settle(&held[0], Verdict::Ack).unwrap();
    assert_eq!(take_all(&mut two).len(), 1);
    assert_eq!(counts(&queue), (3, 0, 5, 2, 0, 0));
}

#[tokio::test(start_paused = true)]
async fn an_answer_wakes_a_consumer_that_waits_for_a_place() {
    let queue = queue();
    (1..=2).for_each(|job| queue.publish(job));
    let mut jobs = queue.subscribe(1).unwrap();
    let first = take(&mut jobs);
    let waiting = tokio::spawn(async move { jobs.next().await.unwrap().unwrap().into_payload() });
    sleep(SECOND).await;
    assert!(!waiting.is_finished());
    settle(&first, Verdict::Ack).unwrap();
    assert_eq!(waiting.await.unwrap(), 2);
}

#[tokio::test(start_paused = true)]
async fn the_gate_has_the_number_of_the_prefetch() {
    let queue = queue();
    let jobs = queue.subscribe(2).unwrap();
    assert_eq!(jobs.prefetch(), 2);
    let mut gated = jobs.gate().layer(service_fn(|(): ()| async {
        sleep(SECOND).await;
        Ok::<_, DeliveryError>(())
    }));
    let mut calls = Vec::new();
    for _ in 0..2 {
        let ready = gated.ready().now_or_never();
        calls.push(ready.expect("there is a permit").unwrap().call(()));
    }
    assert!(gated.ready().now_or_never().is_none());
    drop(calls);
    assert!(gated.ready().now_or_never().is_some());
}

#[test]
fn a_queue_has_its_own_jobs() {
    let broker = Broker::new();
    let (one, two) = (broker.queue("one").declare(), broker.queue("two").declare());
    one.publish(1);
    let connection = broker.connect().unwrap();
    let mut of_one = connection.subscribe(&one, 1).unwrap();
    let mut of_two = connection.subscribe(&two, 1).unwrap();
    assert_idle(&mut of_two);
    assert_eq!(*take(&mut of_one).payload(), 1);
    broker.queue("two").declare().publish(2);
    assert_eq!(*take(&mut of_two).payload(), 2);
}

#[test]
fn a_queue_is_declared_with_the_same_settings_or_not_at_all() {
    let broker = Broker::<u32>::new();
    let queue = broker.queue("jobs").dead_letter("dead").lease(LEASE);
    queue.declare();
    let queue = broker.queue("jobs").dead_letter("dead").lease(LEASE);
    queue.declare();
    let other = broker.clone();
    let changed = catch_unwind(move || other.queue("jobs").declare());
    let message = changed.unwrap_err().downcast::<String>().unwrap();
    assert_eq!(
        *message,
        "the queue \"jobs\" is declared with other settings"
    );
    broker
        .queue("jobs")
        .dead_letter("dead")
        .lease(LEASE)
        .declare()
        .publish(1);
}

// === traces ===

const TRACEPARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

#[test]
fn a_tag_says_its_queue_the_number_of_the_job_and_the_trace_of_its_sender() {
    let broker = Broker::new();
    let queue = broker.queue("jobs").dead_letter("dead").declare();
    queue.publish(1);
    let headers = [("Traceparent", TRACEPARENT), ("tracestate", "k=v")];
    queue.publish_with_headers(2, headers);
    let mut jobs = queue.subscribe(10).unwrap();
    let [without, with] = take_all(&mut jobs).try_into().unwrap();

    let expected = Messaging::new("memory", "jobs").message_id("1");
    assert_eq!(without.tag().messaging(), Some(expected));
    assert_eq!(without.header("traceparent"), None);

    let traced = |destination| {
        Messaging::new("memory", destination)
            .message_id("2")
            .traceparent(Some(TRACEPARENT))
            .tracestate(Some("k=v"))
    };
    assert_eq!(with.tag().messaging(), Some(traced("jobs")));
    assert_eq!(with.header("traceparent"), Some(TRACEPARENT));

    // It is the same message when it comes back, and as a dead letter.
    settle(&with, Verdict::retry()).unwrap();
    let again = take(&mut jobs);
    assert_eq!(again.tag().messaging(), Some(traced("jobs")));
    settle(&again, Verdict::Reject).unwrap();
    let mut dead = broker.queue("dead").declare().subscribe(1).unwrap();
    let dead = take(&mut dead);
    assert_eq!(dead.tag().messaging(), Some(traced("dead")));
}
