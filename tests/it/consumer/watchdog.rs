//! Watchdogs of consumers: what they see, what they mend, and what they leave alone.

use std::{
    convert::Infallible,
    future::{Ready, pending, ready},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{Stream, task::AtomicWaker};
use tokio::time::{Instant, sleep, timeout};
use tower::{Service, ServiceBuilder, limit::ConcurrencyLimitLayer, service_fn};
use tower_sentinel::{
    Consumer, DecisionExt, IntensityLayer, SentinelLayer, SettlePolicy, Verdict, ack_on_success,
    broker::memory::{Broker, Deliveries, Delivery, Queue, SubscriptionError},
    consumer::{
        EndCause, Pauser, Probe, ProbeError, Probing, Stall, StallKind, State, Subscription, Watch,
    },
};

use crate::{
    consumer::{FOREVER, ends},
    support::{Refused, log::Log, raise},
};

const EVERY: Duration = S(10);
const PATIENCE: Duration = S(60);

/// Longest time from a fault to its finding.
const SEEN: Duration = S(60 + 2 * 10);

#[allow(non_snake_case)]
const fn S(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

macro_rules! layer {
    () => {
        SentinelLayer::new(SettlePolicy::new(ack_on_success())).no_timeout()
    };
}

// === a broker that fails silently ===

/// Faults of the subscriptions that are made while they are switched on.
#[derive(Clone, Default)]
struct Faults(Arc<Switches>);

#[derive(Default)]
struct Switches {
    /// Sessions that are made have the other faults while this is not 0.
    sessions: AtomicU32,
    /// Nothing is delivered.
    deaf: AtomicBool,
    /// No probe resolves.
    silent: AtomicBool,
    /// Number of settlements that are lost on their way.
    lost: AtomicUsize,
    hindered: AtomicBool,
    /// More jobs wait, which others take.
    crowded: AtomicBool,
    refuses: AtomicBool,
    panics: AtomicBool,
    has_no_probe: AtomicBool,
    probes: AtomicU32,
}

impl Faults {
    /// Switches the fault of the next `sessions` on.
    fn on(sessions: u32, fault: impl Fn(&Switches) -> &AtomicBool) -> Self {
        let faults = Self::default();
        faults.0.sessions.store(sessions, Ordering::Relaxed);
        fault(&faults.0).store(true, Ordering::Relaxed);
        faults
    }

    fn probes(&self) -> u32 {
        self.0.probes.load(Ordering::Relaxed)
    }

    fn subscribe(&self, queue: &Queue<u32>, prefetch: usize) -> Faulty {
        let sessions = &self.0.sessions;
        let update = |left: u32| left.checked_sub(1);
        let is_faulty = sessions
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, update)
            .is_ok();
        Faulty {
            inner: queue.subscribe(prefetch).unwrap(),
            faults: self.clone(),
            is_faulty,
        }
    }
}

/// Subscription of a memory broker, with faults.
struct Faulty {
    inner: Deliveries<u32>,
    faults: Faults,
    is_faulty: bool,
}

impl Faulty {
    fn has(&self, fault: &AtomicBool) -> bool {
        self.is_faulty && fault.load(Ordering::Relaxed)
    }
}

impl Stream for Faulty {
    type Item = Result<Delivery<u32>, SubscriptionError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        match self.has(&self.faults.0.deaf) {
            true => Poll::Pending,
            false => Pin::new(&mut self.inner).poll_next(cx),
        }
    }
}

impl Subscription for Faulty {
    type Job = Delivery<u32>;
    type Error = SubscriptionError;

    fn poll_closed(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), SubscriptionError>> {
        Pin::new(&mut self.inner).poll_closed(cx)
    }

    fn prefetch(&self) -> Option<usize> {
        Some(self.inner.prefetch())
    }

    fn is_gone(&self) -> bool {
        self.inner.is_gone()
    }

    fn probe(&self) -> Option<Probing> {
        let faults = &self.faults.0;
        if self.has(&faults.has_no_probe) {
            return None;
        }
        faults.probes.fetch_add(1, Ordering::Relaxed);
        if self.has(&faults.panics) {
            raise("in a probe");
        }
        if self.has(&faults.silent) {
            return Some(Box::pin(pending()));
        }
        if self.has(&faults.refuses) {
            return Some(Box::pin(ready(Err(ProbeError::new(Refused)))));
        }
        let lost = faults.lost.load(Ordering::Relaxed) as u64;
        let lost = lost * u64::from(self.is_faulty);
        let others = u64::from(self.has(&faults.crowded));
        let is_hindered = self.has(&faults.hindered);
        let probing = self.inner.probe()?;
        Some(Box::pin(async move {
            let mut probe = probing.await?;
            probe.waiting = probe.waiting.map(|waiting| waiting + others);
            probe.unsettled = probe.unsettled.map(|unsettled| unsettled + lost);
            match is_hindered {
                true => Ok(probe.hindrance("the consumer is full")),
                false => Ok(probe),
            }
        }))
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        Pin::new(&mut self.inner).poll_close(cx)
    }
}

// === consumers ===

fn queue(jobs: u32) -> Queue<u32> {
    let queue = Broker::new().queue("jobs").declare();
    (0..jobs).for_each(|job| queue.publish(job));
    queue
}

/// A handler whose jobs take as many seconds as their payload.
fn handler()
-> impl Service<Delivery<u32>, Response = (), Error = Infallible, Future: Send> + Clone + Send {
    service_fn(|job: Delivery<u32>| async move {
        sleep(S(u64::from(*job.payload()))).await;
        Ok(())
    })
}

/// Runs a reconnecting consumer of a handler, and returns its handle.
fn spawn(queue: &Queue<u32>, prefetch: usize, faults: &Faults) -> Watch {
    let (jobs, faults) = (queue.clone(), faults.clone());
    let connect = move || ready(Ok::<_, Refused>(faults.subscribe(&jobs, prefetch)));
    let consumer = Consumer::reconnecting(connect, |_| handler())
        .sentinel(layer!())
        .drain_timeout(S(1_000))
        .random(|| 0.0)
        .watchdog(EVERY, PATIENCE);
    let watch = consumer.watch();
    tokio::spawn(consumer.run());
    watch
}

fn stalls(watch: &Watch) -> u64 {
    match watch.state() {
        State::Consuming(progress)
        | State::Saturated(progress)
        | State::Paused { progress, .. }
        | State::Draining(progress) => progress.stalls,
        state => panic!("{state:?}"),
    }
}

async fn emptied(queue: &Queue<u32>) {
    let emptied = timeout(FOREVER, queue.emptied()).await;
    emptied.expect("the jobs are taken");
}

/// Ends a consumer without a `reconnecting` by its watchdog.
async fn stall_of<S>(subscription: Faulty, service: S) -> Stall
where
    S: Service<Delivery<u32>, Response = (), Error = Infallible, Future: Send>
        + Clone
        + Send
        + 'static,
{
    let consumer = Consumer::new(subscription, service)
        .sentinel(layer!())
        .watchdog(EVERY, PATIENCE);
    let error = ends(consumer).await.unwrap_err();
    assert!(error.cause().is_transient() && error.cause().is_unanswered());
    let (EndCause::Stalled(stall), _) = error.into_parts() else {
        panic!("ended for another reason");
    };
    *stall
}

fn warnings(log: &Log) -> Vec<String> {
    let lines = log.lines().into_iter();
    lines
        .filter(|line| line.contains("consumer stalled"))
        .collect()
}

// === what it sees ===

#[tokio::test(start_paused = true)]
async fn jobs_that_wait_and_are_not_delivered_are_a_stall() {
    let (log, _guard) = Log::start();
    let queue = queue(0);
    let faults = Faults::on(1, |it| &it.deaf);
    let begun = Instant::now();
    let stalled = tokio::spawn(stall_of(faults.subscribe(&queue, 4), handler()));
    sleep(S(1_005)).await;
    // An idle queue is none.
    assert!(!stalled.is_finished());
    assert_eq!(faults.probes(), 100);
    let begun = begun + S(1_005);

    (0..7).for_each(|job| queue.publish(job));
    let stall = stalled.await.unwrap();
    assert!(
        (PATIENCE..=SEEN).contains(&begun.elapsed()),
        "{:?}",
        begun.elapsed()
    );
    assert_eq!(stall.kind, StallKind::Undelivered);
    assert_eq!(
        (stall.probe.waiting, stall.probe.unsettled),
        (Some(7), Some(0))
    );
    assert_eq!((stall.running, stall.free), (0, Some(4)));
    assert_eq!((stall.last_delivery, stall.patience), (None, PATIENCE));
    assert_eq!(
        stall.to_string(),
        "nothing was delivered for 60s (7 waiting, 0 unsettled, delayed: 0, abandoned: 0; 0 running)"
    );
    let [warning] = &warnings(&log)[..] else {
        panic!("{:?}", log.lines());
    };
    for part in [
        "WARN",
        "kind=\"undelivered\"",
        "waiting=7",
        "unsettled=0",
        "running=0",
        "free=4",
        "patience=60s",
        "last_delivery=None",
    ] {
        assert!(warning.contains(part), "{part}: {warning}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_stalled_session_is_begun_anew_and_no_job_is_lost() {
    let queue = queue(7);
    let faults = Faults::on(2, |it| &it.deaf);
    let begun = Instant::now();
    let watch = spawn(&queue, 4, &faults);
    emptied(&queue).await;
    assert!(begun.elapsed() <= 2 * SEEN + S(10), "{:?}", begun.elapsed());
    assert_eq!((queue.counts().acked, stalls(&watch)), (7, 2));
    sleep(S(10_000)).await;
    assert_eq!(stalls(&watch), 2);
}

#[tokio::test(start_paused = true)]
async fn a_stalled_session_drains_beside_the_next_one() {
    let queue = queue(0);
    let faults = Faults::on(1, |it| &it.deaf);
    faults.0.deaf.store(false, Ordering::Relaxed);
    let watch = spawn(&queue, 4, &faults);
    queue.publish(200);
    sleep(S(1)).await;
    assert_eq!(queue.counts().unacked, 1);
    faults.0.deaf.store(true, Ordering::Relaxed);
    queue.publish(1);
    sleep(SEEN + S(5)).await;
    assert_eq!((queue.counts().acked, stalls(&watch)), (1, 1));
    // The job of the stalled session still runs, and is settled by it.
    assert_eq!(queue.counts().unacked, 1);
    emptied(&queue).await;
    let State::Consuming(progress) = watch.state() else {
        panic!("{watch:?}");
    };
    assert_eq!((progress.called, queue.counts().acked), (2, 2));
}

#[tokio::test(start_paused = true)]
async fn a_broker_that_does_not_respond_is_a_stall_even_of_an_idle_consumer() {
    let queue = queue(0);
    let faults = Faults::on(1, |it| &it.silent);
    let begun = Instant::now();
    let stall = stall_of(faults.subscribe(&queue, 4), handler()).await;
    assert!(
        (PATIENCE..=SEEN).contains(&begun.elapsed()),
        "{:?}",
        begun.elapsed()
    );
    assert_eq!(stall.kind, StallKind::Silent);
    assert_eq!(stall.to_string(), "the broker has not responded for 60s");
    assert_eq!(stall.probe, Probe::new());
}

#[tokio::test(start_paused = true)]
async fn a_silent_broker_holds_up_no_drain() {
    let queue = queue(0);
    queue.publish(5_000);
    let faults = Faults::on(1, |it| &it.silent);
    let begun = Instant::now();
    let stall = stall_of(faults.subscribe(&queue, 4), handler()).await;
    assert_eq!(
        (stall.kind, stall.running, stall.free),
        (StallKind::Silent, 1, Some(3))
    );
    assert_eq!(stall.last_delivery, Some(begun.elapsed()));
    // Neither the drain's 30 s, nor the job.
    assert!(begun.elapsed() <= SEEN, "{:?}", begun.elapsed());
    assert_eq!((queue.counts().unacked, queue.counts().ready), (0, 1));
}

#[tokio::test(start_paused = true)]
async fn a_delivery_during_a_probe_puts_a_stall_off() {
    let queue = queue(0);
    let faults = Faults::on(1, |it| &it.silent);
    let begun = Instant::now();
    let stalled = tokio::spawn(stall_of(faults.subscribe(&queue, 4), handler()));
    sleep(EVERY + S(5)).await;
    assert_eq!(faults.probes(), 1);
    queue.publish(0);
    let stall = stalled.await.unwrap();
    assert_eq!((stall.kind, faults.probes()), (StallKind::Silent, 2));
    let least = 2 * (EVERY + PATIENCE);
    assert!(
        (least..least + S(1)).contains(&begun.elapsed()),
        "{:?}",
        begun.elapsed()
    );
}

#[tokio::test(start_paused = true)]
async fn the_last_probe_comes_as_the_patience_ends() {
    let queue = queue(7);
    let faults = Faults::on(1, |it| &it.deaf);
    let begun = Instant::now();
    let consumer = Consumer::new(faults.subscribe(&queue, 4), handler())
        .sentinel(layer!())
        .watchdog(EVERY, EVERY + S(3));
    ends(consumer).await.unwrap_err();
    // At 10, 20 and 23 s.
    let least = 2 * EVERY + S(3);
    assert!(
        (least..least + S(1)).contains(&begun.elapsed()),
        "{:?}",
        begun.elapsed()
    );
    assert_eq!(faults.probes(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_settlement_that_was_lost_on_its_way_is_a_stall() {
    let queue = queue(0);
    let faults = Faults::default();
    faults.0.sessions.store(1, Ordering::Relaxed);
    let stalled = tokio::spawn(stall_of(faults.subscribe(&queue, 4), handler()));
    queue.publish(1);
    sleep(S(500)).await;
    assert!(!stalled.is_finished());
    faults.0.lost.store(1, Ordering::Relaxed);
    let begun = Instant::now();
    let stall = stalled.await.unwrap();
    assert!(
        (PATIENCE..=SEEN).contains(&begun.elapsed()),
        "{:?}",
        begun.elapsed()
    );
    assert_eq!((stall.kind, stall.running), (StallKind::Unsettled, 0));
    assert_eq!(
        (stall.probe.waiting, stall.probe.unsettled),
        (Some(0), Some(1))
    );
}

#[tokio::test(start_paused = true)]
async fn a_service_that_does_not_become_ready_is_a_stall() {
    for tasks in 1..=3 {
        let queue = queue(3);
        let permits = ConcurrencyLimitLayer::new(0);
        let services = (0..tasks).map(|_| {
            ServiceBuilder::new()
                .layer(permits.clone())
                .service(handler())
        });
        let faults = Faults::default();
        let begun = Instant::now();
        let consumer = Consumer::parallel(faults.subscribe(&queue, 4), services)
            .sentinel(layer!())
            .watchdog(EVERY, PATIENCE);
        let watch = consumer.watch();
        let consumer = tokio::spawn(consumer.run());
        sleep(S(1)).await;
        let State::Paused {
            by: Pauser::Service,
            ..
        } = watch.state()
        else {
            panic!("{watch:?}");
        };
        let error = timeout(FOREVER, consumer)
            .await
            .unwrap()
            .unwrap()
            .unwrap_err();
        assert!(
            (PATIENCE..=SEEN).contains(&begun.elapsed()),
            "{:?}",
            begun.elapsed()
        );
        let EndCause::Stalled(stall) = error.cause() else {
            panic!("{error:?}");
        };
        assert_eq!(
            (stall.kind, stall.probe.waiting),
            (StallKind::Unready, Some(3))
        );
        assert_eq!(faults.probes(), 7);
    }
}

#[tokio::test(start_paused = true)]
async fn a_known_hindrance_is_told_once_and_ends_no_session() {
    let (log, _guard) = Log::start();
    let queue = queue(3);
    let faults = Faults::on(1, |it| &it.deaf);
    faults.0.hindered.store(true, Ordering::Relaxed);
    let watch = spawn(&queue, 4, &faults);
    sleep(S(1_000)).await;
    assert_eq!(stalls(&watch), 1);
    let [warning] = &warnings(&log)[..] else {
        panic!("{:?}", log.lines());
    };
    assert!(warning.contains("the consumer is full"), "{warning}");
    assert!(warning.contains("the session goes on"), "{warning}");
    // It is told again if it comes back.
    faults.0.hindered.store(false, Ordering::Relaxed);
    faults.0.deaf.store(false, Ordering::Relaxed);
    queue.publish(0);
    sleep(S(20)).await;
    faults.0.hindered.store(true, Ordering::Relaxed);
    faults.0.deaf.store(true, Ordering::Relaxed);
    queue.publish(0);
    sleep(SEEN).await;
    assert_eq!(stalls(&watch), 2);
}

#[tokio::test(start_paused = true)]
async fn several_tasks_have_one_watchdog() {
    let queue = queue(9);
    let faults = Faults::on(1, |it| &it.deaf);
    let services = [(); 3].map(|()| handler());
    let consumer = Consumer::parallel(faults.subscribe(&queue, 6), services)
        .sentinel(layer!())
        .watchdog(EVERY, PATIENCE);
    let error = ends(consumer).await.unwrap_err();
    let EndCause::Stalled(stall) = error.cause() else {
        panic!("{error:?}");
    };
    assert_eq!((stall.kind, stall.free), (StallKind::Undelivered, Some(6)));
    assert_eq!(faults.probes(), 7);
}

// === what it leaves alone ===

/// Asserts that there is no finding in hours.
async fn is_left_alone(watch: &Watch) {
    sleep(S(10_000)).await;
    assert_eq!(stalls(watch), 0);
}

#[tokio::test(start_paused = true)]
async fn a_busy_consumer_is_left_alone_and_its_broker_is_not_probed() {
    let queue = queue(0);
    (0..9).for_each(|_| queue.publish(50_000));
    let faults = Faults::on(1, |it| &it.silent);
    let watch = spawn(&queue, 4, &faults);
    is_left_alone(&watch).await;
    assert!(matches!(watch.state(), State::Saturated(_)));
    assert_eq!(faults.probes(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_consumer_whose_service_limits_its_jobs_is_left_alone() {
    let queue = queue(0);
    (0..9).for_each(|_| queue.publish(50_000));
    let faults = Faults::default();
    // Within the sentinel, with places free outside of it.
    let service = ServiceBuilder::new()
        .concurrency_limit(2)
        .service(handler());
    let consumer = Consumer::new(faults.subscribe(&queue, 8), service)
        .sentinel(layer!())
        .watchdog(EVERY, PATIENCE);
    let watch = consumer.watch();
    tokio::spawn(consumer.run());
    is_left_alone(&watch).await;
    assert_eq!(queue.counts().unacked, 2);
}

#[tokio::test(start_paused = true)]
async fn a_paused_consumer_is_left_alone() {
    let queue = queue(0);
    let watch = spawn(&queue, 4, &Faults::default());
    sleep(S(1)).await;
    watch.pause();
    (0..9).for_each(|_| queue.publish(0));
    is_left_alone(&watch).await;
    // Also if a probe would not resolve.
    let faults = Faults::on(1, |it| &it.silent);
    let services = [(); 2].map(|()| handler());
    let idle = Consumer::parallel(faults.subscribe(&self::queue(0), 4), services)
        .sentinel(layer!())
        .watchdog(EVERY, PATIENCE);
    let (idle, consumer) = (idle.watch(), idle.run());
    tokio::spawn(consumer);
    sleep(S(1)).await;
    idle.pause();
    is_left_alone(&idle).await;
    // Also if pauses end just before a probe.
    for _ in 0..100 {
        watch.resume();
        watch.pause();
        sleep(S(13)).await;
    }
    watch.resume();
    is_left_alone(&watch).await;
    assert_eq!(queue.counts().acked, 9);
}

#[tokio::test(start_paused = true)]
async fn a_pause_during_a_probe_is_left_alone() {
    let faults = Faults::on(1, |it| &it.silent);
    let watch = spawn(&queue(0), 4, &faults);
    sleep(EVERY + S(5)).await;
    assert_eq!(faults.probes(), 1);
    watch.pause();
    is_left_alone(&watch).await;
}

#[tokio::test(start_paused = true)]
async fn a_service_that_is_not_ready_for_an_empty_queue_is_left_alone() {
    let faults = Faults::default();
    let service = ServiceBuilder::new()
        .concurrency_limit(0)
        .service(handler());
    let consumer = Consumer::new(faults.subscribe(&queue(0), 4), service)
        .sentinel(layer!())
        .watchdog(EVERY, PATIENCE);
    let watch = consumer.watch();
    tokio::spawn(consumer.run());
    is_left_alone(&watch).await;
    assert!(faults.probes() > 900);
}

/// Readiness that a test switches.
#[derive(Default)]
struct Switched {
    is_ready: AtomicBool,
    waker: AtomicWaker,
}

impl Switched {
    fn set(&self, is_ready: bool) {
        self.is_ready.store(is_ready, Ordering::Relaxed);
        self.waker.wake();
    }
}

/// Service with such a readiness.
#[derive(Clone, Default)]
struct Switchable(Arc<Switched>);

impl Service<Delivery<u32>> for Switchable {
    type Response = ();
    type Error = Infallible;
    type Future = Ready<Result<(), Infallible>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.0.waker.register(cx.waker());
        match self.0.is_ready.load(Ordering::Relaxed) {
            true => Poll::Ready(Ok(())),
            false => Poll::Pending,
        }
    }

    fn call(&mut self, _: Delivery<u32>) -> Self::Future {
        ready(Ok(()))
    }
}

#[tokio::test(start_paused = true)]
async fn a_service_that_is_ready_now_and_then_is_left_alone() {
    let faults = Faults::on(1, |it| &it.deaf);
    let service = Switchable::default();
    let readiness = Arc::clone(&service.0);
    let consumer = Consumer::new(faults.subscribe(&queue(3), 4), service)
        .sentinel(layer!())
        .watchdog(EVERY, PATIENCE);
    let watch = consumer.watch();
    tokio::spawn(consumer.run());
    for _ in 0..100 {
        // Between two probes.
        sleep(S(15)).await;
        readiness.set(true);
        sleep(S(1)).await;
        readiness.set(false);
        sleep(S(4)).await;
    }
    assert_eq!(stalls(&watch), 0);
    assert!(faults.probes() > 190);
}

#[tokio::test(start_paused = true)]
async fn a_consumer_that_its_intensity_layer_pauses_is_left_alone() {
    let queue = queue(20);
    let faults = Faults::default();
    let layer = IntensityLayer::new().window(4).minimum_sample(4);
    let service = ServiceBuilder::new()
        .layer(layer.pause(S(8_000)..=S(8_000)))
        .service_fn(|_: Delivery<u32>| ready(Err::<(), _>(Refused)));
    for tasks in [1, 2] {
        let services = vec![service.clone(); tasks];
        let consumer = Consumer::parallel(faults.subscribe(&queue, 4), services)
            .sentinel(layer!())
            .watchdog(EVERY, PATIENCE);
        let watch = consumer.watch();
        let consumer = tokio::spawn(consumer.run());
        sleep(S(1_000)).await;
        let State::Paused { by, .. } = watch.state() else {
            panic!("{watch:?}");
        };
        assert_eq!(by, Pauser::Intensity);
        is_left_alone(&watch).await;
        watch.drain();
        ends(consumer).await.unwrap().unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn jobs_that_come_rarely_or_are_delayed_are_no_stall() {
    let queue = queue(0);
    let watch = spawn(&queue, 4, &Faults::default());
    for job in 0..200 {
        queue.publish(job % 90);
        sleep(S(59)).await;
    }
    // Each waits for longer than the patience, in the queue.
    let consumer = Consumer::new(
        queue.subscribe(4).unwrap(),
        service_fn(|_| ready(Err::<(), _>(Refused))),
    )
    .sentinel(SentinelLayer::new(SettlePolicy::new(
        ack_on_success().on_error(|_: &Refused| Verdict::retry_after(S(300))),
    )))
    .watchdog(EVERY, PATIENCE);
    watch.drain();
    sleep(S(100)).await;
    let watch = consumer.watch();
    tokio::spawn(consumer.run());
    queue.publish(1);
    is_left_alone(&watch).await;
    assert_eq!(queue.counts().delayed, 1);
}

#[tokio::test(start_paused = true)]
async fn a_consumer_that_gets_some_of_the_jobs_that_wait_is_left_alone() {
    let queue = queue(0);
    let watch = spawn(&queue, 4, &Faults::on(1, |it| &it.crowded));
    for _ in 0..200 {
        queue.publish(0);
        sleep(PATIENCE - S(1)).await;
    }
    assert_eq!(stalls(&watch), 0);
    sleep(SEEN).await;
    assert_eq!(stalls(&watch), 1);
}

#[tokio::test(start_paused = true)]
async fn abandoned_jobs_and_leases_are_no_lost_settlements() {
    let broker = Broker::new();
    let held = broker.queue("held").declare();
    let leased = broker.queue("leased").lease(S(3_000)).declare();
    for queue in [&held, &leased] {
        queue.publish(1);
        let decision = ack_on_success().on_error(|_: &Refused| Verdict::Abandon);
        let refusing = service_fn(|_| ready(Err::<(), _>(Refused)));
        let consumer = Consumer::new(queue.subscribe(4).unwrap(), refusing)
            .sentinel(SentinelLayer::new(SettlePolicy::new(decision)))
            .watchdog(EVERY, PATIENCE);
        let watch = consumer.watch();
        tokio::spawn(consumer.run());
        is_left_alone(&watch).await;
        assert_eq!(queue.counts().unacked, 1);
    }
    // What it counts comes back by itself.
    let faults = Faults::default();
    faults.0.sessions.store(1, Ordering::Relaxed);
    faults.0.lost.store(1, Ordering::Relaxed);
    is_left_alone(&spawn(&leased, 4, &faults)).await;
}

#[tokio::test(start_paused = true)]
async fn a_probe_that_fails_or_panics_ends_no_session() {
    let (log, _guard) = Log::start();
    for fault in [(|it| &it.refuses) as fn(&Switches) -> &AtomicBool, |it| {
        &it.panics
    }] {
        let faults = Faults::on(1, fault);
        let queue = queue(0);
        let watch = spawn(&queue, 4, &faults);
        sleep(S(1)).await;
        is_left_alone(&watch).await;
        assert!(faults.probes() > 900);
        // Told once.
    }
    let lines = log.lines();
    let failures = lines.iter().filter(|line| line.contains("probe"));
    assert_eq!(failures.count(), 2, "{lines:?}");
    assert!(
        lines
            .iter()
            .any(|line| line.contains("the broker can't be probed: "))
    );
}

#[tokio::test(start_paused = true)]
async fn a_subscription_without_probes_switches_the_watchdog_off() {
    let (log, _guard) = Log::start();
    let faults = Faults::on(1, |it| &it.has_no_probe);
    faults.0.deaf.store(true, Ordering::Relaxed);
    let queue = queue(3);
    let watch = spawn(&queue, 4, &faults);
    is_left_alone(&watch).await;
    let lines = log.lines();
    let off = lines.iter().filter(|line| line.contains("watchdog off"));
    assert_eq!(off.count(), 1, "{lines:?}");
}

#[test]
#[should_panic = "every 0 s"]
fn an_interval_of_zero_is_refused() {
    let consumer = Consumer::new(queue(0).subscribe(1).unwrap(), handler());
    drop(consumer.watchdog(Duration::ZERO, PATIENCE));
}

#[test]
#[should_panic = "before its second probe"]
fn a_patience_shorter_than_the_interval_is_refused() {
    let connect = || ready(queue(0).subscribe(1));
    let consumer = Consumer::reconnecting(connect, |_| handler());
    drop(consumer.watchdog(PATIENCE, EVERY));
}

#[cfg(feature = "metrics")]
#[tokio::test(start_paused = true)]
async fn a_stall_is_counted_by_its_kind_and_its_consumer() {
    use metrics_util::debugging::{DebugValue, DebuggingRecorder};

    let recorder: &DebuggingRecorder = Box::leak(Box::default());
    let _guard = metrics::set_default_local_recorder(recorder);
    tower_sentinel::telemetry::describe_metrics();
    for _ in 0..2 {
        let faults = Faults::on(1, |it| &it.silent);
        let consumer = Consumer::new(faults.subscribe(&queue(0), 4), handler())
            .sentinel(layer!())
            .name("orders")
            .watchdog(EVERY, PATIENCE);
        ends(consumer).await.unwrap_err();
    }
    let metrics = recorder.snapshotter().snapshot().into_vec().into_iter();
    let mut stalled =
        metrics.filter(|(key, ..)| key.key().name() == "tower_sentinel.consumer.stalled");
    let (key, unit, description, value) = stalled.next().unwrap();
    let labels = key.key().labels().map(|label| (label.key(), label.value()));
    let mut labels: Vec<_> = labels.collect();
    labels.sort_unstable();
    assert_eq!(labels, [("consumer.name", "orders"), ("reason", "silent")]);
    assert!(unit.is_some() && description.is_some());
    assert_eq!(value, DebugValue::Counter(2));
    assert!(stalled.next().is_none());
}
