//! Time limits, and the ladder by which a job is stopped.

use std::{
    future::{Future, pending},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::future::join;
use tokio::{
    runtime::{Builder, Handle, Runtime},
    task::{JoinSet, yield_now},
    time::{Instant, sleep},
};
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_sentinel::{
    Job, Outcome, Report, SentinelLayer, TimeLimit,
    cancel::Cancellation,
    cancelled,
    outcome::{CancelReason, OutcomeKind, TimedOut},
};

use crate::support::{
    Blocked, Bomb, Count, Fate, Plan, Recorder, Refused, Script, Seen, Unit, Work, Worker, call,
    current_thread, idle, log::Log, turn, until, wait_until,
};

const SECOND: Duration = Duration::from_secs(1);
const LIMIT: Duration = Duration::from_secs(10);
const GRACE: Duration = Duration::from_secs(3);
const STOP_WAIT: Duration = Duration::from_secs(5);

fn layer(recorder: &Recorder) -> SentinelLayer<Script> {
    SentinelLayer::new(recorder.policy())
        .timeout(LIMIT)
        .grace(GRACE)
        .stop_wait(STOP_WAIT)
}

/// Runs a job under `layer`.
async fn run<F>(
    layer: SentinelLayer<Script>,
    job: impl Fn() -> F + Clone + Send + 'static,
) -> Report<Unit, (), Refused>
where
    F: Future<Output = Result<(), Refused>> + Send + 'static,
{
    let mut sentinel = layer.layer(service_fn(move |_: Unit| job()));
    call(&mut sentinel, Unit::default()).await.unwrap()
}

fn timed_out<Tag: std::fmt::Debug>(report: Report<Tag, (), Refused>) -> TimedOut {
    match report.outcome {
        Outcome::TimedOut(timed_out) => timed_out,
        other => panic!("{:?}: {other:?}", report.tag),
    }
}

// === limits ===

#[tokio::test(start_paused = true)]
async fn a_job_that_hangs_times_out_at_its_limit() {
    let recorder = Recorder::default();
    let report = run(layer(&recorder).grace(Duration::ZERO), pending).await;
    assert_eq!(report.elapsed, LIMIT);
    let timed_out = timed_out(report);
    assert_eq!(timed_out.limit(), LIMIT);
    assert!(timed_out.stopped());
    assert!(timed_out.panic().is_none());
    assert_eq!(recorder.reports(), [Seen::timed_out(true)]);
}

#[tokio::test(start_paused = true)]
async fn a_job_that_ends_before_its_limit_is_not_disturbed() {
    let recorder = Recorder::default();
    let work = || async {
        sleep(LIMIT - Duration::from_millis(1)).await;
        Ok(())
    };
    let report = run(layer(&recorder), work).await;
    assert!(report.outcome.is_completed());
    assert_eq!(report.elapsed, LIMIT - Duration::from_millis(1));
}

#[tokio::test(start_paused = true)]
async fn the_limit_counts_from_the_call_and_not_from_the_first_poll() {
    let recorder = Recorder::default();
    let mut sentinel = layer(&recorder)
        .grace(Duration::ZERO)
        .layer(Worker::default());
    let response = sentinel.ready().await.unwrap().call(Work::new(Fate::Hang));
    sleep(6 * SECOND).await;
    let polled = Instant::now();
    let report = response.await.unwrap();
    assert_eq!(polled.elapsed(), 4 * SECOND);
    assert_eq!(report.elapsed, LIMIT);
    assert_eq!(timed_out(report).limit(), LIMIT);
}

#[tokio::test(start_paused = true)]
async fn the_limit_is_30_s_unless_the_layer_says_otherwise() {
    let recorder = Recorder::default();
    let report = run(SentinelLayer::new(recorder.policy()), pending).await;
    // No grace either.
    assert_eq!(report.elapsed, 30 * SECOND);
    assert_eq!(timed_out(report).limit(), 30 * SECOND);
}

#[tokio::test(start_paused = true)]
async fn a_job_without_a_limit_may_take_a_year() {
    let recorder = Recorder::default();
    let year = 365 * 24 * 3600 * SECOND;
    let work = move || async move {
        sleep(year).await;
        Ok(())
    };
    let report = run(layer(&recorder).no_timeout(), work).await;
    assert!(report.outcome.is_completed());
    assert!(report.elapsed >= year);
}

#[tokio::test(start_paused = true)]
async fn a_job_may_have_a_limit_of_its_own_or_none() {
    for (of_layer, of_job, limit) in [
        (Some(LIMIT), TimeLimit::Inherit, Some(LIMIT)),
        (Some(LIMIT), TimeLimit::Never, None),
        (Some(LIMIT), TimeLimit::After(SECOND), Some(SECOND)),
        (
            Some(LIMIT),
            TimeLimit::After(60 * SECOND),
            Some(60 * SECOND),
        ),
        (None, TimeLimit::Inherit, None),
        (None, TimeLimit::Never, None),
        (None, TimeLimit::After(SECOND), Some(SECOND)),
    ] {
        let recorder = Recorder::default();
        let layer = SentinelLayer::new(recorder.policy());
        let mut sentinel = match of_layer {
            Some(limit) => layer.timeout(limit),
            None => layer.no_timeout(),
        }
        .layer(Worker::default());
        let work = Work {
            fate: Fate::Hang,
            limit: of_job,
        };
        // A job without a limit is dropped in the end.
        let report = tokio::time::timeout(1000 * SECOND, call(&mut sentinel, work)).await;
        let limit_seen = report.ok().map(|report| timed_out(report.unwrap()).limit());
        assert_eq!(limit_seen, limit, "layer {of_layer:?}, job {of_job:?}");
        idle(&Handle::current()).await;
        assert_eq!(recorder.reports().len(), 1, "{of_layer:?}, {of_job:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_zero_limit_stops_a_job_at_once() {
    let recorder = Recorder::default();
    let layer = layer(&recorder)
        .timeout(Duration::ZERO)
        .grace(Duration::ZERO);
    let report = run(layer, pending).await;
    assert!(report.elapsed <= Duration::from_millis(1));
    assert_eq!(timed_out(report).limit(), Duration::ZERO);
    assert_eq!(recorder.reports(), [Seen::timed_out(true)]);
}

#[tokio::test(start_paused = true)]
async fn a_zero_limit_finds_a_job_completed_that_is_done_in_its_first_poll() {
    let recorder = Recorder::default();
    let mut sentinel = layer(&recorder)
        .timeout(Duration::ZERO)
        .grace(Duration::ZERO)
        .layer(service_fn(|_: Unit| async { Ok::<_, Refused>(()) }));
    let response = sentinel.ready().await.unwrap().call(Unit::default());
    // The job gets its first poll before anybody looks.
    yield_now().await;
    response.await.unwrap();
    assert_eq!(recorder.reports(), [Seen::completed()]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_zero_limit_gives_one_outcome_whoever_is_first() {
    const JOBS: usize = 2_000;
    let recorder = Recorder::default();
    let sentinel = SentinelLayer::new(recorder.policy())
        .timeout(Duration::ZERO)
        .layer(service_fn(|_: Unit| async { Ok::<_, Refused>(()) }));
    let mut callers = JoinSet::new();
    for _ in 0..JOBS {
        let mut sentinel = sentinel.clone();
        callers.spawn(async move { call(&mut sentinel, Unit::default()).await.unwrap() });
    }
    for report in callers.join_all().await {
        let kind = report.outcome.kind();
        // Which of the two is the scheduler's choice.
        assert!(matches!(
            kind,
            OutcomeKind::Completed | OutcomeKind::TimedOut
        ));
    }
    assert_eq!(recorder.reports().len(), JOBS);
}

#[tokio::test(start_paused = true)]
async fn the_longest_of_durations_do_not_overflow_and_never_pass() {
    let recorder = Recorder::default();
    let layer = SentinelLayer::new(recorder.policy())
        .timeout(Duration::MAX)
        .grace(Duration::MAX)
        .stop_wait(Duration::MAX)
        .settle_timeout(Duration::MAX);
    let year = 365 * 24 * 3600 * SECOND;
    let report = run(layer.clone(), move || async move {
        sleep(year).await;
        Ok(())
    });
    assert!(report.await.outcome.is_completed());

    // Each step of the ladder is reached: a grace without end …
    let work = Work {
        fate: Fate::Hang,
        limit: TimeLimit::After(SECOND),
    };
    let returns_when_told = service_fn(move |_: Work| async move {
        cancelled().await;
        sleep(year).await;
        Ok::<_, Refused>(())
    });
    let report = call(&mut layer.layer(returns_when_told), work).await;
    assert!(report.unwrap().outcome.is_completed());

    // … and a stop that is waited for without end.
    let layer = layer.grace(Duration::ZERO);
    let report = call(&mut layer.layer(Worker::default()), work).await;
    let report = report.unwrap();
    assert_eq!(report.elapsed, SECOND);
    assert!(timed_out(report).stopped());
}

// === the ladder ===

#[tokio::test(start_paused = true)]
async fn a_job_is_told_then_has_its_grace_then_is_aborted() {
    let recorder = Recorder::default();
    let (called, told, dropped) = (Instant::now(), Moment::default(), Moment::default());
    let job = {
        let (told, dropped) = (told.clone(), dropped.clone());
        move || {
            let (told, dropped) = (told.clone(), dropped.clone());
            async move {
                let _dropped = OnDrop(dropped);
                cancelled().await;
                told.now();
                pending().await
            }
        }
    };
    let report = run(layer(&recorder), job).await;
    assert_eq!(told.since(called), LIMIT);
    assert_eq!(dropped.since(called), LIMIT + GRACE);
    assert_eq!(report.elapsed, LIMIT + GRACE);
    let timed_out = timed_out(report);
    assert_eq!((timed_out.limit(), timed_out.stopped()), (LIMIT, true));
    assert_eq!(recorder.reports().len(), 1);
}

/// When something happened.
#[derive(Clone, Default)]
struct Moment(Arc<Mutex<Option<Instant>>>);

impl Moment {
    fn now(&self) {
        let before = self.0.lock().unwrap().replace(Instant::now());
        assert!(before.is_none(), "it happened before");
    }

    fn since(&self, start: Instant) -> Duration {
        let moment = self.0.lock().unwrap();
        moment.expect("it did not happen") - start
    }
}

struct OnDrop(Moment);

impl Drop for OnDrop {
    fn drop(&mut self) {
        self.0.now();
    }
}

#[tokio::test(start_paused = true)]
async fn a_job_that_returns_within_its_grace_has_completed_or_failed() {
    for (result, seen) in [(Ok(()), Seen::completed()), (Err(Refused), Seen::failed())] {
        let recorder = Recorder::default();
        let report = run(layer(&recorder), move || async move {
            cancelled().await;
            sleep(SECOND).await;
            result
        });
        assert_eq!(report.await.elapsed, LIMIT + SECOND);
        assert_eq!(recorder.reports(), [seen]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_job_that_does_not_listen_may_still_complete_within_its_grace() {
    let recorder = Recorder::default();
    let report = run(layer(&recorder), || async {
        sleep(LIMIT + SECOND).await;
        Ok(())
    });
    assert_eq!(report.await.elapsed, LIMIT + SECOND);
    assert_eq!(recorder.reports(), [Seen::completed()]);
}

#[tokio::test(start_paused = true)]
async fn a_panic_within_the_grace_is_attached() {
    let recorder = Recorder::default();
    let report = run(layer(&recorder), || async {
        cancelled().await;
        sleep(SECOND).await;
        panic!("while tidying up")
    })
    .await;
    assert_eq!(report.elapsed, LIMIT + SECOND);
    let timed_out = timed_out(report);
    assert_eq!(timed_out.panic().unwrap().message(), "while tidying up");
    assert!(timed_out.stopped());
    assert_eq!(recorder.reports(), [Seen::timed_out(true).with_panic(true)]);
}

#[tokio::test(start_paused = true)]
async fn a_panic_in_a_destructor_during_the_stop_is_attached() {
    let recorder = Recorder::default();
    let report = run(layer(&recorder), || async {
        let _bomb = Bomb;
        pending().await
    })
    .await;
    assert_eq!(report.elapsed, LIMIT + GRACE);
    let timed_out = timed_out(report);
    assert_eq!(timed_out.panic().unwrap().message(), "in a destructor");
    assert!(timed_out.stopped());
    assert_eq!(recorder.reports(), [Seen::timed_out(true).with_panic(true)]);
}

/// Returns a runtime with one thread for jobs that block.
fn one_thread() -> Runtime {
    Builder::new_multi_thread()
        .worker_threads(1)
        .build()
        .unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_job_that_does_not_stop_is_waited_for_and_then_reported_as_still_running() {
    let recorder = Recorder::default();
    let thread = Blocked::until_released();
    let jobs = one_thread();
    let mut sentinel = layer(&recorder)
        .runtime(jobs.handle().clone())
        .layer(Worker {
            thread: Arc::clone(&thread),
        });
    let response = sentinel.ready().await.unwrap();
    let response = response.call(Work::new(Fate::BlockFirst));
    assert!(wait_until(|| thread.entered()));
    let report = response.await.unwrap();
    assert_eq!(report.elapsed, LIMIT + GRACE + STOP_WAIT);
    let timed_out = timed_out(report);
    assert_eq!((timed_out.limit(), timed_out.stopped()), (LIMIT, false));
    assert!(timed_out.started());

    // Whatever becomes of it now, it has had its outcome.
    thread.release();
    assert!(wait_until(|| jobs.metrics().num_alive_tasks() == 0));
    idle(&Handle::current()).await;
    assert_eq!(recorder.reports(), [Seen::timed_out(false)]);
    jobs.shutdown_background();
}

#[tokio::test(start_paused = true)]
async fn a_job_that_returns_long_after_its_limit_has_completed_and_is_warned_of() {
    for (late, lines) in [(1, 0), (12, 1)] {
        let recorder = Recorder::default();
        let thread = Blocked::until_released();
        let jobs = one_thread();
        let blocked = Arc::clone(&thread);
        let mut sentinel = layer(&recorder)
            .stop_wait(60 * SECOND)
            .runtime(jobs.handle().clone())
            .layer(service_fn(move |_: Unit| {
                let blocked = Arc::clone(&blocked);
                async move {
                    blocked.block();
                    Ok::<_, Refused>(())
                }
            }));
        let (log, guard) = Log::start();
        let response = sentinel.ready().await.unwrap().call(Unit::default());
        let released = Arc::clone(&thread);
        let (response, ()) = join(response, async {
            assert!(wait_until(|| thread.entered()));
            sleep(LIMIT + GRACE + late * SECOND).await;
            released.release();
            // Its end wakes the supervisor, and the clock stands still meanwhile.
            assert!(wait_until(|| jobs.metrics().num_alive_tasks() == 0));
        })
        .await;
        drop(guard);
        assert_eq!(response.unwrap().outcome.kind(), OutcomeKind::Completed);
        let logged = log.lines();
        assert_eq!(logged.len(), lines, "{logged:?}");
        if let Some(line) = logged.first() {
            let late = GRACE + late * SECOND;
            let warning = format!("the job completed {late:?} after its limit: does it block");
            assert!(
                line.starts_with("WARN") && line.contains(&warning),
                "{line}"
            );
        }
        jobs.shutdown_background();
    }
}

#[tokio::test(start_paused = true)]
async fn a_job_that_returns_within_its_grace_is_not_late() {
    let recorder = Recorder::default();
    let (log, _guard) = Log::start();
    let mut sentinel = layer(&recorder)
        .grace(60 * SECOND)
        .layer(service_fn(async |_: Unit| {
            sleep(LIMIT + 59 * SECOND).await;
            Ok::<_, Refused>(())
        }));
    call(&mut sentinel, Unit::default()).await.unwrap();
    assert_eq!(log.lines(), [] as [String; 0]);
}

#[tokio::test(start_paused = true)]
async fn a_job_that_ends_while_it_is_waited_for_is_reported_at_once() {
    let recorder = Recorder::default();
    let jobs = current_thread();
    let mut sentinel = layer(&recorder)
        .runtime(jobs.handle().clone())
        .layer(service_fn(|_: Unit| pending::<Result<(), Refused>>()));
    let response = sentinel.ready().await.unwrap().call(Unit::default());
    let response = tokio::spawn(response);
    sleep(LIMIT + GRACE + SECOND).await;
    turn(&jobs);
    let report = response.await.unwrap().unwrap();
    assert_eq!(report.elapsed, LIMIT + GRACE + SECOND);
    assert!(timed_out(report).stopped());
    jobs.shutdown_background();
}

#[tokio::test(start_paused = true)]
async fn the_jobs_future_is_gone_before_the_policy_is_called() {
    let drops = Count::default();
    let guarded = drops.clone();
    let policy = service_fn(move |report: Report<Unit, (), Refused>| {
        let drops = drops.get();
        async move { Ok::<_, Refused>((report.outcome.kind(), drops)) }
    });
    let mut sentinel = SentinelLayer::new(policy).layer(service_fn(move |_: Unit| {
        let guard = guarded.guard();
        async move {
            let _guard = guard;
            pending::<Result<(), Refused>>().await
        }
    }));
    let answer = call(&mut sentinel, Unit::default()).await.unwrap();
    assert_eq!(answer, (OutcomeKind::TimedOut, 1));
}

// === jobs that block their thread: real time ===

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_limit_is_punctual_for_a_blocking_job_on_a_runtime_of_its_own() {
    let recorder = Recorder::default();
    let thread = Blocked::until_released();
    let jobs = Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    // On a busy machine a job may take this long to begin; a limit that comes before finds it gone.
    let (limit, stop_wait) = (Duration::from_millis(500), Duration::from_millis(20));
    let mut sentinel = SentinelLayer::new(recorder.policy())
        .timeout(limit)
        .stop_wait(stop_wait)
        .runtime(jobs.handle().clone())
        .layer(Worker {
            thread: Arc::clone(&thread),
        });
    let response = sentinel.ready().await.unwrap();
    let response = response.call(Work::new(Fate::BlockLater));
    until(|| thread.entered()).await;

    // The thread is blocked until we let it go, so to get here at all is to be punctual.
    let report = response.await.unwrap();
    assert!(report.elapsed >= limit + stop_wait);
    let timed_out = timed_out(report);
    assert_eq!((timed_out.limit(), timed_out.stopped()), (limit, false));

    // It returns a value then, which is nobody's business any more.
    let watch = usize::from(cfg!(feature = "metrics"));
    assert_eq!(jobs.metrics().num_alive_tasks(), 1 + watch);
    thread.release();
    idle(jobs.handle()).await;
    idle(&Handle::current()).await;
    assert_eq!(recorder.reports(), [Seen::timed_out(false)]);
    jobs.shutdown_background();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_blocking_job_on_the_runtime_of_its_caller_has_one_outcome_when_it_comes_back() {
    let recorder = Recorder::default();
    let is_back = Arc::new(AtomicBool::new(false));
    let back = Arc::clone(&is_back);
    let mut sentinel = SentinelLayer::new(recorder.policy())
        .timeout(Duration::from_millis(50))
        .stop_wait(Duration::MAX)
        .layer(service_fn(move |_: Unit| {
            let back = Arc::clone(&back);
            async move {
                // Perhaps the very thread that drives the timers.
                std::thread::sleep(Duration::from_millis(300));
                back.store(true, Ordering::SeqCst);
                pending::<Result<(), Refused>>().await
            }
        }));
    loop {
        let report = call(&mut sentinel, Unit::default()).await.unwrap();
        let timed_out = timed_out(report);
        assert!(timed_out.stopped());
        // A busy machine may come to the job too late.
        if timed_out.started() {
            break;
        }
    }
    // An abort acts at an await, so not before the thread is back.
    assert!(is_back.load(Ordering::SeqCst));
    idle(&Handle::current()).await;
    let reports = recorder.reports();
    assert!(reports.iter().all(|seen| *seen == Seen::timed_out(true)));
}

// === limit against completion ===

/// A job that sleeps for as long as its limit.
struct Close {
    id: usize,
    limit: Duration,
}

impl Job for Close {
    type Tag = usize;

    fn tag(&self) -> usize {
        self.id
    }

    fn time_limit(&self) -> TimeLimit {
        TimeLimit::After(self.limit)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_limit_that_races_completion_many_thousand_times_gives_one_outcome_each() {
    const JOBS: usize = 20_000;
    let calls: Arc<Vec<AtomicUsize>> = Arc::new((0..JOBS).map(|_| AtomicUsize::new(0)).collect());
    let counted = Arc::clone(&calls);
    let policy = service_fn(move |report: Report<usize, usize, Refused>| {
        counted[report.tag].fetch_add(1, Ordering::Relaxed);
        async move { Ok::<_, Refused>(report) }
    });
    let service = service_fn(|Close { id, limit }: Close| async move {
        // The timer fires in the same turn of the wheel as the limit's.
        sleep(limit).await;
        Ok::<_, Refused>(id)
    });
    let sentinel = SentinelLayer::new(policy)
        // An aborted job stops when its thread comes to it.
        .stop_wait(Duration::MAX)
        .layer(service);
    let mut callers = JoinSet::new();
    for id in 0..JOBS {
        let mut sentinel = sentinel.clone();
        let limit = Duration::from_millis(1 + id as u64 % 5);
        callers.spawn(async move { call(&mut sentinel, Close { id, limit }).await.unwrap() });
    }
    for report in callers.join_all().await {
        match report.outcome {
            Outcome::Completed(value) => assert_eq!(value, report.tag),
            Outcome::TimedOut(timed_out) => assert!(timed_out.stopped()),
            other => panic!("{}: {other:?}", report.tag),
        }
    }
    for (id, calls) in calls.iter().enumerate() {
        assert_eq!(calls.load(Ordering::Relaxed), 1, "job {id}");
    }
}

/// Returns the longest duration after which this clock can still tell the time.
fn longest(now: Instant) -> Duration {
    let seconds = (0..64).rev().map(|bit| Duration::new(1 << bit, 0));
    let nanos = (0..30).rev().map(|bit| Duration::from_nanos(1 << bit));
    seconds.chain(nanos).fold(Duration::ZERO, |sum, more| {
        let longer = sum.checked_add(more);
        longer
            .filter(|&longer| now.checked_add(longer).is_some())
            .unwrap_or(sum)
    })
}

#[tokio::test(start_paused = true)]
async fn a_limit_at_the_very_end_of_the_clock_never_passes() {
    let recorder = Recorder::default();
    let longest = longest(Instant::now());
    let layer = SentinelLayer::new(recorder.policy()).timeout(longest);
    let report = run(layer, || async {
        sleep(SECOND).await;
        Ok(())
    });
    assert!(report.await.outcome.is_completed());
}

#[tokio::test(start_paused = true)]
async fn a_grace_at_the_very_end_of_the_clock_never_passes() {
    let recorder = Recorder::default();
    let longest = longest(Instant::now());
    let report = run(layer(&recorder).grace(longest), || async {
        Cancellation::current().cancel(CancelReason::Requested);
        sleep(SECOND).await;
        Ok(())
    });
    assert!(report.await.outcome.is_completed());
}

#[tokio::test(start_paused = true)]
async fn a_settle_timeout_at_the_very_end_of_the_clock_never_passes() {
    let recorder = Recorder::default();
    let layer = SentinelLayer::new(recorder.scripted(Plan::Ok, SECOND))
        .no_timeout()
        .settle_timeout(longest(Instant::now()));
    let report = run(layer, || async { Ok(()) });
    assert!(report.await.outcome.is_completed());
}
