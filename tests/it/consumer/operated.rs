//! Handles that operate a consumer: its size, and the list of its jobs.

use std::{
    convert::Infallible,
    fmt,
    future::pending,
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{
    sync::Semaphore,
    time::{Instant, sleep},
};
use tower::{ServiceBuilder, service_fn};
use tower_sentinel::{
    Consumer, Outcome, SentinelLayer, SettlePolicy, Verdict, ack_on_success,
    broker::memory::{Broker, Delivery, DeliveryTag, Queue},
    cancelled,
    consumer::{State, Watch},
    outcome::OutcomeKind,
};

use super::watch::handler;
use crate::support::log::Log;

const S: fn(u64) -> Duration = Duration::from_secs;

macro_rules! layer {
    () => {
        SentinelLayer::new(SettlePolicy::new(ack_on_success())).no_timeout()
    };
}

/// A queue with jobs numbered from 0 on.
fn queue(jobs: u32) -> Queue<u32> {
    let queue = Broker::new().queue("jobs").declare();
    (0..jobs).for_each(|job| queue.publish(job));
    queue
}

fn running(watch: &Watch) -> usize {
    match watch.state() {
        State::Consuming(progress) | State::Saturated(progress) | State::Draining(progress) => {
            progress.running
        }
        other => panic!("{other:?}"),
    }
}

// === resize ===

#[tokio::test(start_paused = true)]
async fn the_size_bounds_the_jobs_of_all_tasks() {
    let (permits, queue) = (Arc::new(Semaphore::new(0)), queue(100));
    let services = [(); 3].map(|()| handler(&permits));
    let consumer = Consumer::parallel(queue.subscribe(16).unwrap(), services).sentinel(layer!());
    let watch = consumer.watch();
    watch.resize(5);
    tokio::spawn(consumer.run());
    // Up, beyond the prefetch, down to fewer than there are tasks, to none.
    for (size, runs) in [(5, 5), (8, 8), (100, 16)] {
        watch.resize(size);
        sleep(S(1)).await;
        assert_eq!(running(&watch), runs, "{size}");
        assert!(matches!(watch.state(), State::Saturated(_)), "{watch:?}");
    }
    for (size, runs) in [(2, 2), (0, 0)] {
        watch.resize(size);
        sleep(S(1)).await;
        // Those that run go on.
        let before = running(&watch);
        assert!(before > runs, "{size}");
        permits.add_permits(before);
        sleep(S(1)).await;
        assert_eq!(running(&watch), runs, "{size}");
    }
    watch.resize(usize::MAX);
    permits.add_permits(1_000);
    queue.emptied().await;
    assert_eq!(queue.counts().acked, 100);
}

#[tokio::test(start_paused = true)]
async fn the_size_bounds_a_consumer_without_a_limit_of_its_own() {
    let (permits, queue) = (Arc::new(Semaphore::new(0)), queue(100));
    let service = ServiceBuilder::new()
        .concurrency_limit(10)
        .layer(layer!())
        .service(handler(&permits));
    let consumer = Consumer::new(queue.subscribe(16).unwrap(), service);
    let watch = consumer.watch();
    tokio::spawn(consumer.run());
    for (size, runs) in [(4, 4), (12, 10)] {
        watch.resize(size);
        sleep(S(1)).await;
        let State::Saturated(progress) = watch.state() else {
            sleep(S(1)).await;
            assert_eq!(running(&watch), runs);
            continue;
        };
        assert_eq!(progress.running, runs);
    }
}

#[tokio::test(start_paused = true)]
async fn the_size_holds_for_later_sessions() {
    let permits = Arc::new(Semaphore::new(0));
    let broker = Broker::new();
    let queue = broker.queue("jobs").declare();
    (0..100).for_each(|job| queue.publish(job));
    let jobs = queue.clone();
    let connect = move || std::future::ready(jobs.subscribe(16));
    let consumer = Consumer::reconnecting(connect, move |_| handler(&permits)).sentinel(layer!());
    let watch = consumer.watch();
    watch.resize(3);
    tokio::spawn(consumer.run());
    sleep(S(1)).await;
    assert_eq!(running(&watch), 3);
    broker.drop_connections();
    // The jobs of the first session are still there.
    sleep(S(20)).await;
    let State::Saturated(progress) = watch.state() else {
        panic!("{watch:?}");
    };
    assert_eq!(progress.free, Some(0));
    assert_eq!(queue.counts().unacked, 3);
}

// === jobs ===

#[tokio::test(start_paused = true)]
async fn each_running_job_is_listed_once() {
    // More than a task polls in one go, over several tasks.
    let (permits, queue) = (Arc::new(Semaphore::new(0)), queue(600));
    let services = [(); 3].map(|()| handler(&permits));
    let layer = SentinelLayer::new(SettlePolicy::new(ack_on_success())).timeout(S(60));
    let consumer = Consumer::parallel(queue.subscribe(500).unwrap(), services).sentinel(layer);
    let watch = consumer.watch();
    assert!(watch.jobs().await.is_empty());
    let begun = Instant::now();
    let consumer = tokio::spawn(consumer.run());
    sleep(S(10)).await;

    let jobs = watch.jobs().await;
    assert_eq!(jobs.len(), 500);
    let mut ids: Vec<_> = jobs.iter().map(|job| job.id.to_string()).collect();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 500);
    for job in &jobs {
        assert_eq!((job.since, job.time_left), (begun, Some(S(50))));
        assert!(!job.is_told_to_stop && !job.is_blocking);
        assert_eq!((&job.message_id, job.span), (&None, None));
    }

    permits.add_permits(300);
    sleep(S(1)).await;
    // The oldest are first.
    let jobs = watch.jobs().await;
    assert_eq!(jobs.len(), 300);
    assert_eq!(jobs[199].since, begun);
    assert_eq!(jobs[200].since, begun + S(10));

    // Also while they drain.
    watch.drain();
    sleep(S(1)).await;
    assert_eq!(watch.jobs().await.len(), 300);
    permits.add_permits(300);
    consumer.await.unwrap().unwrap();
    assert!(watch.jobs().await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_job_is_listed_with_its_tag_its_message_and_its_span() {
    let (permits, queue) = (Arc::new(Semaphore::new(0)), queue(1));
    let (_log, _guard) = Log::start();
    let service = ServiceBuilder::new()
        .layer(layer!().process_span())
        .service(handler(&permits));
    let consumer = Consumer::new(queue.subscribe(4).unwrap(), service);
    let watch = consumer.watch();
    tokio::spawn(consumer.run());
    sleep(S(1)).await;
    let jobs = watch.jobs().await;
    assert_eq!(jobs.len(), 1);
    assert!(jobs[0].tag.contains("Tag"), "{:?}", jobs[0].tag);
    assert!(jobs[0].message_id.is_some());
    assert_eq!(jobs[0].span, Some("process"));
    assert_eq!(jobs[0].time_left, None);
}

#[tokio::test(start_paused = true)]
async fn a_tag_that_cannot_be_printed_is_listed_too() {
    struct Unprintable;

    impl fmt::Debug for Unprintable {
        fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
            panic!("no")
        }
    }

    let queue = queue(2);
    let policy = service_fn(|_| async { Ok::<_, Infallible>(()) });
    let layer = SentinelLayer::with_tag(policy, |_: &Delivery<u32>| Unprintable).no_timeout();
    let service = ServiceBuilder::new()
        .layer(layer)
        .service_fn(|_: Delivery<u32>| pending::<Result<(), Infallible>>());
    let consumer = Consumer::new(queue.subscribe(4).unwrap(), service);
    let watch = consumer.watch();
    tokio::spawn(consumer.run());
    sleep(S(1)).await;
    let jobs = watch.jobs().await;
    assert_eq!(jobs.len(), 2);
    assert_eq!(&*jobs[0].tag, "the tag cannot be printed: no");
}

#[tokio::test(start_paused = true)]
async fn a_list_that_nobody_waits_for_does_no_harm() {
    let (permits, queue) = (Arc::new(Semaphore::new(0)), queue(3));
    let consumer = Consumer::new(queue.subscribe(4).unwrap(), handler(&permits)).sentinel(layer!());
    let watch = consumer.watch();
    let consumer = tokio::spawn(consumer.run());
    sleep(S(1)).await;
    let mut dropped = Box::pin(watch.jobs());
    assert!(futures_util::poll!(&mut dropped).is_pending());
    drop(dropped);
    let (one, other) = tokio::join!(watch.jobs(), watch.jobs());
    assert_eq!((one.len(), other.len()), (3, 3));
    permits.add_permits(3);
    watch.drain();
    assert_eq!(consumer.await.unwrap().unwrap().answered, 3);
}

// === cancel ===

#[tokio::test(start_paused = true)]
async fn a_cancelled_job_is_stopped_by_the_ladder_and_settled_alone() {
    let queue = queue(3);
    let stopped = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&stopped);
    let service = service_fn(move |delivery: Delivery<u32>| {
        let seen = Arc::clone(&seen);
        async move {
            cancelled().await;
            seen.lock().unwrap().push(*delivery.payload());
            pending::<Result<(), Infallible>>().await
        }
    });
    let decision = |_: &DeliveryTag<u32>, _: &Outcome<(), Infallible>| Verdict::Reject;
    let layer = SentinelLayer::new(SettlePolicy::new(decision));
    let layer = layer.no_timeout().grace(S(5)).process_span();
    let consumer = Consumer::new(queue.subscribe(4).unwrap(), service).sentinel(layer);
    let watch = consumer.watch();
    let consumer = tokio::spawn(consumer.run());
    sleep(S(1)).await;
    let jobs = watch.jobs().await;
    assert_eq!(jobs.len(), 3);

    assert!(watch.cancel(jobs[1].id).await);
    sleep(S(1)).await;
    assert_eq!(stopped.lock().unwrap().len(), 1);
    let now = watch.jobs().await;
    let told: Vec<_> = now
        .iter()
        .map(|job| (job.id, job.is_told_to_stop))
        .collect();
    assert_eq!(told.len(), 3);
    for (id, is_told) in told {
        assert_eq!(is_told, id == jobs[1].id);
    }
    // A second time is as good as once.
    assert!(watch.cancel(jobs[1].id).await);
    sleep(S(5)).await;
    assert!(!watch.cancel(jobs[1].id).await);
    assert_eq!(watch.jobs().await.len(), 2);
    assert_eq!(queue.counts().dropped, 1);
    assert_eq!(queue.counts().unacked, 2);

    watch.cancel(jobs[0].id).await;
    watch.cancel(jobs[2].id).await;
    watch.drain();
    let summary = consumer.await.unwrap().unwrap();
    assert_eq!(summary.outcomes(OutcomeKind::Cancelled), 3);
    assert_eq!(queue.counts().dropped, 3);
}
