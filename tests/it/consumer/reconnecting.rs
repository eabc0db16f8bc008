//! A consumer that reconnects: its connects, its pauses and its end.

use std::{
    collections::VecDeque,
    future::{Future, pending, ready},
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};

use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tower::{Service, service_fn};
use tower_sentinel::{
    Consumer, Verdict,
    consumer::{EndCause, connect_fn},
    outcome::OutcomeKind,
    settle::Settled,
};

use crate::{
    consumer::{CallError, ends, here, stack},
    support::{
        Bomb, Count, Fate, Refused,
        log::Log,
        raise,
        subscription::{Channel, Deliveries, Delivery, End, Refusal},
    },
};

const MS: fn(u64) -> Duration = Duration::from_millis;

/// Result of an attempt to connect.
#[derive(Debug)]
pub(crate) enum Try {
    Channel(Channel),
    Fails,
    Panics,
    PanicsInFuture,
    Hangs,
}

/// A broker with a script, and when it was asked.
#[derive(Clone, Debug)]
pub(crate) struct Broker {
    script: Arc<Mutex<VecDeque<Try>>>,
    asked: Arc<Mutex<Vec<Duration>>>,
    started: Instant,
}

impl Broker {
    pub(crate) fn new(script: impl IntoIterator<Item = Try>) -> Self {
        Self {
            script: Arc::new(Mutex::new(script.into_iter().collect())),
            asked: Arc::default(),
            started: Instant::now(),
        }
    }

    /// Follows the script, and then fails for ever.
    pub(crate) fn connect(
        &self,
    ) -> impl Future<Output = Result<Deliveries, Refused>> + Send + use<> {
        self.asked.lock().unwrap().push(self.started.elapsed());
        let next = self.script.lock().unwrap().pop_front();
        let next = next.unwrap_or(Try::Fails);
        if let Try::Panics = next {
            raise("in connect");
        }
        async move {
            match next {
                Try::Channel(channel) => Ok(channel.subscribe()),
                Try::Fails => Err(Refused),
                Try::Hangs => pending().await,
                Try::Panics | Try::PanicsInFuture => raise("in connect"),
            }
        }
    }

    pub(crate) fn started(&self) -> Instant {
        self.started
    }

    /// Returns when it was asked, in milliseconds; a timer may be one late.
    pub(crate) fn asked(&self) -> Vec<u64> {
        let asked = self.asked.lock().unwrap();
        asked
            .iter()
            .map(|at| at.as_millis() as u64 / 10 * 10)
            .collect()
    }
}

pub(crate) fn service(
    shutdown: CancellationToken,
) -> impl Service<Delivery, Response = Settled, Error = CallError, Future: Send + 'static> + Send + 'static
{
    stack(2, shutdown, here())
}

/// A channel that fails once `jobs` are done.
fn short(jobs: impl IntoIterator<Item = Fate>) -> (Channel, Try) {
    let channel = Channel::of(jobs);
    let ending = channel.clone();
    tokio::spawn(async move {
        crate::support::until(|| ending.taken() == 1).await;
        ending.end(End::Failed);
    });
    (channel.clone(), Try::Channel(channel))
}

#[tokio::test(start_paused = true)]
async fn pauses_grow_up_to_their_bound() {
    let broker = Broker::new([]);
    let connect = broker.clone();
    let consumer = Consumer::reconnecting(move || connect.connect(), service)
        .backoff(MS(100)..=MS(500))
        .random(|| 1.0)
        .max_attempts(6);
    let error = ends(consumer).await.unwrap_err();
    assert!(matches!(error.cause(), EndCause::Connect(Refused)));
    assert_eq!(broker.asked(), [0, 100, 300, 700, 1_200, 1_700]);
}

#[tokio::test(start_paused = true)]
async fn the_jitter_is_full() {
    let broker = Broker::new([]);
    let connect = broker.clone();
    let consumer = Consumer::reconnecting(move || connect.connect(), service)
        .backoff(MS(100)..=MS(500))
        .random(|| 0.0)
        .max_attempts(4);
    assert!(ends(consumer).await.is_err());
    assert_eq!(broker.asked(), [0; 4]);
}

#[tokio::test(start_paused = true)]
async fn the_backoff_starts_over_after_a_session_that_worked() {
    let (channel, session) = short([Fate::Value]);
    let idle = Channel::of([]);
    idle.end(End::Failed);
    let broker = Broker::new([Try::Fails, Try::Fails, session, Try::Channel(idle)]);
    let connect = broker.clone();
    let consumer = Consumer::reconnecting(move || connect.connect(), service)
        .backoff(MS(100)..=MS(10_000))
        .random(|| 1.0)
        .max_attempts(3);
    let error = ends(consumer).await.unwrap_err();
    // The session lasts from 300 to 1,300; an idle one that ends at once has not worked.
    assert_eq!(broker.asked(), [0, 100, 300, 1_400, 1_600, 2_000]);
    assert_eq!(error.summary().answered, 1);
    assert_eq!(
        (channel.verdicts(), channel.closed()),
        (vec![Verdict::Ack], 1)
    );
}

#[tokio::test(start_paused = true)]
async fn a_connect_may_take_the_number_of_its_attempt() {
    let (_, session) = short([Fate::Value]);
    let broker = Broker::new([Try::Fails, Try::Fails, session]);
    let numbers = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&numbers);
    let connect = connect_fn(move |attempt| {
        noted.lock().unwrap().push(attempt);
        broker.connect()
    });
    let consumer = Consumer::reconnecting(connect, service).max_attempts(3);
    assert!(ends(consumer).await.is_err());
    assert_eq!(*numbers.lock().unwrap(), [1, 2, 3, 1, 2, 3]);
}

#[tokio::test(start_paused = true)]
async fn an_idle_session_that_lasted_has_worked() {
    let idle = Channel::of([]);
    let broker = Broker::new([Try::Fails, Try::Fails, Try::Channel(idle.clone())]);
    let connect = broker.clone();
    let consumer = Consumer::reconnecting(move || connect.connect(), service)
        .backoff(MS(100)..=MS(500))
        .random(|| 1.0)
        .max_attempts(3);
    tokio::spawn(async move {
        sleep(MS(5_000)).await;
        idle.end(End::Ended);
    });
    assert!(ends(consumer).await.is_err());
    assert_eq!(broker.asked(), [0, 100, 300, 5_100, 5_300, 5_700]);
}

#[tokio::test(start_paused = true)]
async fn each_session_has_a_fresh_service_and_token() {
    let (first, one) = short([Fate::Value]);
    let second = Channel::of([Fate::Value, Fate::Hang]);
    let broker = Broker::new([one, Try::Channel(second.clone())]);
    let made = Count::default();
    let count = made.clone();
    let consumer = Consumer::reconnecting(
        move || broker.connect(),
        move |shutdown: CancellationToken| {
            assert!(!shutdown.is_cancelled());
            count.add();
            service(shutdown)
        },
    )
    .with_graceful_shutdown(sleep(MS(60_000)));
    let summary = ends(consumer).await.unwrap();
    assert_eq!(made.get(), 2);
    assert_eq!((summary.called, summary.answered), (3, 3));
    assert_eq!(summary.outcomes(OutcomeKind::Completed), 2);
    assert_eq!(summary.outcomes(OutcomeKind::Cancelled), 1);
    assert_eq!(first.verdicts(), [Verdict::Ack]);
    assert_eq!(second.verdicts(), [Verdict::Ack, Verdict::release()]);
    assert_eq!((first.closed(), second.closed()), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_lost_answer_is_followed_by_a_new_channel() {
    let (lossy, clean) = (Channel::of([Fate::Value]), Channel::of([Fate::Value]));
    lossy.refuse(Refusal::Fails);
    let broker = Broker::new([Try::Channel(lossy.clone()), Try::Channel(clean.clone())]);
    let consumer = Consumer::reconnecting(move || broker.connect(), service)
        .with_graceful_shutdown(sleep(MS(60_000)));
    let summary = ends(consumer).await.unwrap();
    assert_eq!((summary.answered, summary.unanswered), (1, 1));
    assert_eq!((lossy.closed(), lossy.verdicts()), (1, vec![]));
    assert_eq!(clean.verdicts(), [Verdict::Ack]);
}

#[tokio::test(start_paused = true)]
async fn a_wrong_configuration_is_not_tried_again() {
    let channel = Channel::of([Fate::Error]);
    channel.refuse(Refusal::Unsupported);
    let broker = Broker::new([Try::Channel(channel.clone())]);
    let connect = broker.clone();
    let consumer = Consumer::reconnecting(move || connect.connect(), service);
    let error = ends(consumer.run()).await;
    let error = error.unwrap_err();
    assert!(matches!(error.cause(), EndCause::Misconfigured(_)));
    assert_eq!((broker.asked().len(), channel.closed()), (1, 1));
}

/// Returns a broker whose only channel ends, and whose job shows in the drain that the configuration is wrong.
fn misconfigured_in_a_drain() -> Broker {
    let channel = Channel::of([Fate::Error]);
    channel.refuse(Refusal::Unsupported);
    let ending = channel.clone();
    tokio::spawn(async move {
        sleep(MS(500)).await;
        ending.end(End::Failed);
    });
    Broker::new([Try::Channel(channel)])
}

#[tokio::test(start_paused = true)]
async fn a_wrong_configuration_found_in_a_drain_is_not_tried_again() {
    let broker = misconfigured_in_a_drain();
    let error = ends(Consumer::reconnecting(move || broker.connect(), service)).await;
    assert!(matches!(
        error.unwrap_err().cause(),
        EndCause::Misconfigured(_)
    ));
}

#[tokio::test(start_paused = true)]
async fn a_wrong_configuration_is_told_also_if_the_end_is_requested_in_that_drain() {
    let broker = misconfigured_in_a_drain();
    let consumer = Consumer::reconnecting(move || broker.connect(), service)
        .with_graceful_shutdown(sleep(MS(700)));
    let error = ends(consumer).await.unwrap_err();
    assert!(matches!(error.cause(), EndCause::Misconfigured(_)));
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_ends_a_pause_and_a_connect_at_once() {
    for next in [Try::Fails, Try::Hangs] {
        let broker = Broker::new([next]);
        let started = Instant::now();
        let consumer = Consumer::reconnecting(move || broker.connect(), service)
            .backoff(MS(60_000)..=MS(60_000))
            .random(|| 1.0)
            .with_graceful_shutdown(sleep(MS(500)));
        assert_eq!(ends(consumer).await.unwrap().called, 0);
        assert!((MS(500)..MS(505)).contains(&started.elapsed()));
    }
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_while_an_error_drains_ends_it() {
    let channel = Channel::of([Fate::Hang]);
    let ending = channel.clone();
    tokio::spawn(async move {
        sleep(MS(500)).await;
        ending.end(End::Failed);
    });
    let broker = Broker::new([Try::Channel(channel.clone())]);
    let connect = broker.clone();
    let started = Instant::now();
    let consumer = Consumer::reconnecting(move || connect.connect(), service)
        .drain_timeout(MS(10_000))
        .with_graceful_shutdown(sleep(MS(1_000)))
        .with_forced_shutdown(sleep(MS(3_000)));
    let summary = ends(consumer).await.unwrap();
    assert_eq!(summary.verdicts(Verdict::release()), 1);
    assert_eq!(broker.asked(), [0]);
    // Both timers count from the beginning.
    assert!((MS(3_000)..MS(3_005)).contains(&started.elapsed()));
}

#[tokio::test(start_paused = true)]
async fn a_dropped_future_stops_reconnecting() {
    let broker = Broker::new([]);
    let connect = broker.clone();
    let consumer = Consumer::reconnecting(move || connect.connect(), service)
        .backoff(MS(100)..=MS(100))
        .random(|| 1.0);
    let consuming = tokio::spawn(ends(consumer));
    sleep(MS(250)).await;
    consuming.abort();
    sleep(MS(10_000)).await;
    assert_eq!(broker.asked(), [0, 100, 200]);
}

#[tokio::test(start_paused = true)]
async fn panics_are_tries_that_failed() {
    for next in [
        [Try::Panics, Try::Panics],
        [Try::PanicsInFuture, Try::PanicsInFuture],
    ] {
        let broker = Broker::new(next);
        let consumer = Consumer::reconnecting(move || broker.connect(), service).max_attempts(2);
        let error = ends(consumer).await.unwrap_err();
        let EndCause::ConnectPanicked(panic) = error.cause() else {
            panic!("{error:?}");
        };
        assert_eq!(panic.message(), "in connect");
    }
    let calls = Count::default();
    let (count, broker) = (calls.clone(), Broker::new([]));
    let connect = broker.clone();
    let never =
        service_fn(|_: Delivery| async { Err::<(), CallError>(CallError::Unready(Refused)) });
    let consumer = Consumer::reconnecting(
        move || connect.connect(),
        move |_| {
            count.add();
            if count.get() > 0 {
                raise("in make_service");
            }
            never
        },
    )
    .max_attempts(2);
    let error = ends(consumer).await.unwrap_err();
    assert!(matches!(error.cause(), EndCause::MakeServicePanicked(_)));
    assert_eq!(calls.get(), 2);
    // No connection is made that nobody uses.
    assert!(broker.asked().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_slow_connect_to_a_stream_that_ends_at_once_is_no_session_that_worked() {
    let dead = || {
        let channel = Channel::of([]);
        channel.end(End::Ended);
        channel
    };
    let broker = Broker::new((0..10).map(|_| Try::Channel(dead())));
    let connect = broker.clone();
    let slowly = move || {
        let connecting = connect.connect();
        async move {
            sleep(MS(3_000)).await;
            connecting.await
        }
    };
    let consumer = Consumer::reconnecting(slowly, service)
        .backoff(MS(100)..=MS(1_000))
        .random(|| 1.0)
        .max_attempts(5);
    let error = ends(consumer).await.unwrap_err();
    assert!(matches!(error.cause(), EndCause::StreamEnded));
    assert_eq!(broker.asked().len(), 5);
}

#[tokio::test(start_paused = true)]
async fn a_channel_that_hangs_on_close_is_no_session_that_worked() {
    for tasks in [1, 3] {
        let dead = || {
            let channel = Channel::of([]);
            channel.end(End::Failed);
            channel.never_close();
            channel
        };
        let broker = Broker::new((0..10).map(|_| Try::Channel(dead())));
        let connect = broker.clone();
        let consumer = Consumer::reconnecting(move || connect.connect(), service)
            .backoff(MS(100)..=MS(1_000))
            .random(|| 1.0)
            .tasks(tasks)
            .max_attempts(3);
        assert!(ends(consumer).await.is_err());
        assert_eq!(broker.asked().len(), 3, "{tasks} tasks");
    }
}

#[tokio::test(start_paused = true)]
async fn a_connect_that_hangs_is_a_try_that_failed() {
    for (limit, asked) in [(None, [0, 30_100]), (Some(MS(2_000)), [0, 2_100])] {
        let broker = Broker::new([Try::Hangs, Try::Hangs]);
        let connect = broker.clone();
        let mut consumer = Consumer::reconnecting(move || connect.connect(), service)
            .backoff(MS(100)..=MS(500))
            .random(|| 1.0)
            .max_attempts(2);
        if let Some(limit) = limit {
            consumer = consumer.connect_timeout(limit);
        }
        let error = ends(consumer).await.unwrap_err();
        let limit = limit.unwrap_or(MS(30_000));
        assert!(matches!(error.cause(), EndCause::ConnectTimedOut(it) if *it == limit));
        assert!(error.cause().is_transient());
        assert_eq!(broker.asked(), asked);
    }
}

/// A service whose destructor panics.
struct Explosive<S>(S, #[allow(dead_code)] Bomb);

impl<S: Service<Delivery>> Service<Delivery> for Explosive<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, delivery: Delivery) -> S::Future {
        self.0.call(delivery)
    }
}

#[tokio::test(start_paused = true)]
async fn what_was_made_for_a_connect_that_fails_is_told_and_dropped() {
    for fails in [Try::Fails, Try::Panics, Try::PanicsInFuture, Try::Hangs] {
        let clean = Channel::of([Fate::Value]);
        let cell = format!("{fails:?}");
        let broker = Broker::new([fails, Try::Channel(clean.clone())]);
        let tokens = Arc::new(Mutex::new(Vec::new()));
        let made = Arc::clone(&tokens);
        let make_service = move |shutdown: CancellationToken| {
            made.lock().unwrap().push(shutdown.clone());
            Explosive(service(shutdown), Bomb)
        };
        let seen = Arc::clone(&tokens);
        let consumer = Consumer::reconnecting(move || broker.connect(), make_service)
            .tasks(2)
            .backoff(MS(100)..=MS(500))
            .with_graceful_shutdown(async move {
                crate::support::until(|| clean.settled().len() == 1).await;
                let seen = seen.lock().unwrap();
                let cancelled = seen.iter().map(CancellationToken::is_cancelled);
                let cancelled: Vec<_> = cancelled.collect();
                assert_eq!(cancelled, [true, true, false, false], "{cell}");
            });
        let summary = ends(consumer).await.unwrap();
        assert_eq!(summary.answered, 1);
        assert_eq!(tokens.lock().unwrap().len(), 4);
    }
}

#[tokio::test(start_paused = true)]
async fn a_token_that_is_cancelled_elsewhere_ends_the_consumer() {
    let channel = Channel::of([Fate::Hang; 1_000]);
    let broker = Broker::new([Try::Channel(channel.clone())]);
    let connect = broker.clone();
    let tokens = Arc::new(Mutex::new(None));
    let given = Arc::clone(&tokens);
    let make_service = move |shutdown: CancellationToken| {
        *given.lock().unwrap() = Some(shutdown.clone());
        service(shutdown)
    };
    let consumer = Consumer::reconnecting(move || connect.connect(), make_service);
    let consuming = tokio::spawn(ends(consumer.run()));
    crate::support::until(|| channel.taken() == 2).await;
    tokens.lock().unwrap().take().unwrap().cancel();
    let summary = consuming.await.unwrap().unwrap();
    assert_eq!((summary.called, channel.closed()), (2, 1));
    assert_eq!(broker.asked().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn the_token_of_a_session_that_drains_beside_another_ends_nothing() {
    let (lost, next) = (Channel::of([Fate::Hang]), Channel::of([]));
    let broker = Broker::new([Try::Channel(lost.clone()), Try::Channel(next.clone())]);
    let consumer = Consumer::reconnecting(move || broker.connect(), service)
        .drain_timeout(MS(2_000))
        .with_graceful_shutdown(sleep(MS(60_000)));
    let consuming = tokio::spawn(ends(consumer));
    crate::support::until(|| lost.taken() == 1).await;
    lost.lose();
    crate::support::until(|| lost.closed() == 1).await;
    sleep(MS(10_000)).await;
    next.publish([Fate::Value]);
    let summary = consuming.await.unwrap().unwrap();
    assert_eq!((summary.called, summary.answered), (2, 1));
}

#[test]
#[should_panic(expected = "would never connect")]
fn no_attempt_at_all_is_refused() {
    let connect = || ready(Err::<Deliveries, _>(Refused));
    let _ = Consumer::reconnecting(connect, service).max_attempts(0);
}

#[tokio::test(start_paused = true)]
async fn the_log_of_an_outage_tells_what_became_of_each_session() {
    let (lossy, hanging) = (Channel::of([Fate::Value]), Channel::of([Fate::Hang]));
    lossy.refuse(Refusal::Fails);
    let script = [lossy, hanging].map(Try::Channel);
    let broker = Broker::new([Try::Fails].into_iter().chain(script));
    let (log, _guard) = Log::start();
    let consumer = Consumer::reconnecting(move || broker.connect(), service)
        .backoff(MS(100)..=MS(500))
        .random(|| 1.0)
        .drain_timeout(MS(1_000))
        .with_graceful_shutdown(sleep(MS(60_000)));
    ends(consumer).await.unwrap();
    let lost = "a job may be unsettled: the policy failed: the delivery was not settled with \\\"ack\\\" in 1 try: \
        refused";
    let lines = log.lines();
    let of_the_consumer: Vec<_> = lines
        .iter()
        .filter(|line| !line.contains("settle{") && !line.contains("the job was"))
        .collect();
    assert_eq!(
        of_the_consumer,
        [
            "INFO connecting attempt=1",
            "WARN reconnecting after a pause attempts=1 pause=100ms cause=\"can't connect: refused\"",
            "INFO connecting attempt=2",
            "INFO connected",
            &format!("WARN session ending cause=\"{lost}\""),
            "INFO drain starting in_flight=0",
            "INFO drain ended",
            "ERROR channel given up unanswered=1 abandoned=0",
            &format!("WARN reconnecting after a pause attempts=0 pause=100ms cause=\"{lost}\""),
            "INFO connecting attempt=1",
            "INFO connected",
            "INFO session ending on request",
            "INFO drain starting in_flight=1",
            "WARN drain stopping the calls that still run in_flight=1",
            "INFO drain ended",
            "INFO session ended",
        ]
    );
}
