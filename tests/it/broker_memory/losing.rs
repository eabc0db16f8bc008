//! Channels that are lost, closed and stopped.

use std::{
    convert::Infallible,
    future::{IntoFuture, pending, poll_fn},
    pin::Pin,
};

use futures_util::{FutureExt, StreamExt};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tower::ServiceBuilder;
use tower_sentinel::{
    Consumer, Job, SentinelLayer, SettlePolicy, Verdict, ack_on_success,
    broker::memory::{
        Broker, ConnectError, Connection, Deliveries, Delivery, DeliveryError, SubscriptionError,
    },
    consumer::Subscription as _,
    settle::{Lease, Settle},
};

use super::{SECOND, assert_idle, counts, keep_alive, payloads, queue, settle, take, take_all};

// === driving ===

async fn closed(jobs: &mut Deliveries<u32>) -> Result<(), SubscriptionError> {
    poll_fn(|cx| Pin::new(&mut *jobs).poll_closed(cx)).await
}

async fn close(jobs: &mut Deliveries<u32>) {
    poll_fn(|cx| Pin::new(&mut *jobs).poll_close(cx)).await;
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
    // Also those that were there when it was polled last.
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
    // Odd ones end after 10 s, even ones hang until they are cancelled.
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
    // The settlement of 1 makes room for a job, which goes to another consumer all the same.
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
