//! A consumer that supervises its handler itself: its limit, its tasks, its shutdown token.

use std::{
    collections::HashSet,
    convert::Infallible,
    future::{Ready, ready},
    panic::resume_unwind,
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};

use futures_util::FutureExt;
use tokio::{
    sync::Barrier,
    task,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;
use tower::{Service, ServiceBuilder, service_fn};
use tower_sentinel::{
    Consumer, Outcome, SentinelLayer, SettlePolicy, Verdict, ack_on_success,
    broker::memory::{Broker, Delivery as MemoryDelivery},
    consumer::EndCause,
    outcome::OutcomeKind,
    settle::decision::AckOnSuccess,
};

use crate::{
    consumer::ends,
    support::{
        Fate, Refused, Work, Worker,
        log::Log,
        subscription::{Channel, Delivery, End},
        until,
    },
};

const MS: fn(u64) -> Duration = Duration::from_millis;

/// Returns a handler without a sentinel.
fn handler() -> impl Service<Delivery, Response = (), Error = Refused, Future: Send + 'static>
+ Clone
+ Send
+ 'static {
    ServiceBuilder::new()
        .map_request(|delivery: Delivery| Work::new(delivery.fate))
        .service(Worker::default())
}

fn layer() -> SentinelLayer<SettlePolicy<AckOnSuccess>> {
    SentinelLayer::new(SettlePolicy::new(ack_on_success())).no_timeout()
}

#[tokio::test(start_paused = true)]
async fn no_more_jobs_are_in_flight_than_the_prefetch() {
    // Of one task, and of several that divide it; the last are more than it has places.
    for (prefetch, tasks) in [(1, 1), (5, 1), (5, 2), (6, 3), (2, 4)] {
        let channel = Channel::of(vec![Fate::Value; 100]);
        channel.prefetch(prefetch);
        let deliveries = channel.subscribe();
        let consumer = Consumer::parallel(deliveries, vec![handler(); tasks]).sentinel(layer());
        let consumer = consumer.with_graceful_shutdown(sleep(MS(1_000_000)));
        let summary = ends(consumer).await.unwrap();
        assert_eq!(channel.most_unsettled(), prefetch as u64, "{tasks} tasks");
        assert_eq!(summary.verdicts(Verdict::Ack), 100);
    }
}

#[tokio::test(start_paused = true)]
async fn a_session_that_reconnects_keeps_the_prefetch_of_its_subscription() {
    let channels = [3, 4].map(|prefetch| {
        let channel = Channel::of(vec![Fate::Value; 20]);
        channel.prefetch(prefetch);
        channel
    });
    let mut connects = channels.clone().into_iter();
    let consumer = Consumer::reconnecting(
        move || ready(connects.next().map(|it| it.subscribe()).ok_or(Refused)),
        |_| handler(),
    )
    .sentinel(layer())
    .tasks(2)
    .random(|| 0.0)
    .max_attempts(1);
    let consuming = tokio::spawn(ends(consumer));
    for channel in &channels {
        until(|| channel.verdicts().len() == 20).await;
        channel.end(End::Failed);
    }
    let error = consuming.await.unwrap().unwrap_err();
    assert!(matches!(error.cause(), EndCause::Connect(Refused)));
    assert_eq!(error.summary().verdicts(Verdict::Ack), 40);
    assert_eq!(channels.map(|it| it.most_unsettled()), [3, 4]);
}

/// Runs as many jobs as there are to be tasks, none of which ends before all of them run, and returns
/// in how many tasks they were settled.
async fn tasks_of(workers: usize) -> usize {
    let queue = Broker::new().queue("jobs").declare();
    (0..workers).for_each(|number| queue.publish(number));
    let deliveries = queue.subscribe(workers).unwrap();
    let tasks = Arc::new(Mutex::new(HashSet::new()));
    let seen = Arc::clone(&tasks);
    // The decision is called where the response future is polled.
    let decision = move |_: &_, outcome: &Outcome<(), Infallible>| {
        seen.lock().unwrap().insert(task::id());
        assert!(outcome.is_completed());
        Verdict::Ack
    };
    let all = Arc::new(Barrier::new(workers));
    let handler = service_fn(move |_: MemoryDelivery<usize>| {
        let all = Arc::clone(&all);
        async move {
            all.wait().await;
            Ok(())
        }
    });
    let summary = Consumer::new(deliveries, handler)
        .sentinel(SentinelLayer::new(SettlePolicy::new(decision)))
        .with_graceful_shutdown(async move {
            queue.emptied().await;
        })
        .await
        .unwrap();
    assert_eq!(summary.answered, workers as u64);
    tasks.lock().unwrap().len()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn there_is_a_task_for_each_worker_of_the_runtime() {
    assert_eq!(tasks_of(2).await, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 6)]
async fn there_are_four_tasks_at_most() {
    assert_eq!(tasks_of(4).await, 4);
    assert_eq!(tasks_of(6).await, 4);
}

#[tokio::test]
async fn there_is_one_task_in_a_runtime_of_one_thread() {
    assert_eq!(tasks_of(3).await, 1);
}

#[tokio::test(start_paused = true)]
async fn a_drain_stops_what_runs_and_does_not_drop_it() {
    let connects = |channel: &Channel| {
        let deliveries = channel.subscribe();
        let mut deliveries = Some(deliveries);
        move || ready(deliveries.take().ok_or(Refused))
    };
    for reconnects in [false, true] {
        let channel = Channel::of([Fate::Hang; 3]);
        channel.prefetch(2);
        let started = Instant::now();
        let summary = match reconnects {
            false => ends(
                Consumer::new(channel.subscribe(), handler())
                    .sentinel(layer())
                    .drain_timeout(MS(100))
                    .with_graceful_shutdown(sleep(MS(500))),
            )
            .await
            .map_err(drop),
            true => ends(
                Consumer::reconnecting(connects(&channel), |_| handler())
                    .sentinel(layer())
                    .tasks(2)
                    .drain_timeout(MS(100))
                    .with_graceful_shutdown(sleep(MS(500))),
            )
            .await
            .map_err(drop),
        };
        let summary = summary.unwrap();
        assert_eq!((summary.called, summary.abandoned), (2, 0));
        assert_eq!(summary.outcomes(OutcomeKind::Cancelled), 2);
        assert_eq!(channel.verdicts(), [Verdict::release(); 2]);
        assert_eq!((channel.stale(), channel.closed()), (0, 1));
        let late = started.elapsed() - MS(600);
        assert!(late < MS(20), "{late:?} late");
    }
}

#[tokio::test(start_paused = true)]
async fn each_session_has_a_token_of_its_own() {
    let tokens = Arc::new(Mutex::new(Vec::<CancellationToken>::new()));
    let channels = [Fate::Hang, Fate::Value].map(|fate| Channel::of([fate; 2]));
    let mut connects = channels.clone().into_iter();
    let seen = Arc::clone(&tokens);
    let consumer = Consumer::reconnecting(
        move || ready(connects.next().map(|it| it.subscribe()).ok_or(Refused)),
        move |shutdown| {
            seen.lock().unwrap().push(shutdown);
            handler()
        },
    )
    .sentinel(layer())
    .tasks(2)
    .drain_timeout(MS(100))
    .random(|| 0.0)
    .max_attempts(1);
    let consuming = tokio::spawn(ends(consumer));
    let [first, second] = channels;
    until(|| first.taken() == 2).await;
    first.end(End::Failed);
    until(|| second.verdicts().len() == 2).await;
    assert_eq!(first.verdicts(), [Verdict::release(); 2]);
    assert_eq!(second.verdicts(), [Verdict::Ack; 2]);
    let cancelled = || Vec::from_iter(tokens.lock().unwrap().iter().map(|it| it.is_cancelled()));
    // One handler for a session, whose clones are for its tasks.
    assert_eq!(cancelled(), [true, false]);
    second.end(End::Ended);
    assert!(consuming.await.unwrap().is_err());
    assert_eq!(cancelled(), [true; 3]);
}

#[tokio::test(start_paused = true)]
async fn a_token_of_the_layer_stops_the_jobs_of_each_session_and_is_left_alone() {
    let shutdown = CancellationToken::new();
    let channels = [(); 2].map(|()| Channel::of([Fate::Hang]));
    let mut connects = channels.clone().into_iter();
    let consumer = Consumer::reconnecting(
        move || ready(connects.next().map(|it| it.subscribe()).ok_or(Refused)),
        |_| handler(),
    )
    .sentinel(layer().shutdown(shutdown.clone()))
    .drain_timeout(MS(100))
    .random(|| 0.0);
    let consuming = tokio::spawn(ends(consumer));
    let [first, second] = &channels;
    until(|| first.taken() == 1).await;
    first.end(End::Failed);
    until(|| second.taken() == 1).await;
    assert!(!shutdown.is_cancelled());
    shutdown.cancel();
    let summary = consuming.await.unwrap().unwrap();
    assert_eq!((summary.called, summary.abandoned), (2, 0));
    for channel in &channels {
        assert_eq!(channel.verdicts(), [Verdict::release()]);
    }

    let shutdown = CancellationToken::new();
    let channel = Channel::of([Fate::Hang]);
    let consumer = Consumer::new(channel.subscribe(), handler())
        .sentinel(layer().shutdown(shutdown.clone()))
        .drain_timeout(MS(100))
        .with_graceful_shutdown(sleep(MS(500)));
    assert_eq!(
        ends(consumer).await.unwrap().verdicts(Verdict::release()),
        1
    );
    assert!(!shutdown.is_cancelled());
}

#[tokio::test(start_paused = true)]
async fn a_token_that_is_cancelled_in_a_drain_stops_what_runs() {
    let channel = Channel::of([Fate::Hang; 2]);
    let shutdown = CancellationToken::new();
    let started = Instant::now();
    let handlers = vec![handler(); 2];
    let consumer = Consumer::parallel(channel.subscribe(), handlers)
        .sentinel(layer().shutdown(shutdown.clone()))
        .with_graceful_shutdown(sleep(MS(500)));
    let consuming = tokio::spawn(ends(consumer));
    sleep(MS(700)).await;
    shutdown.cancel();
    let summary = consuming.await.unwrap().unwrap();
    assert_eq!((summary.called, summary.abandoned), (2, 0));
    assert_eq!(channel.verdicts(), [Verdict::release(); 2]);
    let late = started.elapsed() - MS(700);
    assert!(late < MS(20), "{late:?} late");
}

#[tokio::test(start_paused = true)]
async fn a_token_of_the_consumer_is_that_of_its_sentinel() {
    let channel = Channel::of([Fate::Hang]);
    let shutdown = CancellationToken::new();
    let consumer = Consumer::new(channel.subscribe(), handler())
        .sentinel(layer())
        .shutdown(shutdown.clone());
    let consuming = tokio::spawn(ends(consumer));
    until(|| channel.taken() == 1).await;
    shutdown.cancel();
    let summary = consuming.await.unwrap().unwrap();
    assert_eq!(summary.verdicts(Verdict::release()), 1);
}

#[tokio::test]
#[should_panic = "the consumer and the layer have a shutdown token each"]
async fn a_token_for_the_consumer_and_one_for_the_layer_are_refused() {
    let channel = Channel::of([]);
    let consumer = Consumer::new(channel.subscribe(), handler())
        .shutdown(CancellationToken::new())
        .sentinel(layer().shutdown(CancellationToken::new()));
    drop(consumer.run());
}

#[tokio::test(start_paused = true)]
async fn a_handler_that_panics_as_it_is_cloned_makes_no_service() {
    struct Brittle;

    impl Clone for Brittle {
        fn clone(&self) -> Self {
            resume_unwind(Box::new("in clone"))
        }
    }

    impl Service<Delivery> for Brittle {
        type Response = ();
        type Error = Refused;
        type Future = Ready<Result<(), Refused>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Refused>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: Delivery) -> Self::Future {
            ready(Ok(()))
        }
    }

    let channel = Channel::of([Fate::Value]);
    let consumer = Consumer::new(channel.subscribe(), Brittle).sentinel(layer());
    let error = ends(consumer).await.unwrap_err();
    assert!(matches!(error.cause(), EndCause::MakeServicePanicked(_)));
    assert_eq!(channel.taken(), 0);
}

#[tokio::test(start_paused = true)]
async fn handlers_beyond_the_prefetch_are_the_last_ones() {
    let queue = Broker::new().queue("jobs").declare();
    (0..8).for_each(|job| queue.publish(job));
    let used = Arc::new(Mutex::new(HashSet::new()));
    let handlers = [0, 1, 2].map(|number| {
        let used = Arc::clone(&used);
        service_fn(move |_: MemoryDelivery<u32>| {
            used.lock().unwrap().insert(number);
            sleep(MS(100)).map(Ok::<_, Infallible>)
        })
    });
    let consumer = Consumer::parallel(queue.subscribe(2).unwrap(), handlers)
        .sentinel(layer())
        .with_graceful_shutdown(sleep(MS(10_000)));
    ends(consumer).await.unwrap();
    assert_eq!(*used.lock().unwrap(), HashSet::from([0, 1]));
}

#[tokio::test(start_paused = true)]
async fn a_token_on_one_side_only_is_warned_of_at_the_start() {
    let sides = [(false, false), (true, false), (false, true), (true, true)];
    for (consumer_has, sentinel_has) in sides {
        let (log, _logging) = Log::start();
        let warnings = || {
            let lines = log.lines();
            let of_token = lines.iter().filter(|it| it.contains("only one side has"));
            of_token.count()
        };
        let stack = |token: Option<CancellationToken>| {
            let layer = match token {
                Some(token) => layer().shutdown(token),
                None => layer(),
            };
            ServiceBuilder::new()
                .concurrency_limit(1)
                .layer(layer)
                .service(handler())
        };
        let shutdown = CancellationToken::new();
        let token = sentinel_has.then(|| shutdown.clone());
        let channel = Channel::of([Fate::Value; 3]);
        let services = [(); 3].map(|()| stack(token.clone()));
        let mut consumer = Consumer::parallel(channel.subscribe(), services)
            .with_graceful_shutdown(sleep(MS(10_000)));
        if consumer_has {
            consumer = consumer.shutdown(shutdown);
        }
        assert_eq!(ends(consumer).await.unwrap().answered, 3);
        assert_eq!(warnings(), usize::from(consumer_has != sentinel_has));

        // The token of a session is never missing.
        let channel = Channel::of([Fate::Value]);
        let connect = move || ready(Ok::<_, Refused>(channel.subscribe()));
        let consumer =
            Consumer::reconnecting(connect, move |token| stack(sentinel_has.then_some(token)));
        let before = warnings();
        ends(consumer.with_graceful_shutdown(sleep(MS(10_000))))
            .await
            .unwrap();
        assert_eq!(warnings() - before, usize::from(!sentinel_has));
    }
}
