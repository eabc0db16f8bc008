//! Limits: the time at which they pass, and their order against completion.

use std::{
    future::pending,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    runtime::Handle,
    task::{JoinSet, yield_now},
    time::{Instant, sleep},
};
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_sentinel::{
    Job, Outcome, Report, SentinelLayer, TimeLimit,
    cancel::Cancellation,
    cancelled,
    outcome::{CancelReason, OutcomeKind},
};

use super::{LIMIT, SECOND, layer, run, timed_out};
use crate::support::{Fate, Plan, Recorder, Refused, Seen, Unit, Work, Worker, call, idle};

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

/// Returns the longest duration after which this clock still has a time.
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
