//! The embedded broker: who is given which job, and what becomes of it.

use std::{
    convert::Infallible,
    future::{IntoFuture, pending, poll_fn},
    panic::catch_unwind,
    pin::Pin,
    sync::Arc,
    task::{Context, Wake, Waker},
    time::Duration,
};

use futures_util::{FutureExt, StreamExt};
use tokio::time::{Instant, advance, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tower::{Layer, Service, ServiceBuilder, ServiceExt, service_fn};
use tower_sentinel::{
    Consumer, DecisionExt, Job, SentinelLayer, SettlePolicy, Verdict, ack_on_success,
    broker::memory::{
        Broker, ConnectError, Connection, Counts, Deliveries, Delivery, DeliveryError, DeliveryTag,
        Queue, SettleFault, SubscriptionError,
    },
    consumer::Subscription as _,
    outcome::OutcomeKind,
    settle::{Capabilities, Lease, Messaging, Reason, Settle, Unsettled},
};

use crate::support::{block_on, call, paused_time};

const SECOND: Duration = Duration::from_secs(1);
const LEASE: Duration = Duration::from_secs(30);

// === driving ===

fn queue() -> Queue<u32> {
    Broker::new().queue("jobs").declare()
}

/// Returns the next job, which must be there.
#[track_caller]
fn take(jobs: &mut Deliveries<u32>) -> Delivery<u32> {
    let next = jobs.next().now_or_never();
    next.expect("a job is ready").unwrap().unwrap()
}

#[track_caller]
fn take_all(jobs: &mut Deliveries<u32>) -> Vec<Delivery<u32>> {
    let next = || {
        jobs.next()
            .now_or_never()
            .map(|next| next.unwrap().unwrap())
    };
    std::iter::from_fn(next).collect()
}

fn payloads(deliveries: &[Delivery<u32>]) -> Vec<u32> {
    deliveries.iter().map(|job| *job.payload()).collect()
}

#[track_caller]
fn assert_idle(jobs: &mut Deliveries<u32>) {
    assert!(jobs.next().now_or_never().is_none());
}

fn reason() -> Reason {
    Reason::completed(SECOND)
}

/// Settles at once.
#[track_caller]
fn settle(job: &Delivery<u32>, verdict: Verdict) -> Result<(), DeliveryError> {
    let settled = job.tag().settle(verdict, reason()).now_or_never();
    settled
        .expect("a settlement is not delayed")
        .map_err(|it| it.error)
}

#[track_caller]
fn keep_alive(tag: &DeliveryTag<u32>) -> Result<Lease, DeliveryError> {
    tag.keep_alive().now_or_never().unwrap()
}

async fn closed(jobs: &mut Deliveries<u32>) -> Result<(), SubscriptionError> {
    poll_fn(|cx| Pin::new(&mut *jobs).poll_closed(cx)).await
}

async fn close(jobs: &mut Deliveries<u32>) {
    poll_fn(|cx| Pin::new(&mut *jobs).poll_close(cx)).await;
}

/// Returns the counts without what is of no number.
fn counts(queue: &Queue<u32>) -> (usize, usize, usize, u64, u64, u64) {
    let Counts {
        ready,
        delayed,
        unacked,
        acked,
        dead,
        dropped,
        ..
    } = queue.counts();
    (ready, delayed, unacked, acked, dead, dropped)
}

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

// === verdicts ===

#[test]
fn an_ack_removes_the_job() {
    let queue = queue();
    queue.publish(1);
    let mut jobs = queue.subscribe(1).unwrap();
    settle(&take(&mut jobs), Verdict::Ack).unwrap();
    assert_eq!(counts(&queue), (0, 0, 0, 1, 0, 0));
    drop(jobs);
    assert_idle(&mut queue.subscribe(1).unwrap());
}

#[test]
fn jobs_are_settled_in_any_order() {
    let queue = queue();
    (0..4).for_each(|job| queue.publish(job));
    let mut jobs = queue.subscribe(4).unwrap();
    let held = take_all(&mut jobs);
    settle(&held[3], Verdict::Ack).unwrap();
    settle(&held[1], Verdict::retry()).unwrap();
    settle(&held[0], Verdict::release()).unwrap();
    settle(&held[2], Verdict::Ack).unwrap();
    assert_eq!(payloads(&take_all(&mut jobs)), [1, 0]);
    assert_eq!(counts(&queue), (0, 0, 2, 2, 0, 0));
}

#[test]
fn a_retry_charges_a_delivery_and_a_release_does_not() {
    let queue = queue();
    queue.publish(1);
    let mut jobs = queue.subscribe(1).unwrap();
    let mut told = Vec::new();
    for verdict in [
        Verdict::release(),
        Verdict::retry(),
        Verdict::release(),
        Verdict::retry(),
    ] {
        let job = take(&mut jobs);
        told.push((job.tag().deliveries(), job.tag().redelivered()));
        settle(&job, verdict).unwrap();
    }
    let last = take(&mut jobs).tag();
    told.push((last.deliveries(), last.redelivered()));
    let flags = [(1, false), (1, true), (2, true), (2, true), (3, true)];
    assert_eq!(told, flags.map(|(count, flag)| (Some(count), Some(flag))));
}

#[test]
fn what_comes_back_comes_before_what_was_never_delivered() {
    for verdict in [Verdict::retry(), Verdict::release()] {
        let queue = queue();
        (1..=4).for_each(|job| queue.publish(job));
        let mut jobs = queue.subscribe(2).unwrap();
        let held = take_all(&mut jobs);
        held.iter().for_each(|job| settle(job, verdict).unwrap());
        assert_eq!(payloads(&take_all(&mut jobs)), [1, 2], "{verdict}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_delayed_retry_is_not_seen_before_its_time() {
    let queue = queue();
    queue.publish(1);
    let mut jobs = queue.subscribe(1).unwrap();
    let started = Instant::now();
    settle(&take(&mut jobs), Verdict::retry_after(5 * SECOND)).unwrap();
    assert_eq!(counts(&queue), (0, 1, 0, 0, 0, 0));
    assert_idle(&mut jobs);

    let job = jobs.next().await.unwrap().unwrap();
    assert_eq!(started.elapsed(), 5 * SECOND);
    assert_eq!(job.tag().deliveries(), Some(2));
    assert_eq!(counts(&queue), (0, 0, 1, 0, 0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_delayed_release_is_not_seen_before_its_time_and_is_free() {
    let queue = queue();
    queue.publish(1);
    let mut jobs = queue.subscribe(1).unwrap();
    let started = Instant::now();
    settle(&take(&mut jobs), Verdict::release_after(5 * SECOND)).unwrap();
    assert_eq!(counts(&queue), (0, 1, 0, 0, 0, 0));
    assert_idle(&mut jobs);

    let tag = jobs.next().await.unwrap().unwrap().tag();
    assert_eq!(started.elapsed(), 5 * SECOND);
    assert_eq!((tag.deliveries(), tag.redelivered()), (Some(1), Some(true)));
}

#[tokio::test(start_paused = true)]
async fn delayed_jobs_come_when_they_are_due() {
    let queue = queue();
    (0..4).for_each(|job| queue.publish(job));
    let mut jobs = queue.subscribe(4).unwrap();
    let held = take_all(&mut jobs);
    let started = Instant::now();
    let waiting = tokio::spawn(async move {
        let mut seen = Vec::new();
        while seen.len() < 4 {
            let job = jobs.next().await.unwrap().unwrap();
            seen.push((*job.payload(), started.elapsed().as_secs()));
        }
        seen
    });
    // It waits without a timer, and then with one that is too late.
    sleep(Duration::ZERO).await;
    for (job, delay) in held.iter().zip([5, 3, 3, 1]) {
        settle(job, Verdict::retry_after(delay * SECOND)).unwrap();
        tokio::task::yield_now().await;
    }
    assert_eq!(waiting.await.unwrap(), [(3, 1), (1, 3), (2, 3), (0, 5)]);
}

#[tokio::test(start_paused = true)]
async fn a_delay_may_be_nothing_or_longer_than_time() {
    let queue = queue();
    (0..2).for_each(|job| queue.publish(job));
    let mut jobs = queue.subscribe(2).unwrap();
    let held = take_all(&mut jobs);
    settle(&held[0], Verdict::retry_after(Duration::ZERO)).unwrap();
    settle(&held[1], Verdict::retry_after(Duration::MAX)).unwrap();
    assert_eq!(counts(&queue), (1, 1, 0, 0, 0, 0));
    advance(Duration::from_secs(86_400 * 365)).await;
    assert_eq!(counts(&queue), (1, 1, 0, 0, 0, 0));
}

#[test]
fn a_reject_lands_in_the_dead_letter_queue_with_its_reason() {
    let broker = Broker::new();
    let queue = broker.queue("jobs").dead_letter("dead").declare();
    (1..=2).for_each(|job| queue.publish(job));
    let mut jobs = queue.subscribe(1).unwrap();
    settle(&take(&mut jobs), Verdict::retry()).unwrap();
    let mut why = reason();
    why.kind = OutcomeKind::Panicked;
    why.message = Some("index 7".into());
    let tag = take(&mut jobs).tag();
    assert!(tag.capabilities().has_dead_letter());
    tag.settle(Verdict::Reject, why.clone())
        .now_or_never()
        .unwrap()
        .unwrap();
    settle(&take(&mut jobs), Verdict::Reject).unwrap();
    assert_eq!(counts(&queue), (0, 0, 0, 0, 2, 0));

    let letters = queue.dead_letters();
    assert_eq!([letters[0].payload, letters[1].payload], [1, 2]);
    assert_eq!(letters[0].death.reason, why);
    assert_eq!(letters[0].death.deliveries, 2);
    assert_eq!(&*letters[0].death.queue, "jobs");

    let dead = broker.queue("dead").declare();
    assert_eq!(counts(&dead), (2, 0, 0, 0, 0, 0));
    let letter = take(&mut dead.subscribe(1).unwrap());
    assert_eq!(letter.death().unwrap().reason, why);
    assert_eq!(letter.tag().deliveries(), Some(1));
}

#[test]
fn a_reject_without_a_dead_letter_queue_drops_the_job() {
    let queue = queue();
    queue.publish(1);
    let job = take(&mut queue.subscribe(1).unwrap());
    drop(job);
    let mut jobs = queue.subscribe(1).unwrap();
    let job = take(&mut jobs);
    assert!(!job.tag().capabilities().has_dead_letter());
    settle(&job, Verdict::Reject).unwrap();
    assert_eq!(counts(&queue), (0, 0, 0, 0, 0, 1));
    assert!(queue.dead_letters().is_empty());
}

#[test]
fn an_abandoned_job_is_held_and_its_tag_used_up() {
    let queue = queue();
    queue.publish(1);
    let mut jobs = queue.subscribe(1).unwrap();
    let job = take(&mut jobs);
    settle(&job, Verdict::Abandon).unwrap();
    assert_eq!(
        settle(&job, Verdict::Ack),
        Err(DeliveryError::AlreadySettled)
    );
    assert_eq!(counts(&queue), (0, 0, 1, 0, 0, 0));
    drop(jobs);
    assert_eq!(counts(&queue), (1, 0, 0, 0, 0, 0));
    settle(&job, Verdict::Abandon).unwrap();
}

#[test]
fn a_second_settlement_is_an_error() {
    let verdicts = [
        Verdict::Ack,
        Verdict::retry(),
        Verdict::retry_after(SECOND),
        Verdict::release(),
        Verdict::Reject,
        Verdict::Abandon,
    ];
    for first in verdicts {
        for second in verdicts {
            let queue = queue();
            (0..2).for_each(|job| queue.publish(job));
            let mut jobs = queue.subscribe(2).unwrap();
            let tag = take(&mut jobs).tag();
            let held = take(&mut jobs);
            let again = tag.clone();
            tag.settle(first, reason()).now_or_never().unwrap().unwrap();
            let before = queue.counts();
            let Unsettled { tag, error, .. } = again
                .settle(second, reason())
                .now_or_never()
                .unwrap()
                .unwrap_err();
            assert_eq!(error, DeliveryError::AlreadySettled, "{first}, {second}");
            assert!(tag.is_none());
            assert_eq!(queue.counts(), before);
            settle(&held, Verdict::Ack).unwrap();
        }
    }
}

#[test]
fn the_tag_of_an_earlier_delivery_does_not_answer_for_the_next() {
    let queue = queue();
    queue.publish(1);
    let mut jobs = queue.subscribe(1).unwrap();
    let first = take(&mut jobs);
    settle(&first, Verdict::retry()).unwrap();
    let second = take(&mut jobs);
    assert_eq!(
        settle(&first, Verdict::Ack),
        Err(DeliveryError::AlreadySettled)
    );
    assert_eq!(keep_alive(&first.tag()), Err(DeliveryError::AlreadySettled));
    settle(&second, Verdict::Ack).unwrap();

    // The next job has the same place in memory.
    queue.publish(2);
    let _third = take(&mut jobs);
    assert_eq!(
        settle(&second, Verdict::Ack),
        Err(DeliveryError::AlreadySettled)
    );
    assert_eq!(counts(&queue), (0, 0, 1, 1, 0, 0));
}

// === what traces say of it ===

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

// === losing the channel ===

#[derive(Clone, Copy, Debug, PartialEq)]
enum Loss {
    Connection,
    AllConnections,
    Close,
    Drop,
}

const LOSSES: [Loss; 4] = [
    Loss::Connection,
    Loss::AllConnections,
    Loss::Close,
    Loss::Drop,
];

/// Loses the channel of `jobs`, which is given back unless it is dropped.
fn lose(
    loss: Loss,
    broker: &Broker<u32>,
    connection: &Connection<u32>,
    mut jobs: Deliveries<u32>,
) -> Option<Deliveries<u32>> {
    match loss {
        Loss::Connection => connection.drop_now(),
        Loss::AllConnections => broker.drop_connections(),
        Loss::Close => close(&mut jobs).now_or_never().unwrap(),
        Loss::Drop => return None,
    }
    Some(jobs)
}

#[test]
fn a_lost_channel_returns_its_unacked_to_the_front_in_order() {
    for loss in LOSSES {
        let broker = Broker::new();
        let queue = broker.queue("jobs").declare();
        (1..=6).for_each(|job| queue.publish(job));
        let connection = broker.connect().unwrap();
        let mut jobs = connection.subscribe(&queue, 4).unwrap();
        let held = take_all(&mut jobs);
        settle(&held[1], Verdict::Ack).unwrap();
        settle(&held[3], Verdict::retry()).unwrap();
        let _jobs = lose(loss, &broker, &connection, jobs);
        assert_eq!(counts(&queue), (5, 0, 0, 1, 0, 0), "{loss:?}");

        let mut jobs = queue.subscribe(10).unwrap();
        let told = take_all(&mut jobs);
        assert_eq!(payloads(&told), [1, 3, 4, 5, 6]);
        let tags: Vec<_> = told.iter().map(Job::tag).collect();
        let flags = tags.iter().map(|tag| tag.redelivered().unwrap());
        assert!(flags.eq([true, true, true, false, false]));
        let deliveries = tags.iter().map(|tag| tag.deliveries().unwrap());
        assert!(deliveries.eq([2, 2, 2, 1, 1]));
    }
}

#[test]
fn a_stale_tag_is_refused_while_its_twin_settles() {
    for loss in LOSSES {
        let broker = Broker::new();
        let queue = broker.queue("jobs").declare();
        queue.publish(1);
        let connection = broker.connect().unwrap();
        let mut jobs = connection.subscribe(&queue, 1).unwrap();
        let stale = take(&mut jobs);
        let _jobs = lose(loss, &broker, &connection, jobs);
        let verdicts = [
            Verdict::Ack,
            Verdict::retry(),
            Verdict::release(),
            Verdict::Reject,
        ];
        for verdict in verdicts {
            assert_eq!(
                settle(&stale, verdict),
                Err(DeliveryError::Stale),
                "{loss:?}"
            );
        }

        // The new channel has the same place in memory, if the old one is forgotten.
        let mut jobs = queue.subscribe(1).unwrap();
        let twin = take(&mut jobs);
        assert_eq!(settle(&stale, Verdict::Ack), Err(DeliveryError::Stale));
        assert_eq!(settle(&stale, Verdict::Abandon), Ok(()));
        assert_eq!(keep_alive(&stale.tag()), Ok(Lease::Lost));
        settle(&twin, Verdict::Ack).unwrap();
        assert_eq!(counts(&queue), (0, 0, 0, 1, 0, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn a_lost_connection_ends_its_streams_with_one_error() {
    let broker = Broker::new();
    let queue = broker.queue("jobs").declare();
    for loss in [Loss::Connection, Loss::AllConnections] {
        let connection = broker.connect().unwrap();
        let mut jobs = connection.subscribe(&queue, 1).unwrap();
        let mut sibling = connection.subscribe(&queue, 1).unwrap();
        let watching = tokio::spawn(async move { closed(&mut sibling).await });
        let waiting = tokio::spawn(async move {
            let items = [jobs.next().await, jobs.next().await];
            (
                items.map(|item| item.map(|item| item.map(|_| ()))),
                closed(&mut jobs).await,
            )
        });
        sleep(SECOND).await;
        match loss {
            Loss::Connection => connection.drop_now(),
            _ => broker.drop_connections(),
        }
        let lost = Err(SubscriptionError::Disconnected);
        assert_eq!(
            waiting.await.unwrap(),
            ([Some(lost), None], lost),
            "{loss:?}"
        );
        assert_eq!(watching.await.unwrap(), lost);
        let refused = connection.subscribe(&queue, 1).map(|_| ());
        assert_eq!(refused, Err(ConnectError::Disconnected));
        // The others, and the next ones, are not concerned.
        drop(queue.subscribe(1).unwrap());
    }
}

#[tokio::test(start_paused = true)]
async fn a_closed_channel_ends_its_stream_without_an_error() {
    let queue = queue();
    let mut jobs = queue.subscribe(1).unwrap();
    assert!(closed(&mut jobs).now_or_never().is_none());
    close(&mut jobs).await;
    assert!(jobs.next().await.is_none());
    assert_eq!(closed(&mut jobs).await, Ok(()));
    close(&mut jobs).await;
    assert!(jobs.next().await.is_none());
}

#[tokio::test(start_paused = true)]
async fn a_consumer_that_is_stopped_is_given_nothing_and_can_answer() {
    let queue = queue();
    (1..=3).for_each(|n| queue.publish(n));
    let mut stopped = queue.subscribe(2).unwrap();
    let held = take_all(&mut stopped);
    poll_fn(|cx| Pin::new(&mut stopped).poll_stop(cx)).await;
    settle(&held[0], Verdict::release()).unwrap();
    assert!(stopped.next().await.is_none());
    // Also of what was there when it was polled last.
    assert_eq!(counts(&queue), (2, 0, 1, 0, 0, 0));
    let mut other = queue.subscribe(5).unwrap();
    let taken = take_all(&mut other);
    assert_eq!(payloads(&taken), [1, 3]);
    assert_eq!(taken[0].tag().deliveries(), Some(1));
    settle(&held[1], Verdict::Ack).unwrap();
    taken
        .iter()
        .for_each(|job| settle(job, Verdict::Ack).unwrap());
    assert!(closed(&mut stopped).now_or_never().is_none());
    close(&mut stopped).await;
    closed(&mut stopped).await.unwrap();
    assert!(stopped.next().await.is_none());
    assert_eq!(counts(&queue), (0, 0, 0, 3, 0, 0));
}

#[tokio::test(start_paused = true)]
async fn what_a_consumer_releases_while_it_drains_goes_to_another_at_once() {
    let queue = queue();
    (1..=4).for_each(|n| queue.publish(n));
    let shutdown = CancellationToken::new();
    let layer = SentinelLayer::new(SettlePolicy::new(ack_on_success())).no_timeout();
    // Odd ones end after 10 s, even ones hang until they are told to stop.
    let service = ServiceBuilder::new()
        .concurrency_limit(2)
        .layer(layer.shutdown(shutdown.clone()))
        .service_fn(|job: Delivery<u32>| async move {
            match job.payload() % 2 {
                1 => sleep(10 * SECOND).await,
                _ => pending().await,
            }
            Ok::<_, Infallible>(())
        });
    let consumer = Consumer::new(queue.subscribe(2).unwrap(), service)
        .shutdown(shutdown)
        .drain_timeout(20 * SECOND)
        .with_graceful_shutdown(sleep(SECOND));
    let draining = tokio::spawn(consumer.into_future());
    sleep(2 * SECOND).await;
    let mut other = queue.subscribe(5).unwrap();
    let waiting = take_all(&mut other);
    assert_eq!(payloads(&waiting), [3, 4]);
    // The answer of 1 makes room for a job, which goes to another all the same.
    sleep(9 * SECOND).await;
    queue.publish(5);
    assert_eq!(*take(&mut other).payload(), 5);
    let released = timeout(15 * SECOND, other.next()).await;
    let released = released.expect("2 is released").unwrap().unwrap();
    assert_eq!(*released.payload(), 2);
    assert_eq!(released.tag().deliveries(), Some(1));
    let summary = draining.await.unwrap().unwrap();
    assert_eq!((summary.called, summary.charged), (2, 0));
}

#[tokio::test(start_paused = true)]
async fn what_a_channel_held_wakes_the_consumer_of_another() {
    for loss in LOSSES {
        let broker = Broker::new();
        let queue = broker.queue("jobs").declare();
        queue.publish(1);
        let connection = broker.connect().unwrap();
        let mut jobs = connection.subscribe(&queue, 1).unwrap();
        take(&mut jobs);
        // Another broker's restart would end the other consumer as well.
        if loss == Loss::AllConnections {
            continue;
        }
        let mut other = queue.subscribe(1).unwrap();
        let waiting = tokio::spawn(async move { other.next().await.unwrap().unwrap() });
        sleep(SECOND).await;
        let _jobs = lose(loss, &broker, &connection, jobs);
        assert_eq!(*waiting.await.unwrap().payload(), 1, "{loss:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_consumer_that_is_woken_and_dropped_keeps_no_job_from_another() {
    let queue = queue();
    let mut lazy = queue.subscribe(1).unwrap();
    let mut eager = queue.subscribe(1).unwrap();
    assert_idle(&mut lazy);
    let waiting = tokio::spawn(async move { eager.next().await.unwrap().unwrap() });
    sleep(SECOND).await;
    queue.publish(1);
    assert_eq!(*waiting.await.unwrap().payload(), 1);
    drop(lazy);
}

#[test]
fn connections_are_refused_on_demand() {
    let broker = Broker::new();
    let queue = broker.queue("jobs").declare();
    broker.refuse_connections(2);
    assert_eq!(broker.connect().map(|_| ()), Err(ConnectError::Refused));
    assert_eq!(queue.subscribe(1).map(|_| ()), Err(ConnectError::Refused));
    drop(queue.subscribe(1).unwrap());
    queue.publish(1);
}

// === leases ===

fn leased() -> Queue<u32> {
    Broker::new().queue("jobs").lease(LEASE).declare()
}

#[tokio::test(start_paused = true)]
async fn a_job_whose_lease_ends_is_given_to_another() {
    let queue = leased();
    queue.publish(1);
    let mut jobs = queue.subscribe(1).unwrap();
    let mut other = queue.subscribe(1).unwrap();
    let started = Instant::now();
    let late = take(&mut jobs);
    assert!(late.tag().capabilities().has_keep_alive());
    let twin = other.next().await.unwrap().unwrap();
    assert_eq!(started.elapsed(), LEASE);
    assert_eq!(twin.tag().deliveries(), Some(2));
    assert_eq!(twin.tag().redelivered(), Some(true));

    assert_eq!(keep_alive(&late.tag()), Ok(Lease::Lost));
    assert_eq!(settle(&late, Verdict::Ack), Err(DeliveryError::LeaseLost));
    assert_eq!(settle(&late, Verdict::Abandon), Ok(()));
    settle(&twin, Verdict::Ack).unwrap();
    assert_eq!(counts(&queue), (0, 0, 0, 1, 0, 0));

    // Its place is free: it is not held any more.
    queue.publish(2);
    assert_eq!(*take(&mut jobs).payload(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_consumer_that_waits_sees_the_end_of_a_later_lease() {
    let queue = leased();
    let mut jobs = queue.subscribe(1).unwrap();
    let mut other = queue.subscribe(1).unwrap();
    // It waits without a timer, as there is no lease yet, and is woken by the job below.
    let waiting = tokio::spawn(async move {
        let job = other.next().await.unwrap().unwrap();
        (*job.payload(), Instant::now())
    });
    sleep(Duration::ZERO).await;
    queue.publish(1);
    let _job = take(&mut jobs);
    let started = Instant::now();
    let (job, at) = waiting.await.unwrap();
    assert_eq!((job, at - started), (1, LEASE));
}

#[tokio::test(start_paused = true)]
async fn keep_alive_lets_the_lease_start_anew() {
    let queue = leased();
    (1..=2).for_each(|job| queue.publish(job));
    let mut jobs = queue.subscribe(2).unwrap();
    let (kept, left) = (take(&mut jobs), take(&mut jobs));
    for _ in 0..5 {
        advance(LEASE - SECOND).await;
        assert_eq!(keep_alive(&kept.tag()), Ok(Lease::Held));
    }
    assert_eq!(counts(&queue), (1, 0, 1, 0, 0, 0));
    assert_eq!(settle(&left, Verdict::Ack), Err(DeliveryError::LeaseLost));
    advance(LEASE - SECOND).await;
    settle(&kept, Verdict::Ack).unwrap();
    assert_eq!(counts(&queue), (1, 0, 0, 1, 0, 0));
}

#[tokio::test(start_paused = true)]
async fn the_end_of_a_lease_that_is_settled_is_none() {
    let queue = leased();
    let mut jobs = queue.subscribe(1_000).unwrap();
    queue.publish(u32::MAX);
    let first = take(&mut jobs);
    for job in 0..1_000 {
        queue.publish(job);
        settle(&take(&mut jobs), Verdict::Ack).unwrap();
    }
    advance(LEASE).await;
    assert_eq!(counts(&queue), (1, 0, 0, 1_000, 0, 0));
    assert_eq!(settle(&first, Verdict::Ack), Err(DeliveryError::LeaseLost));
}

#[test]
fn without_a_lease_a_keep_alive_is_refused() {
    let queue = queue();
    queue.publish(1);
    let mut jobs = queue.subscribe(1).unwrap();
    let tag = take(&mut jobs).tag();
    let expected = Capabilities::none().free_release().delay();
    assert_eq!(tag.capabilities(), expected);
    assert_eq!(keep_alive(&tag), Err(DeliveryError::NoLease));
}

#[test]
fn nothing_needs_a_runtime_unless_there_is_a_time_to_wait_for() {
    block_on(async {
        let queue = queue();
        queue.publish(1);
        let mut jobs = queue.subscribe(1).unwrap();
        let job = jobs.next().await.unwrap().unwrap();
        let settled = job.tag().settle(Verdict::retry_after(SECOND), reason());
        settled.await.unwrap();
        assert_eq!(counts(&queue), (0, 1, 0, 0, 0, 0));
    });
}

// === faults ===

#[test]
fn what_is_waited_for_comes_though_the_runtime_ends_in_which_the_wait_began() {
    let queue = queue();
    queue.publish(7);
    let mut jobs = queue.subscribe(1).unwrap();
    let job = take(&mut jobs);
    queue.delay_settlements(SECOND);
    let mut settlement = job.tag().settle(Verdict::retry_after(SECOND), reason());
    paused_time().block_on(async { assert!((&mut settlement).now_or_never().is_none()) });
    paused_time().block_on(settlement).unwrap();
    paused_time().block_on(async { assert_idle(&mut jobs) });
    let next = paused_time().block_on(jobs.next());
    assert_eq!(*next.unwrap().unwrap().payload(), 7);
}

#[test]
fn settlements_fail_on_demand() {
    let queue = queue();
    (0..2).for_each(|job| queue.publish(job));
    let mut jobs = queue.subscribe(2).unwrap();
    let held = take_all(&mut jobs);
    let settle = |tag: DeliveryTag<u32>| tag.settle(Verdict::Ack, reason()).now_or_never().unwrap();

    queue.fail_settlements(2, SettleFault::Again);
    queue.fail_settlements(1, SettleFault::Last);
    let again = settle(held[0].tag()).unwrap_err();
    assert_eq!(again.error, DeliveryError::Injected);
    let again = settle(again.tag.unwrap()).unwrap_err();
    let last = settle(again.tag.unwrap()).unwrap_err();
    assert_eq!(last.error, DeliveryError::Injected);
    assert!(last.tag.is_none());
    assert_eq!(counts(&queue), (0, 0, 2, 0, 0, 0));

    settle(held[1].tag()).unwrap();
    assert_eq!(counts(&queue), (0, 0, 1, 1, 0, 0));
    // Only the end of the channel frees the other.
    drop(jobs);
    assert_eq!(counts(&queue), (1, 0, 0, 1, 0, 0));
}

#[test]
fn an_injected_fault_is_kept_for_a_settlement_that_would_succeed() {
    let queue = queue();
    (0..2).for_each(|job| queue.publish(job));
    let mut jobs = queue.subscribe(2).unwrap();
    let held = take_all(&mut jobs);
    settle(&held[0], Verdict::Ack).unwrap();
    queue.fail_settlements(1, SettleFault::Last);
    assert_eq!(
        settle(&held[0], Verdict::Ack),
        Err(DeliveryError::AlreadySettled)
    );
    settle(&held[1], Verdict::Abandon).unwrap();
    queue.publish(3);
    drop(jobs);
    let mut jobs = queue.subscribe(2).unwrap();
    assert_eq!(
        settle(&take(&mut jobs), Verdict::Ack),
        Err(DeliveryError::Injected)
    );
}

#[tokio::test(start_paused = true)]
async fn settlements_are_delayed_on_demand() {
    let broker = Broker::new();
    let queue = broker.queue("jobs").declare();
    (0..3).for_each(|job| queue.publish(job));
    let mut jobs = queue.subscribe(3).unwrap();
    let held = take_all(&mut jobs);
    queue.delay_settlements(SECOND);

    let started = Instant::now();
    held[0].tag().settle(Verdict::Ack, reason()).await.unwrap();
    assert_eq!(started.elapsed(), SECOND);
    assert_eq!(counts(&queue), (0, 0, 2, 1, 0, 0));

    let dropped = held[1].tag().settle(Verdict::Ack, reason());
    timeout(SECOND / 2, dropped).await.unwrap_err();
    assert_eq!(counts(&queue), (0, 0, 2, 1, 0, 0));

    let late = tokio::spawn(held[2].tag().settle(Verdict::Ack, reason()));
    sleep(SECOND / 2).await;
    let lost = Instant::now();
    broker.drop_connections();
    assert_eq!(late.await.unwrap().unwrap_err().error, DeliveryError::Stale);
    assert_eq!(lost.elapsed(), Duration::ZERO);
    assert_eq!(counts(&queue), (2, 0, 0, 1, 0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_delayed_settlement_keeps_no_waker_once_it_is_made_or_dropped() {
    struct Idle;
    impl Wake for Idle {
        fn wake(self: Arc<Self>) {}
    }
    let queue = queue();
    (0..2).for_each(|job| queue.publish(job));
    let mut jobs = queue.subscribe(2).unwrap();
    let held = take_all(&mut jobs);
    queue.delay_settlements(SECOND);
    for is_dropped in [false, true] {
        let idle = Arc::new(Idle);
        let waker = Waker::from(Arc::clone(&idle));
        let mut cx = Context::from_waker(&waker);
        let tag = held[usize::from(is_dropped)].tag();
        let mut settlement = tag.settle(Verdict::Ack, reason());
        assert!(settlement.poll_unpin(&mut cx).is_pending());
        if !is_dropped {
            sleep(2 * SECOND).await;
            assert!(settlement.poll_unpin(&mut cx).is_ready());
        }
        drop((settlement, waker));
        assert_eq!(Arc::strong_count(&idle), 1, "dropped: {is_dropped}");
    }
}

// === with the rest of the crate ===

#[tokio::test(start_paused = true)]
async fn a_worker_settles_as_it_decides() {
    let broker = Broker::new();
    let queue = broker.queue("jobs").dead_letter("dead").declare();
    let mut jobs = queue.subscribe(2).unwrap();
    let policy = SettlePolicy::new(ack_on_success().delivery_limit(3).poison_on_panic());
    let mut worker = ServiceBuilder::new()
        .layer(jobs.gate())
        .layer(SentinelLayer::new(policy).timeout(SECOND))
        .service_fn(|job: Delivery<u32>| async move {
            match job.payload() {
                1 => panic!("poison"),
                2 => Err("the dependency is down"),
                3 => std::future::pending().await,
                _ => Ok(()),
            }
        });
    (0..4).for_each(|job| queue.publish(job));
    for _ in 0..8 {
        let job = jobs.next().await.unwrap().unwrap();
        call(&mut worker, job).await.unwrap();
    }
    assert_idle(&mut jobs);
    queue.emptied().now_or_never().unwrap();
    assert_eq!(counts(&queue), (0, 0, 0, 1, 3, 0));
    let letters = queue.dead_letters();
    let told = letters
        .iter()
        .map(|it| (it.payload, it.death.reason.kind, it.death.deliveries));
    let told: Vec<_> = told.collect();
    let expected = [
        (1, OutcomeKind::Panicked, 1),
        (2, OutcomeKind::Failed, 3),
        (3, OutcomeKind::TimedOut, 3),
    ];
    assert_eq!(told, expected);
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_an_empty_queue_is_told() {
    let broker = Broker::new();
    let queue = broker.queue("jobs").dead_letter("dead").declare();
    for verdict in [Verdict::Ack, Verdict::Reject] {
        queue.publish(1);
        let mut jobs = queue.subscribe(1).unwrap();
        let waiting = tokio::spawn({
            let queue = queue.clone();
            async move { queue.emptied().await }
        });
        settle(&take(&mut jobs), Verdict::retry_after(SECOND)).unwrap();
        let job = jobs.next().await.unwrap().unwrap();
        assert!(!waiting.is_finished());
        settle(&job, verdict).unwrap();
        waiting.await.unwrap();
    }
}

#[test]
fn a_payload_that_panics_when_it_is_cloned_stays_in_the_queue() {
    #[derive(Debug)]
    struct Sometimes(std::sync::Arc<std::sync::atomic::AtomicBool>);

    impl Clone for Sometimes {
        fn clone(&self) -> Self {
            let panics = self.0.swap(false, std::sync::atomic::Ordering::Relaxed);
            assert!(!panics, "no clone");
            Self(self.0.clone())
        }
    }

    let queue = Broker::new().queue("jobs").declare();
    queue.publish(Sometimes(std::sync::Arc::new(true.into())));
    let mut jobs = queue.subscribe(1).unwrap();
    let cloned = catch_unwind(std::panic::AssertUnwindSafe(|| {
        jobs.next().now_or_never().is_some()
    }));
    assert!(cloned.is_err());
    assert_eq!(queue.counts().ready, 1);
    let job = jobs.next().now_or_never().unwrap().unwrap().unwrap();
    job.tag()
        .settle(Verdict::Ack, reason())
        .now_or_never()
        .unwrap()
        .unwrap();
    assert_eq!(queue.counts().acked, 1);
}

#[test]
fn a_delivery_is_bytes_if_its_payload_is() {
    fn length(bytes: impl AsRef<[u8]>) -> usize {
        bytes.as_ref().len()
    }

    let queue = Broker::new().queue("jobs").declare();
    queue.publish("seven");
    let mut jobs = queue.subscribe(1).unwrap();
    assert_eq!(
        length(jobs.next().now_or_never().unwrap().unwrap().unwrap()),
        5
    );
}
