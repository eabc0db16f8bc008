//! A healthy consumer with a mixed load: its watchdog says nothing.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tower::{ServiceBuilder, service_fn};
use tower_sentinel::{
    Consumer, DecisionExt, IntensityLayer, Job, SentinelLayer, SettlePolicy, Verdict,
    ack_on_success,
    consumer::{State, Watch},
    settle::Settle,
};

use super::RemoteBroker;
use crate::conformance::{JobOf, body, left};

const EVERY: Duration = Duration::from_millis(200);
const PATIENT: Duration = Duration::from_millis(1_500);

/// Time of the soak; by `SENTINEL_SOAK` in seconds.
fn time() -> Duration {
    let seconds = std::env::var("SENTINEL_SOAK").ok();
    Duration::from_secs(seconds.map_or(12, |it| it.parse().unwrap()))
}

#[derive(Debug)]
struct Refused;

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("refused")
    }
}

/// Publishes jobs of all kinds, with pauses of all kinds between them.
async fn publish<B: RemoteBroker>(broker: &B, watch: &Watch) -> u64 {
    let (started, mut published) = (Instant::now(), 0);
    let mut publish = async |kind: &str| {
        broker
            .publish(&format!("{kind} {published}"))
            .await
            .unwrap();
        published += 1;
    };
    for round in 0.. {
        if started.elapsed() > time() {
            break;
        }
        match round % 6 {
            // A burst that fills all places for longer than the patience.
            0 => {
                for _ in 0..12 {
                    publish("long").await;
                }
                sleep(2 * PATIENT).await;
            }
            // Idleness.
            1 => sleep(2 * PATIENT).await,
            // A steady flow.
            2 => {
                for _ in 0..100 {
                    publish("short").await;
                    sleep(PATIENT / 100).await;
                }
            }
            // A pause, with jobs that wait.
            3 => {
                watch.pause();
                for _ in 0..12 {
                    publish("short").await;
                }
                sleep(2 * PATIENT).await;
                watch.resume();
            }
            // An outage that makes the intensity layer pause.
            4 => {
                for _ in 0..12 {
                    publish("failing").await;
                }
                sleep(PATIENT).await;
            }
            // Jobs that come now and then.
            _ => {
                for _ in 0..3 {
                    publish("short").await;
                    sleep(PATIENT - EVERY).await;
                }
            }
        }
    }
    published
}

pub(crate) async fn a_mixed_load_raises_no_alarm<B: RemoteBroker>(broker: &B) {
    let (sessions, acked) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let mut connecting = broker.patient_connector(4);
    let of_connect = Arc::clone(&sessions);
    let connect = move || {
        of_connect.fetch_add(1, Ordering::Relaxed);
        connecting()
    };
    let intensity = IntensityLayer::new()
        .window(8)
        .minimum_sample(8)
        .pause(2 * PATIENT..=2 * PATIENT);
    let done = Arc::clone(&acked);
    let stop = CancellationToken::new();
    let decision =
        ack_on_success().on_error(|_: &Refused| Verdict::retry_after(Duration::from_millis(500)));
    let consumer = Consumer::reconnecting(connect, move |_| {
        let done = Arc::clone(&done);
        let handler = service_fn(move |job: JobOf<B>| {
            let done = Arc::clone(&done);
            async move {
                let body = body(&job);
                let is_first = job.tag().redelivered() != Some(true);
                if body.starts_with("failing") && is_first {
                    return Err(Refused);
                }
                let millis = if body.starts_with("long") { 1_000 } else { 5 };
                sleep(Duration::from_millis(millis)).await;
                done.fetch_add(1, Ordering::Relaxed);
                Ok(())
            }
        });
        ServiceBuilder::new()
            .layer(intensity.clone())
            .service(handler)
    })
    .sentinel(SentinelLayer::new(SettlePolicy::new(decision)))
    .watchdog(EVERY, PATIENT)
    .with_graceful_shutdown(stop.clone().cancelled_owned());
    let watch = consumer.watch();
    let consumer = tokio::spawn(consumer.run());
    let published = publish(broker, &watch).await;
    left(broker, 0).await;
    let (State::Consuming(progress) | State::Saturated(progress)) = watch.state() else {
        panic!("{watch:?}");
    };
    println!("{published} jobs, {} stalls", progress.stalls);
    assert_eq!((progress.stalls, sessions.load(Ordering::Relaxed)), (0, 1));
    assert!(acked.load(Ordering::Relaxed) >= published);
    stop.cancel();
    let summary = consumer.await.unwrap().unwrap();
    assert_eq!((summary.failed, summary.abandoned), (0, 0));
}
