//! A consumer ends in order, whatever ends it and whatever runs then.

use std::{
    convert::Infallible,
    future::{Future, IntoFuture, pending},
    io,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{future::BoxFuture, task::AtomicWaker};
use tokio::{
    runtime::{Builder, Handle},
    task::{spawn_blocking, yield_now},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tower::{BoxError, Service, ServiceBuilder, service_fn};
use tower_sentinel::{
    Consumer, SentinelError, Verdict,
    consumer::{AfterError, ConsumerError, EndCause, Escalate, Escalation, Summary},
    outcome::OutcomeKind,
    settle::SettleError,
};

use super::{CallError, FOREVER, ends, here, stack};
use crate::support::{
    Blocked, Bomb, Count, Fate, Refused, Worker, raise,
    subscription::{Channel, Delivery, End, Refusal, Stopping},
    until, wait_until,
};

type Ended = Result<Summary, ConsumerError<Refused, CallError>>;

const MS: fn(u64) -> Duration = Duration::from_millis;

/// Becomes unready with an error when it is told to.
#[derive(Clone, Debug, Default)]
struct Switch(Arc<(AtomicBool, AtomicWaker)>);

impl Switch {
    fn fail(&self) {
        self.0.0.store(true, Ordering::SeqCst);
        self.0.1.wake();
    }

    fn around<S>(&self, service: S) -> Switched<S> {
        let switch = self.clone();
        Switched { switch, service }
    }
}

struct Switched<S> {
    switch: Switch,
    service: S,
}

impl<S: Service<Delivery, Error = CallError>> Service<Delivery> for Switched<S> {
    type Response = S::Response;
    type Error = CallError;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), CallError>> {
        let (failed, waker) = &*self.switch.0;
        waker.register(cx.waker());
        match failed.load(Ordering::SeqCst) {
            true => Poll::Ready(Err(SentinelError::Unready(Refused))),
            false => self.service.poll_ready(cx),
        }
    }

    fn call(&mut self, job: Delivery) -> Self::Future {
        self.service.call(job)
    }
}

// === the product ===

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    StreamEnd,
    StreamError,
    UnreadyError,
    PolicyFailure,
    Shutdown,
    FutureDropped,
    SecondSignal,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Load {
    Idle,
    /// The gate is full of jobs that hang.
    Hanging,
    /// The gate is full of jobs that finish during the drain.
    Finishing,
    /// A job that blocks its thread fills the gate.
    Blocking,
}

/// What is to be seen at the end.
struct Expected {
    verdicts: Vec<Verdict>,
    /// When it stops to ask for jobs, counted from the first poll.
    begins: Duration,
    /// The end, counted likewise.
    after: Duration,
    unanswered: u64,
    not_stopped: u64,
}

fn expected(by: By, load: Load) -> Expected {
    let fails = by == By::PolicyFailure;
    let drain_begins = match (by, load) {
        // The job whose settlement fails comes to its end then.
        (By::PolicyFailure, Load::Blocking) => MS(0),
        (By::PolicyFailure, _) => MS(1_000),
        _ => MS(500),
    };
    let cut = match by {
        By::SecondSignal => MS(250),
        _ => MS(10_000),
    };
    let (verdicts, after) = match load {
        Load::Idle => (vec![], drain_begins),
        Load::Hanging => {
            let left = if fails { 2 } else { 3 };
            (vec![Verdict::release(); left], drain_begins + cut)
        }
        Load::Finishing if by == By::SecondSignal => {
            (vec![Verdict::release(); 3], drain_begins + cut)
        }
        Load::Finishing => {
            let left = if fails { 2 } else { 3 };
            (vec![Verdict::Ack; left], MS(1_000))
        }
        // The time that the sentinel waits for the thread.
        Load::Blocking => (vec![Verdict::release()], drain_begins + cut + MS(5_000)),
    };
    Expected {
        verdicts,
        begins: drain_begins,
        after,
        unanswered: fails.into(),
        not_stopped: (load == Load::Blocking).into(),
    }
}

async fn check(by: By, load: Load, tasks: usize) {
    let case = format!("{by:?} × {load:?} × {tasks} tasks");
    let fails = by == By::PolicyFailure;
    let mut jobs = match load {
        Load::Idle => vec![],
        Load::Hanging => vec![Fate::Hang; 3],
        Load::Finishing => vec![Fate::Value; 3],
        Load::Blocking => vec![Fate::BlockFirst],
    };
    match load {
        _ if !fails => {}
        Load::Idle => jobs.push(Fate::Value),
        Load::Hanging => jobs[2] = Fate::Value,
        Load::Finishing => {}
        Load::Blocking => jobs.push(Fate::PanicInCall),
    }
    let gate = jobs.len().max(1);
    let channel = Channel::of(jobs.iter().copied());
    if load != Load::Idle {
        // Those that the gate keeps in the stream.
        channel.publish([Fate::Value; 2]);
    }
    if fails {
        channel.refuse(Refusal::Fails);
    }

    let runtime = (load == Load::Blocking).then(|| {
        Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap()
    });
    let thread = Blocked::until_released();
    let worker = Worker {
        thread: Arc::clone(&thread),
    };
    let handle = runtime
        .as_ref()
        .map_or_else(Handle::current, |it| it.handle().clone());
    let shutdown = CancellationToken::new();
    let switch = Switch::default();
    let gates = match (tasks, load) {
        (1, _) => vec![gate],
        (_, Load::Idle) => vec![1; tasks],
        _ => vec![1; gate],
    };
    let services = gates.into_iter().map(|gate| {
        let here = (worker.clone(), handle.clone());
        switch.around(stack(gate, shutdown.clone(), here))
    });
    let (first, second) = (CancellationToken::new(), CancellationToken::new());
    let consumer = Consumer::parallel(channel.subscribe(), services)
        .shutdown(shutdown.clone())
        .drain_timeout(MS(10_000))
        .with_graceful_shutdown(first.clone().cancelled_owned())
        .with_forced_shutdown(second.clone().cancelled_owned());

    let started = Instant::now();
    let mut consuming = tokio::spawn(ends(consumer));
    yield_now().await;
    if load == Load::Blocking {
        // The virtual clock stands still meanwhile.
        let (thread, channel) = (Arc::clone(&thread), channel.clone());
        let begun = move || thread.entered() && (!fails || !channel.refuses());
        assert!(
            spawn_blocking(move || wait_until(begun)).await.unwrap(),
            "{case}"
        );
    }
    if !fails {
        sleep(MS(500)).await;
        assert_eq!(channel.taken(), jobs.len() as u64, "{case}");
    }
    match by {
        By::StreamEnd => channel.end(End::Ended),
        By::StreamError => channel.end(End::Failed),
        By::UnreadyError => switch.fail(),
        By::PolicyFailure => {}
        By::Shutdown => first.cancel(),
        By::FutureDropped => consuming.abort(),
        By::SecondSignal => {
            first.cancel();
            sleep(MS(250)).await;
            second.cancel();
        }
    }
    let ended = (&mut consuming).await;
    if by == By::FutureDropped {
        assert!(ended.unwrap_err().is_cancelled());
        // It goes on in the background, and its last act is to close the channel.
        until(|| channel.closed() == 1).await;
    } else {
        let expected = expected(by, load);
        let summary = match (by, ended.unwrap()) {
            (By::Shutdown | By::SecondSignal, Ok(summary)) => summary,
            (By::StreamEnd, Err(error)) => {
                assert!(matches!(error.cause(), EndCause::StreamEnded), "{case}");
                error.into_parts().1
            }
            (By::StreamError, Err(error)) => {
                assert!(matches!(error.cause(), EndCause::Stream(Refused)), "{case}");
                error.into_parts().1
            }
            (By::UnreadyError, Err(error)) => {
                assert!(matches!(error.cause(), EndCause::Unready(_)), "{case}");
                error.into_parts().1
            }
            (By::PolicyFailure, Err(error)) => {
                assert!(matches!(error.cause(), EndCause::Unanswered(_)), "{case}");
                error.into_parts().1
            }
            (_, ended) => panic!("{case}: {ended:?}"),
        };
        assert_eq!(summary.called, jobs.len() as u64, "{case}");
        assert_eq!(summary.answered, expected.verdicts.len() as u64, "{case}");
        assert_eq!(summary.failed, expected.unanswered, "{case}");
        assert_eq!(summary.unanswered, expected.unanswered, "{case}");
        assert_eq!((summary.abandoned, summary.charged), (0, 0), "{case}");
        assert_eq!(summary.not_stopped, expected.not_stopped, "{case}");
        assert_eq!(
            summary.not_stopped_tags.len() as u64,
            expected.not_stopped,
            "{case}"
        );
        for verdict in [Verdict::Ack, Verdict::release()] {
            let n = expected
                .verdicts
                .iter()
                .filter(|it| **it == verdict)
                .count() as u64;
            assert_eq!(summary.verdicts(verdict), n, "{case}");
            let kind = match verdict {
                Verdict::Ack => OutcomeKind::Completed,
                _ => OutcomeKind::Cancelled,
            };
            assert_eq!(summary.outcomes(kind), n, "{case}");
        }
    }
    let Expected {
        verdicts,
        begins,
        after,
        ..
    } = expected(by, load);
    assert_eq!(channel.verdicts(), verdicts, "{case}");
    let took = channel.closed_at() - started;
    assert!((after..after + MS(5)).contains(&took), "{case}: {took:?}");
    assert_eq!((channel.closed(), channel.stale()), (1, 0), "{case}");
    match (by, &channel.stops()[..]) {
        // The stream is over.
        (By::StreamEnd | By::StreamError, []) => {}
        (By::StreamEnd | By::StreamError, stops) => panic!("{case}: {stops:?}"),
        (_, [stop]) => {
            let took = stop.at - started;
            assert!((begins..begins + MS(5)).contains(&took), "{case}: {took:?}");
            // All end at once where it is one of them that begins the drain.
            let may_be_late = fails && load == Load::Finishing;
            assert!(stop.settled == 0 || may_be_late, "{case}: {stop:?}");
        }
        (_, stops) => panic!("{case}: {stops:?}"),
    }
    assert_eq!(channel.taken(), jobs.len() as u64, "{case}");
    assert!(shutdown.is_cancelled(), "{case}");
    thread.release();
    if let Some(runtime) = runtime {
        runtime.shutdown_background();
    }
}

async fn check_all(load: Load) {
    for by in [
        By::StreamEnd,
        By::StreamError,
        By::UnreadyError,
        By::PolicyFailure,
        By::Shutdown,
        By::FutureDropped,
        By::SecondSignal,
    ] {
        for tasks in [1, 3] {
            check(by, load, tasks).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn every_end_while_idle() {
    check_all(Load::Idle).await;
}

#[tokio::test(start_paused = true)]
async fn every_end_with_a_gate_full_of_jobs_that_hang() {
    check_all(Load::Hanging).await;
}

#[tokio::test(start_paused = true)]
async fn every_end_with_jobs_that_finish_during_the_drain() {
    check_all(Load::Finishing).await;
}

#[tokio::test(start_paused = true)]
async fn every_end_with_a_job_that_blocks() {
    check_all(Load::Blocking).await;
}

#[tokio::test(start_paused = true)]
async fn a_stop_that_panics_or_never_ends_costs_and_delays_nothing() {
    for stopping in [Stopping::Panics, Stopping::Never] {
        for (tasks, jobs) in [(1, 0), (1, 2), (3, 0), (3, 2)] {
            let case = format!("{stopping:?}, {tasks} tasks, {jobs} jobs");
            // They finish after a second.
            let channel = Channel::of(vec![Fate::Value; jobs]);
            channel.stop_by(stopping);
            let shutdown = CancellationToken::new();
            let services = (0..tasks).map(|_| stack(2, shutdown.clone(), here()));
            let consumer = Consumer::parallel(channel.subscribe(), services)
                .shutdown(shutdown.clone())
                .with_graceful_shutdown(sleep(MS(500)));
            let started = Instant::now();
            let summary = ends(consumer).await.unwrap();
            assert_eq!(summary.answered, jobs as u64, "{case}");
            assert_eq!(channel.verdicts(), vec![Verdict::Ack; jobs], "{case}");
            assert_eq!((channel.closed(), channel.stale()), (1, 0), "{case}");
            assert_eq!(channel.stops().len(), 1, "{case}");
            let after = MS(if jobs == 0 { 500 } else { 1_000 });
            let took = channel.closed_at() - started;
            assert!((after..after + MS(5)).contains(&took), "{case}: {took:?}");
        }
    }
}

// === pulling ===

#[tokio::test(start_paused = true)]
async fn no_more_jobs_are_pulled_than_the_gate_lets_in() {
    for gate in [1, 2, 7, 64] {
        let channel = Channel::of([Fate::Value, Fate::Error, Fate::PanicInCall].repeat(100));
        let service = stack(gate, CancellationToken::new(), here());
        let consumer = Consumer::new(channel.subscribe(), service)
            .with_graceful_shutdown(sleep(Duration::from_secs(1_000)));
        let summary = ends(consumer).await.unwrap();
        assert_eq!(channel.most_unsettled(), gate as u64);
        assert_eq!((summary.called, summary.answered), (300, 300));
        assert_eq!(summary.verdicts(Verdict::Ack), 100);
        assert_eq!(summary.verdicts(Verdict::retry()), 200);
        assert_eq!(summary.charged, 200);
        for kind in [
            OutcomeKind::Completed,
            OutcomeKind::Failed,
            OutcomeKind::Panicked,
        ] {
            assert_eq!(summary.outcomes(kind), 100);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn nothing_is_pulled_while_the_service_is_unready() {
    let channel = Channel::of([Fate::Value]);
    let service = tower::util::BoxService::new(Never);
    let consumer = Consumer::new(channel.subscribe(), service);
    assert!(timeout(FOREVER, consumer.into_future()).await.is_err());
    assert_eq!(channel.taken(), 0);
}

struct Never;

impl Service<Delivery> for Never {
    type Response = ();
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<(), Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Pending
    }

    fn call(&mut self, _: Delivery) -> Self::Future {
        unreachable!()
    }
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_is_always_ready_starves_nobody() {
    let channel = Channel::of([Fate::Hang; 100_000]);
    let service = service_fn(|_: Delivery| async { Ok::<_, Infallible>(()) });
    let consumer = Consumer::new(channel.subscribe(), service);
    let consuming = tokio::spawn(consumer.into_future());
    yield_now().await;
    // Tokio lets 61 polls pass before it comes back to a task that yields.
    let taken = channel.taken();
    assert!((1..10_000).contains(&taken), "{taken}");
    // Nor does it stop.
    until(|| channel.taken() == 100_000).await;
    assert!(!consuming.is_finished());
    consuming.abort();
}

#[tokio::test(start_paused = true)]
async fn jobs_that_wait_for_each_other_are_all_taken() {
    // More than are taken at once. None ends before all are there, so no answer brings the next.
    const JOBS: u64 = 1_000;
    let channel = Channel::of([Fate::Value; JOBS as usize]);
    let all = channel.clone();
    let service = service_fn(move |_: Delivery| {
        let all = all.clone();
        async move {
            until(|| all.taken() == JOBS).await;
            Ok::<_, Infallible>(())
        }
    });
    let consumer = Consumer::new(channel.subscribe(), service)
        .with_graceful_shutdown(sleep(Duration::from_secs(1_000)));
    assert_eq!(ends(consumer).await.unwrap().answered, JOBS);
}

#[tokio::test(start_paused = true)]
async fn a_consumer_that_is_dropped_before_its_first_poll_takes_nothing() {
    let channel = Channel::of([Fate::Value]);
    let service = stack(1, CancellationToken::new(), here());
    drop(Consumer::new(channel.subscribe(), service).into_future());
    sleep(FOREVER).await;
    assert_eq!((channel.taken(), channel.closed()), (0, 0));
}

// === errors of calls ===

async fn consume(channel: &Channel) -> Ended {
    let shutdown = CancellationToken::new();
    let service = stack(2, shutdown.clone(), here());
    ends(Consumer::new(channel.subscribe(), service).shutdown(shutdown)).await
}

#[tokio::test(start_paused = true)]
async fn a_policy_that_panics_costs_the_channel() {
    let channel = Channel::of([Fate::Value, Fate::Value]);
    channel.refuse(Refusal::Panics);
    let error = consume(&channel).await.unwrap_err();
    let EndCause::Unanswered(SentinelError::PolicyPanicked(_)) = error.cause() else {
        panic!("{error:?}");
    };
    assert_eq!(channel.verdicts(), [Verdict::Ack]);
    assert_eq!((error.summary().unanswered, channel.closed()), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_decision_that_can_not_be_made_is_a_wrong_configuration() {
    let channel = Channel::of([Fate::Error]);
    channel.refuse(Refusal::Unsupported);
    let error = consume(&channel).await.unwrap_err();
    let EndCause::Misconfigured(SentinelError::Policy(SettleError::Undecided(_))) = error.cause()
    else {
        panic!("{error:?}");
    };
    assert!(!error.cause().is_transient());
    assert_eq!((error.summary().unanswered, channel.closed()), (1, 1));
}

#[test]
fn errors_know_how_far_they_reach() {
    let failed = |verdict| SettleError::Failed {
        verdict,
        tries: 1,
        error: Refused,
    };
    let limit = MS(5);
    let unsupported = SettleError::Unsupported {
        verdict: Verdict::Ack,
    };
    for (error, escalation) in [
        (CallError::Unready(Refused), Escalation::Channel),
        (CallError::Policy(failed(Verdict::Ack)), Escalation::Channel),
        (
            CallError::Policy(failed(Verdict::release())),
            Escalation::Channel,
        ),
        (
            CallError::Policy(failed(Verdict::Abandon)),
            Escalation::Call,
        ),
        (CallError::Policy(unsupported), Escalation::Consumer),
        (CallError::PolicyTimedOut(limit), Escalation::Channel),
    ] {
        assert_eq!(error.escalation(), escalation, "{error:?}");
    }
}

/// A service without a sentinel, whose jobs fail as their fate says.
async fn plain(delivery: Delivery) -> Result<(), BoxError> {
    match delivery.fate {
        Fate::Value => Ok(()),
        Fate::PanicLater => {
            yield_now().await;
            raise("in a response future")
        }
        Fate::PanicInDrop => {
            let _bomb = Bomb;
            pending().await
        }
        Fate::Hang => pending().await,
        _ => Err(Refused.into()),
    }
}

fn call_alone(_: &BoxError) -> Escalation {
    Escalation::Call
}

#[tokio::test(start_paused = true)]
async fn an_error_of_one_call_stops_or_not_as_it_is_told() {
    for (after_error, calls) in [(AfterError::Stop, 1), (AfterError::Continue, 4)] {
        let channel = Channel::of([Fate::Error, Fate::Error, Fate::Value, Fate::Value]);
        let service = ServiceBuilder::new().concurrency_limit(1).service_fn(plain);
        let consumer = Consumer::new(channel.subscribe(), service)
            .escalation(call_alone)
            .on_error(after_error)
            .with_graceful_shutdown(sleep(MS(10)));
        let (summary, failed) = match ends(consumer).await {
            Ok(summary) => (summary, 2),
            Err(error) => {
                assert!(matches!(error.cause(), EndCause::Failed(_)));
                (error.into_parts().1, 1)
            }
        };
        assert_eq!((summary.called, summary.failed), (calls, failed));
        assert_eq!((summary.unanswered, channel.closed()), (0, 1));
    }
}

#[tokio::test(start_paused = true)]
async fn a_closure_that_panics_costs_the_channel() {
    let channel = Channel::of([Fate::Error]);
    let consumer = Consumer::new(channel.subscribe(), service_fn(plain))
        .escalation(|_: &BoxError| raise("in the closure"));
    let error = ends(consumer).await.unwrap_err();
    assert!(matches!(error.cause(), EndCause::Unanswered(_)));
}

#[tokio::test(start_paused = true)]
async fn a_sentinel_under_more_middleware_is_told_of_by_a_closure() {
    let channel = Channel::of([Fate::Value]);
    channel.refuse(Refusal::Fails);
    let service = ServiceBuilder::new()
        .timeout(Duration::from_secs(60))
        .service(stack(1, CancellationToken::new(), here()));
    let consumer = Consumer::new(channel.subscribe(), service).escalation(|error: &BoxError| {
        let inner = error.downcast_ref::<CallError>();
        inner.map_or(Escalation::Channel, Escalate::escalation)
    });
    let error = ends(consumer).await.unwrap_err();
    assert!(matches!(error.cause(), EndCause::Unanswered(_)));
}

// === panics ===

#[tokio::test(start_paused = true)]
async fn a_stream_that_panics_ends_the_consumer() {
    for jobs in [vec![], vec![Fate::Value; 2]] {
        let acks = vec![Verdict::Ack; jobs.len()];
        let channel = Channel::of(jobs);
        let later = channel.clone();
        tokio::spawn(async move {
            sleep(MS(10)).await;
            later.end(End::Panics);
        });
        let error = consume(&channel).await.unwrap_err();
        let EndCause::StreamPanicked(panic) = error.cause() else {
            panic!("{error:?}");
        };
        assert_eq!(panic.message(), "in the stream");
        assert_eq!((channel.verdicts(), channel.closed()), (acks, 1));
    }
}

struct Panics {
    in_readiness: bool,
    in_call: bool,
}

impl Service<Delivery> for Panics {
    type Response = ();
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<(), BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        if self.in_readiness {
            raise("in readiness");
        }
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, delivery: Delivery) -> Self::Future {
        if self.in_call {
            raise("in call");
        }
        Box::pin(plain(delivery))
    }
}

#[tokio::test(start_paused = true)]
async fn a_service_that_panics_ends_the_consumer() {
    for (in_readiness, in_call, called) in [(true, false, 0), (false, true, 1), (false, false, 1)] {
        let channel = Channel::of([Fate::PanicLater]);
        let service = Panics {
            in_readiness,
            in_call,
        };
        let consumer = Consumer::new(channel.subscribe(), service).escalation(call_alone);
        let error = ends(consumer).await.unwrap_err();
        match error.cause() {
            EndCause::UnreadyPanicked(_) if in_readiness => {}
            EndCause::CallPanicked(_) if !in_readiness => {}
            other => panic!("{other:?}"),
        }
        let summary = error.summary();
        assert_eq!((summary.called, summary.unanswered), (called, called));
        assert_eq!((summary.answered, summary.failed), (0, called));
        assert_eq!((channel.taken(), channel.closed()), (called, 1));
    }
}

// === the drain ===

#[tokio::test(start_paused = true)]
async fn a_service_that_can_not_be_stopped_is_abandoned() {
    for token in [None, Some(CancellationToken::new())] {
        let channel = Channel::of([Fate::Hang, Fate::PanicInDrop, Fate::Hang]);
        let mut consumer = Consumer::new(channel.subscribe(), service_fn(plain))
            .escalation(call_alone)
            .with_graceful_shutdown(sleep(MS(500)));
        // Where nobody is told, nobody is waited for.
        let mut after = MS(500 + 30_000);
        if let Some(token) = token {
            consumer = consumer.shutdown(token);
            after += MS(40_000);
        }
        let started = Instant::now();
        let summary = ends(consumer).await.unwrap();
        assert_eq!((summary.called, summary.abandoned), (3, 3));
        let late = started.elapsed().saturating_sub(after);
        assert!(started.elapsed() >= after && late < MS(20), "{late:?} late");
        assert_eq!(channel.closed(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_token_that_is_cancelled_elsewhere_is_a_graceful_signal() {
    for tasks in [1, 3] {
        // Each would be called and released at once, for ever with a broker that delivers it again.
        let channel = Channel::of([Fate::Hang; 1_000]);
        let shutdown = CancellationToken::new();
        let services = (0..tasks).map(|_| stack(2, shutdown.clone(), here()));
        let consumer = Consumer::parallel(channel.subscribe(), services).shutdown(shutdown.clone());
        let consuming = tokio::spawn(ends(consumer));
        sleep(MS(500)).await;
        shutdown.cancel();
        let summary = consuming.await.unwrap().unwrap();
        assert_eq!(summary.called, 2 * tasks);
        assert_eq!(summary.verdicts(Verdict::release()), 2 * tasks);
        assert_eq!((channel.closed(), channel.stale()), (1, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn no_call_that_has_ended_is_abandoned() {
    // They end as the drain begins, which has no time for them.
    for token in [None, Some(CancellationToken::new())] {
        let channel = Channel::of([Fate::Value; 1_000]);
        let service = service_fn(|_: Delivery| async {
            sleep(MS(500)).await;
            Ok::<_, Infallible>(())
        });
        let mut consumer = Consumer::new(channel.subscribe(), service)
            .drain_timeout(Duration::ZERO)
            .stop_timeout(Duration::ZERO)
            .with_graceful_shutdown(sleep(MS(500)));
        if let Some(token) = token {
            consumer = consumer.shutdown(token);
        }
        let summary = ends(consumer).await.unwrap();
        assert_eq!((summary.answered, summary.abandoned), (1_000, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn a_channel_that_does_not_close_is_left() {
    let channel = Channel::of([]);
    channel.never_close();
    channel.end(End::Failed);
    let started = Instant::now();
    assert!(consume(&channel).await.is_err());
    assert!((MS(5_000)..MS(5_020)).contains(&started.elapsed()));
}

#[tokio::test(start_paused = true)]
async fn a_settlement_that_fails_in_a_drain_is_counted() {
    let channel = Channel::of([Fate::Value, Fate::Hang]);
    channel.refuse(Refusal::Fails);
    let shutdown = CancellationToken::new();
    let service = stack(2, shutdown.clone(), here());
    let consumer = Consumer::new(channel.subscribe(), service)
        .shutdown(shutdown)
        .with_graceful_shutdown(sleep(MS(500)));
    let summary = ends(consumer).await.unwrap();
    assert_eq!((summary.answered, summary.unanswered), (1, 1));
    assert_eq!(
        (channel.verdicts(), channel.closed()),
        (vec![Verdict::release()], 1)
    );
}

#[tokio::test(start_paused = true)]
async fn the_second_signal_is_not_polled_before_the_first() {
    let polled = Count::default();
    let (first, counted) = (CancellationToken::new(), polled.clone());
    let channel = Channel::of([Fate::Hang]);
    let shutdown = CancellationToken::new();
    let service = stack(1, shutdown.clone(), here());
    let consumer = Consumer::new(channel.subscribe(), service)
        .shutdown(shutdown)
        .with_graceful_shutdown(first.clone().cancelled_owned())
        .with_forced_shutdown(async move { counted.add() });
    let consuming = tokio::spawn(ends(consumer));
    sleep(MS(500)).await;
    assert_eq!(polled.get(), 0);
    first.cancel();
    let summary = consuming.await.unwrap().unwrap();
    assert_eq!((polled.get(), summary.verdicts(Verdict::release())), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_signal_that_panics_is_given() {
    let channel = Channel::of([]);
    let service = stack(1, CancellationToken::new(), here());
    let consumer = Consumer::new(channel.subscribe(), service)
        .with_graceful_shutdown(async { raise("in the signal") });
    assert_eq!(ends(consumer).await.unwrap(), Summary::default());
}

#[test]
fn a_runtime_that_ends_is_told_of() {
    let runtime = Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let channel = Channel::of([]);
    let mut consuming = {
        let _context = runtime.enter();
        Consumer::new(
            channel.subscribe(),
            stack(1, CancellationToken::new(), here()),
        )
        .into_future()
    };
    let waker = futures_util::task::noop_waker();
    {
        let _context = runtime.enter();
        let polled = Pin::new(&mut consuming).poll(&mut Context::from_waker(&waker));
        assert!(polled.is_pending());
    }
    runtime.shutdown_timeout(MS(1_000));
    let ended = crate::support::block_on(pin!(consuming));
    assert!(matches!(ended.unwrap_err().cause(), EndCause::RuntimeGone));
}

/// Fails or not in turn, once its time is over.
async fn drained_cause(escalations: [Escalation; 3]) -> EndCause<Refused, usize> {
    let channel = Channel::of([Fate::Value; 3]);
    let calls = Count::default();
    let service = service_fn(move |_: Delivery| {
        let call = calls.get();
        calls.add();
        async move {
            sleep(MS(100 * (call as u64 + 1))).await;
            Err::<(), _>(call)
        }
    });
    let consumer = Consumer::new(channel.subscribe(), service)
        .escalation(move |call: &usize| escalations[*call])
        .on_error(AfterError::Continue);
    let (cause, summary) = ends(consumer).await.unwrap_err().into_parts();
    assert_eq!((summary.called, summary.failed), (3, 3));
    cause
}

#[tokio::test(start_paused = true)]
async fn the_graver_of_two_causes_is_reported_and_else_the_first() {
    use Escalation::{Call, Channel, Consumer};

    for (escalations, reported) in [
        ([Channel, Channel, Channel], 0),
        ([Channel, Consumer, Channel], 1),
        ([Channel, Call, Consumer], 2),
        ([Channel, Consumer, Consumer], 1),
        ([Consumer, Channel, Consumer], 0),
        ([Call, Channel, Consumer], 2),
        ([Call, Channel, Call], 1),
    ] {
        match drained_cause(escalations).await {
            EndCause::Unanswered(call) => {
                assert_eq!((call, escalations[call]), (reported, Channel));
            }
            EndCause::Misconfigured(call) => {
                assert_eq!((call, escalations[call]), (reported, Consumer));
            }
            other => panic!("{escalations:?}: {other:?}"),
        }
    }
}

#[test]
fn an_error_prints_its_cause() {
    let cause = EndCause::<io::Error, BoxError>::Failed(Refused.into());
    assert_eq!(cause.to_string(), "a call failed: refused");
}
