//! Zombies that real brokers make: each is seen by the watchdog, or by the adapter, and costs no job.
//!
//! A [`RemoteBroker`] instantiates the scenarios with [`scenarios!`]. Those of one broker are in the files of its name.

mod nats;
mod rabbitmq;
mod soak;

use std::{
    collections::BTreeMap,
    convert::Infallible,
    error::Error,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    task::JoinHandle,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;
use tower::{ServiceBuilder, service_fn, util::Either};
use tower_sentinel::{
    Consumer, SentinelLayer, SettlePolicy, ack_on_success,
    consumer::{Progress, State, Watch},
};

use crate::{
    conformance::{Connector, JobOf, TestBroker, body, eventually, left},
    proxy::Proxy,
};

const EVERY: Duration = Duration::from_millis(200);

/// Patience of the watchdogs.
const PATIENT: Duration = Duration::from_secs(1);

/// Time for which a broker is frozen; by `SENTINEL_FROZEN` in seconds.
fn frozen() -> Duration {
    let seconds = std::env::var("SENTINEL_FROZEN").ok();
    Duration::from_secs(seconds.map_or(3, |it| it.parse().unwrap()))
}

/// A broker behind proxies.
pub(crate) trait RemoteBroker: TestBroker<Error: Error + Send> + Sync + 'static {
    /// Bytes by which an ack is known among those that a consumer sends.
    const ACK: &'static [u8];

    /// Returns a function like that of [`connector`](TestBroker::connector), whose subscriptions have the adapter's own
    /// time limits.
    fn patient_connector(&self, prefetch: usize) -> Connector<Self::Subscription, Self::Error> {
        self.connector(prefetch)
    }

    /// Applies `act` to each proxy that consumers connect through.
    fn with_proxies(&self, act: impl FnMut(&Proxy));

    /// Stops the broker's process without ending it, or lets it go on.
    fn freeze(&self, freezes: bool);
}

/// A consumer with a watchdog.
struct Worker {
    watch: Watch,
    /// Number of sessions.
    sessions: Arc<AtomicU64>,
    runs: Arc<Mutex<BTreeMap<String, u32>>>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Worker {
    /// Starts it with jobs that do nothing.
    fn start<B: RemoteBroker>(broker: &B, prefetch: usize) -> Self {
        Self::with_service::<B>(broker.patient_connector(prefetch), |_| true)
    }

    /// Starts it with a service that is ready in the sessions for which `is_ready`, from 1 on.
    fn with_service<B: RemoteBroker>(
        mut connect: Connector<B::Subscription, B::Error>,
        is_ready: impl Fn(u64) -> bool + Send + 'static,
    ) -> Self {
        let sessions = Arc::new(AtomicU64::new(0));
        let runs = Arc::new(Mutex::new(BTreeMap::new()));
        let (of_service, of_connect, ran) =
            (Arc::default(), Arc::clone(&sessions), Arc::clone(&runs));
        let count = move |number: &Arc<AtomicU64>| number.fetch_add(1, Ordering::Relaxed) + 1;
        let handler = move |_| {
            let ran = Arc::clone(&ran);
            let handler = service_fn(move |job: JobOf<B>| {
                *ran.lock().unwrap().entry(body(&job)).or_default() += 1;
                std::future::ready(Ok::<_, Infallible>(()))
            });
            match is_ready(count(&of_service)) {
                true => Either::Left(handler),
                false => Either::Right(ServiceBuilder::new().concurrency_limit(0).service(handler)),
            }
        };
        let stop = CancellationToken::new();
        let connect = move || {
            count(&of_connect);
            connect()
        };
        let consumer = Consumer::reconnecting(connect, handler)
            .sentinel(SentinelLayer::new(SettlePolicy::new(ack_on_success())))
            .backoff(Duration::from_millis(50)..=Duration::from_millis(200))
            .connect_timeout(Duration::from_secs(3))
            .watchdog(EVERY, PATIENT)
            .with_graceful_shutdown(stop.clone().cancelled_owned());
        let watch = consumer.watch();
        let consumer = consumer.run();
        let task = tokio::spawn(async move {
            let ended = consumer.await;
            ended.unwrap_or_else(|error| panic!("{error}"));
        });
        Self {
            watch,
            sessions,
            runs,
            stop,
            task,
        }
    }

    fn progress(&self) -> Option<Progress> {
        match self.watch.state() {
            State::Consuming(progress)
            | State::Saturated(progress)
            | State::Paused { progress, .. }
            | State::Draining(progress) => Some(progress),
            _ => None,
        }
    }

    fn stalls(&self) -> u64 {
        match self.watch.state() {
            // Of a session before the first one that connects again.
            State::Connecting {
                error: Some(error), ..
            } => u64::from(error.contains("stalled")),
            _ => self.progress().map_or(0, |progress| progress.stalls),
        }
    }

    fn sessions(&self) -> u64 {
        self.sessions.load(Ordering::Relaxed)
    }

    fn ran(&self) -> usize {
        self.runs.lock().unwrap().len()
    }

    /// Waits until it has run so many different jobs.
    async fn has_run(&self, jobs: usize) {
        eventually(jobs, async || self.ran()).await;
    }

    /// Waits until it has run so many different jobs, and both it and the broker take them for settled.
    ///
    /// The broker may know of an ack whose confirmation is still on its way: until that comes, the place is taken.
    async fn has_settled<B: TestBroker>(&self, broker: &B, jobs: usize) {
        self.has_run(jobs).await;
        left(broker, 0).await;
        let running = async || self.progress().map(|progress| progress.running);
        eventually(Some(0), running).await;
    }

    /// Waits for a stall, and prints how long that took.
    async fn is_seen(&self, fault: &str) {
        let started = Instant::now();
        eventually(true, async || self.stalls() > 0).await;
        println!("{fault}: seen after {:?}", started.elapsed());
    }

    async fn end(self) {
        self.stop.cancel();
        self.task.await.unwrap();
    }
}

async fn publish<B: TestBroker>(broker: &B, jobs: std::ops::Range<usize>) {
    for job in jobs {
        broker.publish(&job.to_string()).await.unwrap();
    }
}

/// The connection of the consumer becomes half-open, while it is idle.
pub(crate) async fn a_half_open_connection_is_given_up<B: RemoteBroker>(broker: &B) {
    let worker = Worker::start(broker, 5);
    publish(broker, 0..5).await;
    worker.has_settled(broker, 5).await;
    broker.with_proxies(Proxy::swallow);
    let seen = worker.is_seen("half-open");
    tokio::join!(seen, publish(broker, 5..10));
    worker.has_settled(broker, 10).await;
    worker.end().await;
}

/// The server does not run for a while.
pub(crate) async fn a_frozen_broker_is_given_up_until_it_goes_on<B: RemoteBroker>(broker: &B) {
    let worker = Worker::start(broker, 5);
    publish(broker, 0..5).await;
    worker.has_settled(broker, 5).await;
    broker.freeze(true);
    let frozen = sleep(frozen());
    worker.is_seen("frozen").await;
    frozen.await;
    broker.freeze(false);
    publish(broker, 5..10).await;
    worker.has_settled(broker, 10).await;
    worker.end().await;
}

/// An ack does not arrive, with all places that the broker knows.
///
/// Only RabbitMQ does not confirm acks. On the others it is the adapter that notices.
pub(crate) async fn a_lost_ack_stalls_no_consumer<B: RemoteBroker>(broker: &B) {
    let worker = Worker::start(broker, 1);
    publish(broker, 0..1).await;
    worker.has_settled(broker, 1).await;
    broker.with_proxies(|proxy| proxy.swallow_next(B::ACK));
    publish(broker, 1..3).await;
    eventually(true, async || {
        let mut has_swallowed = false;
        broker.with_proxies(|proxy| has_swallowed |= proxy.has_swallowed());
        has_swallowed
    })
    .await;
    let started = Instant::now();
    worker.has_settled(broker, 3).await;
    let (sessions, stalls) = (worker.sessions(), worker.stalls());
    println!(
        "lost ack: mended after {:?}, in session {sessions}, by {stalls} stalls",
        started.elapsed()
    );
    if !B::row().queue.starts_with("RabbitMQ") {
        assert_eq!(stalls, 0);
    } else {
        assert_eq!((sessions, stalls), (2, 1));
    }
    worker.end().await;
}

/// The readiness of the service never comes, though no job runs.
pub(crate) async fn a_service_that_is_never_ready_is_made_anew<B: RemoteBroker>(broker: &B) {
    // Fewer than the prefetch, so all of them may be at the consumer.
    publish(broker, 0..3).await;
    let worker = Worker::with_service::<B>(broker.patient_connector(5), |session| session > 1);
    worker.is_seen("never ready").await;
    worker.has_settled(broker, 3).await;
    assert_eq!((worker.sessions(), worker.stalls()), (2, 1));
    worker.end().await;
}

/// Instantiates every scenario for a broker.
macro_rules! scenarios {
    ($broker:ty, with the slow ones) => {
        $crate::watchdog::scenarios! { $broker }
        $crate::watchdog::scenarios! { @ $broker, start, a_mixed_load_raises_no_alarm }
        $crate::watchdog::scenarios! { @ $broker, start_mortal,
            a_frozen_broker_is_given_up_until_it_goes_on
        }
    };
    ($broker:ty) => {
        $crate::watchdog::scenarios! { @ $broker, start,
            a_half_open_connection_is_given_up
            a_lost_ack_stalls_no_consumer
            a_service_that_is_never_ready_is_made_anew
        }
    };
    (@ $broker:ty, $start:ident, $($name:ident)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                let broker = <$broker as $crate::conformance::TestBroker>::$start().await;
                $crate::watchdog::$name(&broker).await;
                $crate::conformance::TestBroker::stop(broker).await;
            }
        )*
    };
}
pub(crate) use self::soak::a_mixed_load_raises_no_alarm;
pub(crate) use scenarios;
