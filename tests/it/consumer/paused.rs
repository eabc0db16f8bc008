//! A consumer that pauses, since all of its jobs fail, still notices that its connection is lost.

use std::{future::ready, time::Duration};

use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tower::{Service, ServiceBuilder};
use tower_sentinel::{
    Consumer, IntensityLayer, SentinelError, SentinelLayer, SettlePolicy, ack_on_success,
    broker::memory::{Broker, Delivery, DeliveryError, SubscriptionError},
    consumer::EndCause,
    intensity::IntensityState,
    settle::{SettleError, Settled},
};

use crate::{
    consumer::ends,
    support::{Count, Refused},
};

const PREFETCH: usize = 2;
const JOBS: u64 = 5;

/// Time at which the connection is lost: in the pause.
const LOST: Duration = Duration::from_secs(5);

const PAUSE: Duration = Duration::from_secs(60);

type CallError = SentinelError<Refused, SettleError<DeliveryError>>;

fn intensity() -> IntensityLayer {
    let layer = IntensityLayer::new().window(4).minimum_sample(4);
    layer.pause(PAUSE..=PAUSE)
}

/// Returns a stack whose jobs fail for the first second.
fn service(
    intensity: IntensityLayer,
    shutdown: CancellationToken,
    back: Instant,
) -> impl Service<Delivery<u64>, Response = Settled, Error = CallError, Future: Send + 'static>
+ Send
+ 'static {
    ServiceBuilder::new()
        .concurrency_limit(PREFETCH)
        .layer(SentinelLayer::new(SettlePolicy::new(ack_on_success())).shutdown(shutdown))
        .layer(intensity)
        .service_fn(move |_: Delivery<u64>| {
            ready(match Instant::now() < back {
                true => Err(Refused),
                false => Ok(()),
            })
        })
}

#[tokio::test(start_paused = true)]
async fn a_consumer_that_pauses_returns_when_its_connection_is_lost() {
    let broker = Broker::new();
    let queue = broker.queue("jobs").declare();
    (0..JOBS).for_each(|job| queue.publish(job));
    let (intensity, shutdown) = (intensity(), CancellationToken::new());
    let state = intensity.watch();
    let start = Instant::now();
    let back = start + Duration::from_secs(1);
    let service = service(intensity, shutdown.clone(), back);
    tokio::spawn(async move {
        sleep(LOST).await;
        broker.drop_connections();
    });

    let consumer = Consumer::new(queue.subscribe(PREFETCH).unwrap(), service).shutdown(shutdown);
    let error = ends(consumer).await.unwrap_err();
    assert!(matches!(
        error.cause(),
        EndCause::Stream(SubscriptionError::Disconnected)
    ));
    assert_eq!(start.elapsed(), LOST);
    assert!(matches!(*state.borrow(), IntensityState::Paused { .. }));
    // Nothing was taken in the pause.
    let wasted = intensity_bound();
    assert!((4..=wasted).contains(&error.summary().called));
    assert_eq!(queue.counts().ready as u64, JOBS);
}

#[tokio::test(start_paused = true)]
async fn a_consumer_that_pauses_reconnects_and_pauses_on() {
    let broker = Broker::new();
    let queue = broker.queue("jobs").declare();
    (0..JOBS).for_each(|job| queue.publish(job));
    let intensity = intensity();
    let (layer, state) = (intensity.clone(), intensity.watch());
    let start = Instant::now();
    let back = start + Duration::from_secs(1);
    let connections = Count::default();
    let (jobs, count) = (queue.clone(), connections.clone());
    let emptied = queue.clone();
    let consumer = Consumer::reconnecting(
        move || {
            count.add();
            ready(jobs.subscribe(PREFETCH))
        },
        move |shutdown| service(layer.clone(), shutdown, back),
    )
    .random(|| 0.0)
    .with_graceful_shutdown(async move { emptied.emptied().await });
    let consumer = tokio::spawn(ends(consumer));

    sleep(LOST).await;
    assert_eq!(connections.get(), 1);
    broker.drop_connections();
    sleep(Duration::from_secs(1)).await;
    assert_eq!(connections.get(), 2);
    assert!(matches!(*state.borrow(), IntensityState::Paused { .. }));
    assert_eq!(queue.counts().unacked, 0);

    // The new session keeps the pause that the last one began.
    let summary = consumer.await.unwrap().unwrap();
    assert!((PAUSE..PAUSE + Duration::from_millis(10)).contains(&start.elapsed()));
    assert_eq!((connections.get(), queue.counts().acked), (2, JOBS));
    assert!(summary.called - JOBS <= intensity_bound());
}

/// Returns how many deliveries may be spent on the outage.
fn intensity_bound() -> u64 {
    intensity().most_wasted(PREFETCH, LOST)
}
