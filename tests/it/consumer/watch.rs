//! Handles to a consumer: its states, its counts, and its pauses.

use std::{
    convert::Infallible,
    future::{pending, ready},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::Semaphore,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tower::{Service, service_fn};
use tower_sentinel::{
    Consumer, Outcome, SentinelLayer, SettlePolicy, Verdict, ack_on_success,
    broker::memory::{Broker, Delivery, DeliveryTag, Queue},
    consumer::{AfterError, Escalation, Pauser, State, Watch, connect_fn},
};

use crate::support::Refused;

const S: fn(u64) -> Duration = Duration::from_secs;

macro_rules! layer {
    () => {
        SentinelLayer::new(SettlePolicy::new(ack_on_success())).no_timeout()
    };
}

/// A handler whose jobs run until they have a permit.
pub(super) fn handler(
    permits: &Arc<Semaphore>,
) -> impl Service<Delivery<u32>, Response = (), Error = Infallible, Future: Send> + Clone + Send + use<>
{
    let permits = Arc::clone(permits);
    service_fn(move |_: Delivery<u32>| {
        let permits = Arc::clone(&permits);
        async move {
            permits.acquire().await.unwrap().forget();
            Ok(())
        }
    })
}

/// Waits in virtual time, and fails instead of hanging.
async fn emptied(queue: &Queue<u32>) {
    let emptied = timeout(S(1_000), queue.emptied()).await;
    emptied.expect("the jobs are taken");
}

/// A queue with `jobs`, and a consumer that runs.
fn running(jobs: u32, prefetch: usize, permits: &Arc<Semaphore>) -> (Queue<u32>, Watch) {
    running_on(&Broker::new(), jobs, prefetch, permits)
}

fn running_on(
    broker: &Broker<u32>,
    jobs: u32,
    prefetch: usize,
    permits: &Arc<Semaphore>,
) -> (Queue<u32>, Watch) {
    let queue = broker.queue("jobs").declare();
    (0..jobs).for_each(|job| queue.publish(job));
    let consumer = Consumer::new(queue.subscribe(prefetch).unwrap(), handler(permits));
    let consumer = consumer.sentinel(layer!());
    let watch = consumer.watch();
    assert_eq!(watch.state(), State::Idle);
    assert!(watch.is_live() && !watch.is_ready());
    tokio::spawn(consumer.run());
    (queue, watch)
}

#[tokio::test(start_paused = true)]
async fn the_counts_are_those_of_all_tasks() {
    let permits = Arc::new(Semaphore::new(0));
    let queue = Broker::new().queue("jobs").declare();
    (0..7).for_each(|job| queue.publish(job));
    let services = [(); 3].map(|()| handler(&permits));
    let consumer = Consumer::parallel(queue.subscribe(8).unwrap(), services).sentinel(layer!());
    let watch = consumer.watch();
    let begun = Instant::now();
    tokio::spawn(consumer.run());
    sleep(S(1)).await;
    let State::Consuming(progress) = watch.state() else {
        panic!("{watch:?}");
    };
    assert_eq!((progress.running, progress.free), (7, Some(1)));
    assert_eq!((progress.called, progress.ended), (7, 0));
    assert_eq!(
        (progress.last_delivery, progress.last_settled),
        (Some(begun), None)
    );

    queue.publish(7);
    sleep(S(1)).await;
    let State::Saturated(progress) = watch.state() else {
        panic!("{watch:?}");
    };
    assert_eq!((progress.running, progress.free), (8, Some(0)));
    assert_eq!(progress.last_delivery, Some(begun + S(1)));
    assert!(watch.is_ready());

    permits.add_permits(6);
    sleep(S(1)).await;
    let State::Consuming(progress) = watch.state() else {
        panic!("{watch:?}");
    };
    assert_eq!((progress.running, progress.free), (2, Some(6)));
    assert_eq!((progress.called, progress.ended), (8, 6));
    assert_eq!(progress.last_settled, Some(begun + S(2)));
}

#[tokio::test(start_paused = true)]
async fn the_last_delivery_and_the_last_settlement_have_a_time_each() {
    let permits = Arc::new(Semaphore::new(0));
    let (_queue, watch) = running(2, 1, &permits);
    let begun = Instant::now();
    let progress = async || {
        sleep(S(10)).await;
        let (State::Consuming(progress) | State::Saturated(progress)) = watch.state() else {
            panic!("{watch:?}");
        };
        permits.add_permits(1);
        let since = |it: Option<Instant>| it.map(|it| it - begun);
        let delivered = since(progress.last_delivery);
        (progress.running, delivered, since(progress.last_settled))
    };
    assert_eq!(progress().await, (1, Some(S(0)), None));
    assert_eq!(progress().await, (1, Some(S(10)), Some(S(10))));
    assert_eq!(progress().await, (0, Some(S(10)), Some(S(20))));
}

#[tokio::test(start_paused = true)]
async fn calls_that_fail_have_ended_like_those_that_succeed() {
    let queue = Broker::new().queue("jobs").declare();
    let service = service_fn(|job: Delivery<u32>| {
        ready(match job.payload() % 3 {
            0 => Err(Refused),
            _ => Ok(()),
        })
    });
    let consumer = Consumer::new(queue.subscribe(7).unwrap(), service)
        .escalation(|_: &Refused| Escalation::Call)
        .on_error(AfterError::Continue);
    let watch = consumer.watch();
    tokio::spawn(consumer.run());
    for job in 0..7 {
        queue.publish(job);
        sleep(S(1)).await;
        let State::Consuming(progress) = watch.state() else {
            panic!("{watch:?}");
        };
        let all = u64::from(job) + 1;
        assert_eq!((progress.called, progress.ended), (all, all));
        assert_eq!(progress.running, 0);
    }
}

#[tokio::test(start_paused = true)]
async fn jobs_of_a_session_that_was_given_up_are_counted_no_more() {
    let broker = Broker::new();
    let queue = broker.queue("jobs").declare();
    queue.publish(7);
    let service = service_fn(|_: Delivery<u32>| pending::<Result<(), Infallible>>());
    let consumer = Consumer::reconnecting(move || ready(queue.subscribe(4)), move |_| service);
    let watch = consumer.watch();
    tokio::spawn(consumer.run());
    for _ in 0..2 {
        sleep(S(60)).await;
        // The job came again after the loss, and the call of the first session was dropped.
        let State::Consuming(progress) = watch.state() else {
            panic!("{watch:?}");
        };
        assert_eq!(progress.running, 1);
        broker.drop_connections();
    }
}

#[tokio::test(start_paused = true)]
async fn a_paused_consumer_takes_no_jobs_until_it_is_resumed() {
    let permits = Arc::new(Semaphore::new(100));
    let (queue, watch) = running(0, 4, &permits);
    sleep(S(1)).await;
    for round in 0..3 {
        watch.pause();
        sleep(S(1)).await;
        assert!(
            matches!(
                watch.state(),
                State::Paused {
                    by: Pauser::Operator,
                    ..
                }
            ),
            "{watch:?}"
        );
        assert!(!watch.is_ready() && watch.is_live());
        (0..2).for_each(|job| queue.publish(job));
        sleep(S(100)).await;
        assert_eq!(queue.counts().acked, 2 * round);
        // A pause that is renewed at once has never ended.
        watch.resume();
        watch.pause();
        sleep(S(1)).await;
        assert_eq!(queue.counts().acked, 2 * round);
        watch.resume();
        emptied(&queue).await;
        assert_eq!(queue.counts().acked, 2 * (round + 1));
    }
}

#[tokio::test(start_paused = true)]
async fn jobs_that_run_go_on_in_a_pause() {
    let permits = Arc::new(Semaphore::new(0));
    let (queue, watch) = running(4, 2, &permits);
    sleep(S(1)).await;
    watch.pause();
    permits.add_permits(100);
    sleep(S(1)).await;
    assert_eq!(queue.counts().acked, 2);
    watch.resume();
    emptied(&queue).await;
}

#[tokio::test(start_paused = true)]
async fn a_paused_consumer_ends_on_request_and_with_its_subscription() {
    let permits = Arc::new(Semaphore::new(0));
    let (_queue, mut watch) = running(0, 4, &permits);
    assert!(matches!(watch.changed().await, State::Consuming(_)));
    watch.pause();
    watch.drain();
    while watch.state() != State::Ended {
        watch.changed().await;
    }
    assert!(!watch.is_live());

    let broker = Broker::new();
    let (_queue, mut watch) = running_on(&broker, 0, 4, &permits);
    watch.changed().await;
    watch.pause();
    sleep(S(1)).await;
    broker.drop_connections();
    while watch.state() != State::Ended {
        watch.changed().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_drain_is_seen_with_what_still_runs() {
    let permits = Arc::new(Semaphore::new(0));
    let (_queue, watch) = running(3, 4, &permits);
    sleep(S(1)).await;
    watch.drain();
    sleep(S(1)).await;
    let State::Draining(progress) = watch.state() else {
        panic!("{watch:?}");
    };
    assert_eq!(progress.running, 3);
    assert!(watch.is_live() && !watch.is_ready());
    permits.add_permits(1);
    sleep(S(1)).await;
    let State::Draining(progress) = watch.state() else {
        panic!("{watch:?}");
    };
    assert_eq!((progress.running, progress.ended), (2, 1));
    permits.add_permits(2);
    sleep(S(1)).await;
    assert_eq!(watch.state(), State::Ended);
}

#[tokio::test(start_paused = true)]
async fn the_attempts_to_connect_are_seen_with_their_causes() {
    let broker = Broker::<u32>::new();
    let queue = broker.queue("jobs").declare();
    let connect = connect_fn(move |attempt| {
        let queue = queue.clone();
        async move {
            sleep(S(1)).await;
            match attempt {
                1 | 2 => Err(format!("refused {attempt}")),
                _ => queue.subscribe(4).map_err(|error| error.to_string()),
            }
        }
    });
    let permits = Arc::new(Semaphore::new(0));
    let consumer = Consumer::reconnecting(connect, move |_| handler(&permits))
        .sentinel(layer!())
        .random(|| 1.0)
        .backoff(S(10)..=S(10));
    let watch = consumer.watch();
    let begun = Instant::now();
    tokio::spawn(consumer.run());
    // Within the first attempt, the pause, the second attempt, the pause.
    for (millis, number, cause) in [
        (500, 1, None),
        (2_000, 2, Some("refused 1")),
        (11_500, 2, Some("refused 1")),
        (13_000, 3, Some("refused 2")),
    ] {
        tokio::time::sleep_until(begun + Duration::from_millis(millis)).await;
        let State::Connecting {
            attempt,
            since,
            error,
        } = watch.state()
        else {
            panic!("{watch:?}");
        };
        assert_eq!((attempt, since), (number, begun));
        match cause {
            None => assert_eq!(error, None),
            Some(cause) => assert!(error.unwrap().contains(cause)),
        }
        assert!(watch.is_live() && !watch.is_ready());
    }
    // Longer than the longest pause, so that the session has worked.
    sleep(S(30)).await;
    assert!(watch.is_ready(), "{watch:?}");
    let lost = Instant::now();
    broker.drop_connections();
    sleep(S(1)).await;
    let State::Connecting {
        attempt,
        since,
        error,
    } = watch.state()
    else {
        panic!("{watch:?}");
    };
    assert_eq!((attempt, since), (1, lost));
    assert!(error.is_some());
}

/// A service that never becomes ready, as one whose intensity is too high for ever.
#[derive(Clone)]
struct Never;

impl Service<Delivery<u32>> for Never {
    type Response = ();
    type Error = Infallible;
    type Future = std::future::Ready<Result<(), Infallible>>;

    fn poll_ready(
        &mut self,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Result<(), Infallible>> {
        std::task::Poll::Pending
    }

    fn call(&mut self, _: Delivery<u32>) -> Self::Future {
        unreachable!("it was never ready")
    }
}

#[tokio::test(start_paused = true)]
async fn a_service_that_is_not_ready_is_a_pause() {
    let queue = Broker::new().queue("jobs").declare();
    queue.publish(7);
    let consumer = Consumer::new(queue.subscribe(4).unwrap(), Never).sentinel(layer!());
    let watch = consumer.watch();
    tokio::spawn(consumer.run());
    sleep(S(1)).await;
    assert!(
        matches!(
            watch.state(),
            State::Paused {
                by: Pauser::Service,
                ..
            }
        ),
        "{watch:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn the_end_is_seen_however_it_comes() {
    let permits = Arc::new(Semaphore::new(0));
    // Dropped before it is polled.
    let queue = Broker::new().queue("jobs").declare();
    let consumer = Consumer::new(queue.subscribe(4).unwrap(), handler(&permits)).sentinel(layer!());
    let watch = consumer.watch();
    drop(consumer.run());
    assert_eq!(watch.state(), State::Ended);

    // Dropped later: it drains in the background.
    let consumer = Consumer::new(queue.subscribe(4).unwrap(), handler(&permits)).sentinel(layer!());
    let watch = consumer.watch();
    queue.publish(7);
    let consumer = tokio::spawn(consumer.run());
    sleep(S(1)).await;
    consumer.abort();
    sleep(S(1)).await;
    assert!(matches!(watch.state(), State::Draining(_)), "{watch:?}");
    permits.add_permits(1);
    sleep(S(1)).await;
    assert_eq!(watch.state(), State::Ended);

    // With its runtime.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    let connect = || pending::<Result<tower_sentinel::broker::memory::Deliveries<u32>, String>>();
    let make = |_: CancellationToken| Never;
    let consumer = Consumer::reconnecting(connect, make).sentinel(layer!());
    let mut watch = consumer.watch();
    runtime.spawn(consumer.run());
    watch.changed().await;
    runtime.shutdown_background();
    while watch.is_live() {
        watch.changed().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_consumer_that_waits_for_stuck_jobs_is_not_live() {
    let queue = Broker::new().queue("jobs").declare();
    queue.publish(0);
    let (release, released) = std::sync::mpsc::channel::<()>();
    let released = Arc::new(std::sync::Mutex::new(Some(released)));
    let service = service_fn(move |_: Delivery<u32>| {
        let released = released.lock().unwrap().take();
        async move {
            if let Some(released) = released {
                // Until the test lets it go.
                released.recv().unwrap_or_default();
            }
            Ok::<_, Infallible>(())
        }
    });
    let millis = Duration::from_millis;
    let jobs = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let decision = |_: &DeliveryTag<u32>, _: &Outcome<(), Infallible>| Verdict::Reject;
    let layer = SentinelLayer::new(SettlePolicy::new(decision))
        .timeout(millis(300))
        .stop_wait(millis(10))
        .max_abandoned(1)
        .runtime(jobs.handle().clone());
    let consumer = Consumer::new(queue.subscribe(4).unwrap(), service).sentinel(layer);
    let watch = consumer.watch();
    let consumer = tokio::spawn(consumer.run());
    // Each task notices it when it is to take the next job.
    while queue.counts().dropped == 0 {
        sleep(millis(5)).await;
    }
    queue.publish(1);
    let until = async |state: fn(&State) -> bool| {
        while !state(&watch.state()) {
            sleep(millis(5)).await;
        }
    };
    until(|state| {
        matches!(
            state,
            State::Paused {
                by: Pauser::StuckJobs,
                ..
            }
        )
    })
    .await;
    assert!(!watch.is_live() && !watch.is_ready());
    drop(release);
    until(|state| matches!(state, State::Consuming(_))).await;
    assert!(watch.is_live());
    watch.drain();
    consumer.await.unwrap().unwrap();
    jobs.shutdown_background();
}
