//! A worker pauses while most of its jobs fail, and wastes few deliveries.

use std::{
    fmt,
    future::pending,
    panic::catch_unwind,
    pin::pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    task::{Context, Poll},
    thread,
    time::Duration,
};

use futures_util::{future::BoxFuture, poll};
use tokio::{
    runtime::Builder,
    sync::Semaphore,
    task::{JoinHandle, JoinSet, yield_now},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
use tower_layer::Layer;
use tower_sentinel::{
    IntensityLayer, SentinelLayer,
    cancel::Cancellation,
    intensity::{Intensity, IntensityState},
    outcome::{CancelReason, OutcomeKind},
};
use tower_test::mock;
use tracing::{
    Event, Metadata, Subscriber,
    field::{Field, Visit},
    span,
};

use crate::support::{
    Blocked, Bomb, Count, Recorder, Refused, Seen, Unit, call, current_thread, paused_time, raise,
    turn, until,
};

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// A layer that pauses after two failures in a row, for 100 ms, 200 ms, 400 ms, and so on.
fn strict() -> IntensityLayer {
    IntensityLayer::new()
        .window(2)
        .threshold(1.0)
        .minimum_sample(2)
        .pause(ms(100)..=ms(30_000))
}

// === jobs ===

/// What the next jobs do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Ok,
    Error,
    PanicInCall,
    PanicInFuture,
    Hang,
    /// Hangs, and panics when it is dropped.
    HangWithBomb,
    /// Hangs until it is told to stop.
    OkWhenTold,
    ErrorWhenTold,
    PanicWhenTold,
    LosesItsLease,
    /// Asks for its cancellation, and panics before anybody could see that.
    CancelsThenPanics,
    /// Panics, and a guard asks for its cancellation as that unwinds.
    CancelsInUnwinding,
    /// As the one before, in `call`.
    CancelsInUnwindingOfCall,
    /// Catches a panic whose guard asks for its cancellation, and panics when it is told.
    CatchesThenPanics,
    /// Catches such a panic, and panics when it is dropped.
    CatchesThenHangsWithBomb,
    Blocks,
}

/// A service whose jobs have the fate that was set last.
#[derive(Clone, Debug)]
struct Worker {
    fate: Arc<Mutex<Fate>>,
    calls: Count,
    thread: Arc<Blocked>,
}

impl Worker {
    fn new(fate: Fate) -> Self {
        Self {
            fate: Arc::new(Mutex::new(fate)),
            calls: Count::default(),
            thread: Blocked::until_released(),
        }
    }

    fn set(&self, fate: Fate) {
        *self.fate.lock().unwrap() = fate;
    }
}

struct CancelOnDrop;

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        Cancellation::current().cancel(CancelReason::Requested);
    }
}

impl Service<Unit> for Worker {
    type Response = ();
    type Error = Refused;
    type Future = BoxFuture<'static, Result<(), Refused>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Refused>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Unit) -> Self::Future {
        self.calls.add();
        let fate = *self.fate.lock().unwrap();
        if fate == Fate::PanicInCall {
            raise("in call");
        }
        if fate == Fate::CancelsInUnwindingOfCall {
            let _guard = CancelOnDrop;
            raise("before its request")
        }
        let thread = Arc::clone(&self.thread);
        Box::pin(async move {
            match fate {
                Fate::Ok => Ok(()),
                Fate::Error => Err(Refused),
                Fate::PanicInCall | Fate::CancelsInUnwindingOfCall => unreachable!(),
                Fate::PanicInFuture => raise("in the future"),
                Fate::Hang => pending().await,
                Fate::HangWithBomb => {
                    let _bomb = Bomb;
                    pending().await
                }
                Fate::OkWhenTold | Fate::ErrorWhenTold | Fate::PanicWhenTold => {
                    tower_sentinel::cancelled().await;
                    match fate {
                        Fate::OkWhenTold => Ok(()),
                        Fate::ErrorWhenTold => Err(Refused),
                        _ => raise("on the way down"),
                    }
                }
                Fate::LosesItsLease => {
                    Cancellation::current().cancel(CancelReason::LeaseLost);
                    pending().await
                }
                Fate::CancelsThenPanics => {
                    Cancellation::current().cancel(CancelReason::Requested);
                    raise("after its request")
                }
                Fate::CancelsInUnwinding => {
                    let _guard = CancelOnDrop;
                    raise("before its request")
                }
                Fate::CatchesThenPanics | Fate::CatchesThenHangsWithBomb => {
                    let caught = catch_unwind(|| {
                        let _guard = CancelOnDrop;
                        raise("and is caught")
                    });
                    assert!(caught.is_err());
                    if fate == Fate::CatchesThenHangsWithBomb {
                        let _bomb = Bomb;
                        pending::<()>().await;
                    }
                    tower_sentinel::cancelled().await;
                    raise("in its grace")
                }
                Fate::Blocks => {
                    thread.block();
                    pending().await
                }
            }
        })
    }
}

/// Whether `service` is ready now; the ready instance stays so.
async fn is_ready<S: Service<Unit, Error: fmt::Debug>>(service: &mut S) -> bool {
    matches!(poll!(pin!(service.ready())), Poll::Ready(Ok(_)))
}

fn paused(state: IntensityState) -> Option<Duration> {
    match state {
        IntensityState::Paused { pause, .. } => Some(pause),
        _ => None,
    }
}

/// Lets `service` pause, by jobs that fail.
async fn let_it_pause(service: &mut Intensity<Worker>) {
    let fate = *service.get_ref().fate.lock().unwrap();
    service.get_ref().set(Fate::Error);
    while is_ready(service).await {
        let _refused = service.call(Unit::default()).await;
    }
    service.get_ref().set(fate);
}

// === what counts ===

/// How a job is brought to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// By itself, or by its limit of 1 s.
    Limit,
    CallerDrops,
    Shutdown,
}

/// Runs two jobs in a sentinel and returns whether they made it pause, and what they were.
async fn run_two(fate: Fate, end: End, grace: Duration) -> (bool, Vec<OutcomeKind>) {
    let recorder = Recorder::default();
    let layer = strict();
    let state = layer.watch();
    let shutdown = CancellationToken::new();
    let mut service = SentinelLayer::new(recorder.policy())
        .timeout(ms(1_000))
        .grace(grace)
        .shutdown(shutdown.clone())
        .layer(layer.layer(Worker::new(fate)));
    let mut responses = JoinSet::new();
    for _ in 0..2 {
        let mut response = Box::pin(service.ready().await.unwrap().call(Unit::default()));
        responses.spawn(async move {
            match end {
                End::CallerDrops => drop(timeout(ms(500), &mut response).await),
                End::Limit | End::Shutdown => drop(response.await),
            }
        });
    }
    sleep(ms(500)).await;
    if end == End::Shutdown {
        shutdown.cancel();
    }
    responses.join_all().await;
    until(|| recorder.reports().len() == 2).await;
    let kinds = recorder.reports().iter().map(|seen| seen.kind).collect();
    (paused(*state.borrow()).is_some(), kinds)
}

#[tokio::test(start_paused = true)]
async fn what_will_have_failed_counts_and_what_will_have_been_cancelled_does_not() {
    use OutcomeKind::{Cancelled, Completed, Failed, Panicked, TimedOut};
    let none = Duration::ZERO;
    let some = ms(100);
    for (fate, end, grace, kind) in [
        (Fate::Ok, End::Limit, none, Completed),
        (Fate::Error, End::Limit, none, Failed),
        (Fate::PanicInCall, End::Limit, none, Panicked),
        (Fate::PanicInFuture, End::Limit, none, Panicked),
        (Fate::Hang, End::Limit, none, TimedOut),
        (Fate::Hang, End::Limit, some, TimedOut),
        (Fate::HangWithBomb, End::Limit, none, TimedOut),
        (Fate::OkWhenTold, End::Limit, some, Completed),
        (Fate::ErrorWhenTold, End::Limit, some, Failed),
        (Fate::PanicWhenTold, End::Limit, some, TimedOut),
        (Fate::Hang, End::CallerDrops, none, Cancelled),
        (Fate::Hang, End::CallerDrops, some, Cancelled),
        (Fate::HangWithBomb, End::CallerDrops, none, Cancelled),
        (Fate::OkWhenTold, End::CallerDrops, some, Completed),
        (Fate::PanicWhenTold, End::CallerDrops, some, Cancelled),
        (Fate::Hang, End::Shutdown, none, Cancelled),
        (Fate::HangWithBomb, End::Shutdown, none, Cancelled),
        (Fate::OkWhenTold, End::Shutdown, some, Completed),
        (Fate::ErrorWhenTold, End::Shutdown, some, Failed),
        (Fate::PanicWhenTold, End::Shutdown, some, Cancelled),
        (Fate::LosesItsLease, End::Limit, none, Cancelled),
        (Fate::LosesItsLease, End::Limit, some, Cancelled),
        (Fate::CancelsThenPanics, End::Limit, none, Cancelled),
        (Fate::CancelsInUnwinding, End::Limit, none, Panicked),
        (Fate::CancelsInUnwinding, End::Limit, some, Panicked),
        (Fate::CancelsInUnwindingOfCall, End::Limit, none, Panicked),
        (Fate::CatchesThenPanics, End::Limit, some, Cancelled),
        (Fate::CatchesThenHangsWithBomb, End::Limit, none, Cancelled),
        (Fate::CatchesThenHangsWithBomb, End::Limit, some, Cancelled),
    ] {
        let case = format!("{fate:?}, {end:?}, {grace:?}");
        let (pauses, kinds) = run_two(fate, end, grace).await;
        assert_eq!(kinds, [kind; 2], "{case}");
        let counts = matches!(kind, Failed | Panicked | TimedOut);
        assert_eq!(pauses, counts, "{case}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_destructor_that_panics_as_the_runtime_of_its_job_ends_does_not_count() {
    let recorder = Recorder::default();
    let layer = strict();
    let state = layer.watch();
    let jobs = current_thread();
    let mut service = SentinelLayer::new(recorder.policy())
        .runtime(jobs.handle().clone())
        .layer(layer.layer(Worker::new(Fate::HangWithBomb)));
    let mut responses = JoinSet::new();
    for _ in 0..2 {
        responses.spawn(service.ready().await.unwrap().call(Unit::default()));
    }
    turn(&jobs);
    jobs.shutdown_background();
    responses.join_all().await;
    let seen = Seen::cancelled(CancelReason::RuntimeGone, true).with_panic(true);
    assert_eq!(recorder.reports(), [seen; 2]);
    assert_eq!(*state.borrow(), IntensityState::Running);
}

#[tokio::test(start_paused = true)]
async fn a_future_that_is_dropped_as_a_panic_unwinds_counts() {
    let layer = strict();
    let state = layer.watch();
    let mut service = layer.layer(Worker::new(Fate::Hang));
    for _ in 0..2 {
        let hanging = service.ready().await.unwrap().call(Unit::default());
        let job = tokio::spawn(async move {
            let _held = hanging;
            yield_now().await;
            raise("around the service")
        });
        assert!(job.await.unwrap_err().is_panic());
    }
    assert!(paused(*state.borrow()).is_some());
}

#[tokio::test(start_paused = true)]
async fn a_future_that_is_dropped_outside_of_a_job_does_not_count() {
    let layer = strict();
    let state = layer.watch();
    let mut service = layer.layer(Worker::new(Fate::Hang));
    for _ in 0..10 {
        let mut hanging = service.ready().await.unwrap().call(Unit::default());
        assert!(poll!(&mut hanging).is_pending());
    }
    assert_eq!(*state.borrow(), IntensityState::Running);
}

// === when it pauses ===

/// Runs jobs that are ok where `results` has a `.` and fail where it has an `x`, and returns after
/// how many it pauses.
async fn pauses_after(layer: &IntensityLayer, results: &str) -> Option<usize> {
    let worker = Worker::new(Fate::Ok);
    let mut service = layer.clone().window(4).layer(worker.clone());
    for (index, result) in results.chars().enumerate() {
        if !is_ready(&mut service).await {
            return Some(index);
        }
        worker.set(match result {
            'x' => Fate::Error,
            _ => Fate::Ok,
        });
        let _result = service.call(Unit::default()).await;
    }
    (!is_ready(&mut service).await).then_some(results.len())
}

#[tokio::test(start_paused = true)]
async fn it_pauses_once_enough_of_the_last_jobs_failed() {
    let half = IntensityLayer::new().threshold(0.5).minimum_sample(3);
    for (results, expected) in [
        ("", None),
        ("xx", None),
        ("xxx", Some(3)),
        (".x.", None),
        (".xx", Some(3)),
        ("x.x", Some(3)),
        // After a window full of successes, two more.
        ("........xx", Some(10)),
        ("...x...x...x", None),
        ("x..x", Some(4)),
        // The first failure has left the window.
        ("x...x.x", Some(7)),
        ("x...x..", None),
        // A success completes the sample.
        ("xx.", None),
        ("xx.x", Some(4)),
    ] {
        assert_eq!(pauses_after(&half, results).await, expected, "{results}");
    }
    let all = IntensityLayer::new().threshold(1.0).minimum_sample(0);
    assert_eq!(pauses_after(&all, "x").await, Some(1));
    assert_eq!(pauses_after(&all, ".xxx").await, None);
    assert_eq!(pauses_after(&all, ".xxxx").await, Some(5));
    // A sample above the window is the window.
    let patient = IntensityLayer::new().minimum_sample(1_000);
    assert_eq!(pauses_after(&patient, "xxxx").await, Some(4));
}

#[test]
fn settings_that_make_no_sense_panic() {
    type Set = fn(IntensityLayer) -> IntensityLayer;
    let settings: [Set; 7] = [
        |layer| layer.window(0),
        |layer| layer.threshold(0.0),
        |layer| layer.threshold(-0.1),
        |layer| layer.threshold(1.1),
        |layer| layer.threshold(f64::NAN),
        |layer| layer.pause(Duration::ZERO..=ms(1)),
        |layer| layer.pause(ms(2)..=ms(1)),
    ];
    for set in settings {
        let layer = IntensityLayer::new();
        assert!(thread::spawn(move || set(layer)).join().is_err());
    }
}

// === pauses and probes ===

#[tokio::test(start_paused = true)]
async fn each_probe_that_fails_makes_the_pause_longer_and_one_that_succeeds_ends_it() {
    let layer = strict().pause(ms(100)..=ms(500));
    let worker = Worker::new(Fate::Error);
    let mut service = layer.layer(worker.clone());
    let_it_pause(&mut service).await;
    for pause in [100, 200, 400, 500, 500].map(ms) {
        let paused_at = Instant::now();
        service.ready().await.unwrap();
        assert_eq!(paused_at.elapsed(), pause);
        assert!(!is_ready(&mut service.clone()).await, "one probe alone");
        let _refused = service.call(Unit::default()).await;
    }
    service.ready().await.unwrap();
    worker.set(Fate::Ok);
    service.call(Unit::default()).await.unwrap();

    // All at once.
    let mut clones: Vec<_> = (0..100).map(|_| service.clone()).collect();
    for clone in &mut clones {
        assert!(is_ready(clone).await);
    }
    // And what came before is forgotten: one failure is none of two, and the pause is the first.
    worker.set(Fate::Error);
    let _refused = service.ready().await.unwrap().call(Unit::default()).await;
    assert!(is_ready(&mut service).await);
    let_it_pause(&mut service).await;
    assert_eq!(paused(*layer.watch().borrow()), Some(ms(100)));
}

#[tokio::test(start_paused = true)]
async fn jobs_that_were_called_before_a_pause_say_nothing_after_it() {
    let gate = Arc::new(Semaphore::new(0));
    let waiting = Arc::clone(&gate);
    let slow = service_fn(move |fails: bool| {
        let gate = Arc::clone(&waiting);
        async move {
            if fails {
                if let Ok(permit) = gate.acquire().await {
                    permit.forget();
                }
                return Err(Refused);
            }
            Ok(())
        }
    });
    let layer = strict();
    let mut service = layer.layer(slow);
    let mut late = JoinSet::new();
    for _ in 0..6 {
        late.spawn(service.ready().await.unwrap().call(true));
    }
    yield_now().await;
    // Two of them make it pause, two more end in the pause, the last two after it.
    for _ in 0..4 {
        gate.add_permits(1);
        late.join_next().await.unwrap().unwrap().unwrap_err();
    }
    assert_eq!(paused(*layer.watch().borrow()), Some(ms(100)));
    call(&mut service, false).await.unwrap();
    assert_eq!(*layer.watch().borrow(), IntensityState::Running);
    gate.close();
    late.join_all().await;
    assert_eq!(*layer.watch().borrow(), IntensityState::Running);
}

#[tokio::test(start_paused = true)]
async fn the_probe_is_not_cloned_and_comes_back_from_who_does_not_use_it() {
    let worker = Worker::new(Fate::Hang);
    let layer = strict();
    let mut service = layer.layer(worker.clone());
    let_it_pause(&mut service).await;
    sleep(ms(100)).await;

    let mut holder = service.clone();
    assert!(is_ready(&mut holder).await);
    assert!(is_ready(&mut holder).await, "it stays ready");
    assert!(!is_ready(&mut holder.clone()).await);
    let mut waiting = waits(service.clone());
    assert!(!waiting.is_finished_soon().await);

    // Dropped unused.
    drop(holder);
    let mut holder = waiting.finish().await;
    assert_eq!(*layer.watch().borrow(), IntensityState::Probing);

    // Dropped while its future is pending, for a reason that does not count.
    let mut waiting = waits(service.clone());
    assert!(!waiting.is_finished_soon().await);
    let mut response = holder.call(Unit::default());
    assert!(poll!(&mut response).is_pending());
    assert!(!is_ready(&mut holder).await, "it is used up");
    assert!(!waiting.is_finished_soon().await);
    drop(response);
    let mut holder = waiting.finish().await;

    // Dropped before its first poll.
    drop(holder.call(Unit::default()));
    assert!(is_ready(&mut service).await);
    assert_eq!(*layer.watch().borrow(), IntensityState::Probing);
    worker.set(Fate::Ok);
    service.call(Unit::default()).await.unwrap();
    assert_eq!(*layer.watch().borrow(), IntensityState::Running);
}

/// A task that waits until a service is ready.
struct Waiting<S>(JoinHandle<S>);

fn waits<S>(mut service: S) -> Waiting<S>
where
    S: Service<Unit, Error: fmt::Debug> + Send + 'static,
{
    Waiting(tokio::spawn(async move {
        service.ready().await.unwrap();
        service
    }))
}

impl<S> Waiting<S> {
    async fn is_finished_soon(&mut self) -> bool {
        // Far less than any pause, so that it is no timer that wakes it.
        sleep(ms(1)).await;
        self.0.is_finished()
    }

    async fn finish(self) -> S {
        timeout(ms(1), self.0).await.unwrap().unwrap()
    }
}

#[tokio::test(start_paused = true)]
async fn a_probe_that_is_cancelled_comes_back_and_one_that_is_stopped_by_its_limit_failed() {
    for (fate, limit, expected) in [
        (Fate::LosesItsLease, ms(1_000), IntensityState::Probing),
        (Fate::CancelsThenPanics, ms(1_000), IntensityState::Probing),
        (Fate::Ok, ms(1_000), IntensityState::Running),
    ] {
        let (state, _) = probe(fate, limit).await;
        assert_eq!(state, expected, "{fate:?}");
    }
    for fate in [
        Fate::Error,
        Fate::PanicInCall,
        Fate::PanicInFuture,
        Fate::Hang,
        Fate::HangWithBomb,
        Fate::CancelsInUnwinding,
    ] {
        let (state, _) = probe(fate, ms(1_000)).await;
        assert_eq!(paused(state), Some(ms(200)), "{fate:?}");
    }
}

/// Runs one probe in a sentinel, and returns the state afterwards.
async fn probe(fate: Fate, limit: Duration) -> (IntensityState, OutcomeKind) {
    let worker = Worker::new(Fate::Error);
    let layer = strict();
    let recorder = Recorder::default();
    let mut service = SentinelLayer::new(recorder.policy())
        .timeout(limit)
        .layer(layer.layer(worker.clone()));
    for _ in 0..2 {
        call(&mut service, Unit::default()).await.unwrap();
    }
    worker.set(fate);
    let report = call(&mut service, Unit::default()).await.unwrap();
    (*layer.watch().borrow(), report.outcome.kind())
}

#[test]
fn a_probe_that_blocks_its_thread_has_failed_when_its_limit_has_passed() {
    let jobs = Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let worker = Worker::new(Fate::Error);
    let thread = Arc::clone(&worker.thread);
    let layer = strict().pause(ms(10)..=ms(1_000));
    let recorder = Recorder::default();
    let mut service = SentinelLayer::new(recorder.policy())
        .timeout(ms(50))
        .stop_wait(ms(10))
        .runtime(jobs.handle().clone())
        .layer(layer.layer(worker.clone()));
    Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(async {
            // A busy machine may come to a job too late: then it never starts, and is no news.
            while paused(*layer.watch().borrow()).is_none() {
                call(&mut service, Unit::default()).await.unwrap();
            }
            worker.set(Fate::Blocks);
            while !thread.entered() {
                let report = call(&mut service, Unit::default()).await.unwrap();
                assert_eq!(report.outcome.is_stopped(), !thread.entered());
            }
            assert_eq!(paused(*layer.watch().borrow()), Some(ms(20)));
            // The next probe does not wait for its thread.
            worker.set(Fate::Ok);
            while *layer.watch().borrow() != IntensityState::Running {
                call(&mut service, Unit::default()).await.unwrap();
            }
            thread.release();
        });
    // What it says now is no news.
    drop(jobs);
    assert_eq!(*layer.watch().borrow(), IntensityState::Running);
}

// === who is woken ===

#[tokio::test(start_paused = true)]
async fn all_clones_that_wait_are_woken_when_it_resumes() {
    let worker = Worker::new(Fate::Error);
    let mut service = strict().layer(worker.clone());
    let_it_pause(&mut service).await;
    let mut waiting: Vec<_> = (0..100).map(|_| waits(service.clone())).collect();
    // The probe is one of them, whichever.
    sleep(ms(101)).await;
    let mut probes = Vec::new();
    for _ in 0..100 {
        let task = waiting.remove(0);
        match task.0.is_finished() {
            true => probes.push(task.finish().await),
            false => waiting.push(task),
        }
    }
    assert_eq!(probes.len(), 1);

    // It fails: all the others wait for the next pause, though their timers had fired.
    let _refused = probes[0].call(Unit::default()).await;
    probes.clear();
    sleep(ms(199)).await;
    assert!(waiting.iter().all(|task| !task.0.is_finished()));
    sleep(ms(2)).await;
    let next = waiting.iter().position(|task| task.0.is_finished());
    let mut probe = waiting.remove(next.unwrap()).finish().await;
    assert!(waiting.iter().all(|task| !task.0.is_finished()));

    worker.set(Fate::Ok);
    probe.call(Unit::default()).await.unwrap();
    for task in waiting {
        task.finish().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_service_that_moves_to_another_task_is_woken_there() {
    let worker = Worker::new(Fate::Ok);
    let mut service = strict().layer(worker);
    let_it_pause(&mut service).await;
    let mut moved = service.clone();
    assert!(!is_ready(&mut moved).await);
    let moved = tokio::spawn(async move {
        moved.ready().await.unwrap();
        moved
    });
    yield_now().await;
    sleep(ms(100)).await;
    drop(Waiting(moved).finish().await);
    // Whoever is no longer asked does not keep the others from the probe.
    assert!(is_ready(&mut service).await);
}

#[test]
fn a_pause_ends_though_the_runtime_ends_that_it_began_in() {
    let worker = Worker::new(Fate::Ok);
    let mut service = strict().layer(worker);
    paused_time().block_on(let_it_pause(&mut service));
    paused_time().block_on(async {
        service.ready().await.unwrap();
    });
}

#[test]
fn no_wake_up_is_lost_between_threads() {
    let runtime = Builder::new_multi_thread()
        .worker_threads(4)
        .enable_all()
        .build()
        .unwrap();
    let layer = IntensityLayer::new()
        .window(4)
        .minimum_sample(2)
        .pause(Duration::from_micros(1)..=ms(1));
    let done = Count::default();
    let fickle = service_fn(|job: u64| async move {
        yield_now().await;
        match job % 3 {
            0 => Ok(()),
            1 => Err(Refused),
            _ => raise("a bug"),
        }
    });
    let tasks: Vec<_> = (0..16)
        .map(|task| {
            let (mut service, done) = (layer.layer(fickle), done.clone());
            runtime.spawn(async move {
                for job in 0..100 {
                    let mut clone = service.clone();
                    clone.ready().await.unwrap();
                    // Some are ready and do nothing, some are called and dropped.
                    match (task + job) % 7 {
                        0 => drop(clone),
                        1 => drop(clone.call(job)),
                        _ => drop(tokio::spawn(clone.call(job)).await),
                    }
                    done.add();
                }
                service.ready().await.unwrap();
            })
        })
        .collect();
    runtime.block_on(async {
        for task in tasks {
            let limit = Duration::from_secs(60);
            timeout(limit, task).await.expect("a lost wake-up").unwrap();
        }
    });
    assert_eq!(done.get(), 1_600);
}

// === readiness of the inner service ===

#[tokio::test(start_paused = true)]
async fn readiness_errors_pass_through_in_a_pause_too() {
    let layer = strict();
    let (mut service, mut handle) = mock::spawn_layer::<Unit, (), _>(layer.clone());
    for _ in 0..2 {
        assert!(service.poll_ready().is_ready());
        let response = service.call(Unit::default());
        let (_, send) = handle.next_request().await.unwrap();
        send.send_error(Refused);
        response.await.unwrap_err();
    }
    assert!(paused(*layer.watch().borrow()).is_some());
    assert!(service.poll_ready().is_pending());
    for _ in 0..3 {
        handle.send_error("no connection");
        let Poll::Ready(Err(error)) = service.poll_ready() else {
            panic!("a readiness error is the caller's");
        };
        assert_eq!(error.to_string(), "no connection");
    }
    assert_eq!(paused(*layer.watch().borrow()), Some(ms(100)), "no result");
    // Nor does who is refused keep the probe.
    sleep(ms(100)).await;
    assert!(service.poll_ready().is_ready());
    handle.send_error("no connection");
    assert!(matches!(service.poll_ready(), Poll::Ready(Err(_))));
    let mut other = layer.layer(Worker::new(Fate::Ok));
    assert!(is_ready(&mut other).await);
}

#[tokio::test(start_paused = true)]
async fn a_service_that_is_not_ready_does_not_take_the_probe() {
    let layer = strict();
    let mut service = layer.layer(Worker::new(Fate::Error));
    let_it_pause(&mut service).await;
    sleep(ms(100)).await;
    let (mut never, mut handle) = mock::spawn_layer::<Unit, (), _>(layer.clone());
    handle.allow(0);
    assert!(never.poll_ready().is_pending());
    assert!(is_ready(&mut service).await);
}

// === what is seen ===

#[tokio::test(start_paused = true)]
async fn the_state_can_be_watched() {
    let layer = strict();
    let mut state = layer.watch();
    let worker = Worker::new(Fate::Error);
    let mut service = layer.layer(worker.clone());
    assert_eq!(*state.borrow_and_update(), IntensityState::Running);
    let_it_pause(&mut service).await;
    assert_eq!(paused(*state.borrow_and_update()), Some(ms(100)));
    service.ready().await.unwrap();
    assert_eq!(*state.borrow_and_update(), IntensityState::Probing);
    let _refused = service.call(Unit::default()).await;
    assert_eq!(paused(*state.borrow_and_update()), Some(ms(200)));
    service.ready().await.unwrap();
    state.mark_unchanged();
    worker.set(Fate::Ok);
    let response = service.call(Unit::default());
    assert!(!state.has_changed().unwrap());
    response.await.unwrap();
    assert_eq!(*state.borrow_and_update(), IntensityState::Running);
    call(&mut service, Unit::default()).await.unwrap();
    assert!(!state.has_changed().unwrap());
    // A layer with other settings is another one.
    drop((layer.window(3), service));
    assert!(state.changed().await.is_err());
}

/// Records events, with their fields.
#[derive(Clone, Default)]
struct Events(Arc<Mutex<Vec<String>>>);

impl Subscriber for Events {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("tower_sentinel")
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn event(&self, event: &Event<'_>) {
        struct Line(String);

        impl Visit for Line {
            fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
                self.0 += &match field.name() {
                    "message" => format!(" {value:?}"),
                    name => format!(" {name}={value:?}"),
                };
            }
        }
        let mut line = Line(event.metadata().level().to_string());
        event.record(&mut line);
        self.0.lock().unwrap().push(line.0);
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

#[tokio::test(start_paused = true)]
async fn each_change_of_state_is_one_event() {
    let events = Events::default();
    let _guard = tracing::subscriber::set_default(events.clone());
    let worker = Worker::new(Fate::Error);
    let mut service = strict().layer(worker.clone());
    let_it_pause(&mut service).await;
    service.ready().await.unwrap();
    let _refused = service.call(Unit::default()).await;
    // A probe that comes back is no change.
    for _ in 0..3 {
        let mut unused = service.clone();
        unused.ready().await.unwrap();
    }
    service.ready().await.unwrap();
    worker.set(Fate::Ok);
    service.call(Unit::default()).await.unwrap();
    call(&mut service, Unit::default()).await.unwrap();
    assert_eq!(
        *events.0.lock().unwrap(),
        [
            "WARN most jobs fail: pausing failures=2 jobs=2 failed_probes=0 pause=100ms",
            "INFO letting one job through",
            "WARN most jobs fail: pausing failures=2 jobs=2 failed_probes=1 pause=200ms",
            "INFO letting one job through",
            "INFO the job succeeded: resuming",
        ]
    );
}

// === the bound ===

/// A dependency that answers at once, and refuses while it is down.
#[derive(Clone, Debug, Default)]
struct Dependency {
    is_down: Arc<AtomicBool>,
    wasted: Count,
    served: Count,
}

/// What an outage came to.
#[derive(Debug)]
struct Outage {
    wasted: u64,
    /// From its end to the first job that succeeds.
    until_resumed: Duration,
    /// How many jobs succeed in the millisecond after that one.
    served: usize,
}

/// Feeds jobs without end through a gate, with an outage of 10 s from 1 s on.
async fn outage(layer: IntensityLayer, gate: usize, work: Duration) -> Outage {
    let dependency = Dependency::default();
    let Dependency {
        is_down,
        wasted,
        served,
    } = dependency.clone();
    let recorder = Recorder::default();
    let service = service_fn(move |_: Unit| {
        let Dependency {
            is_down,
            wasted,
            served,
        } = dependency.clone();
        async move {
            let fails_at_once = is_down.load(SeqCst);
            if !fails_at_once {
                sleep(work).await;
            }
            match is_down.load(SeqCst) {
                true => {
                    wasted.add();
                    Err(Refused)
                }
                false => {
                    served.add();
                    Ok(())
                }
            }
        }
    });
    let mut stack = ServiceBuilder::new()
        .concurrency_limit(gate)
        .layer(SentinelLayer::new(recorder.policy()))
        .layer(layer)
        .service(service);
    let consumer = tokio::spawn(async move {
        let mut responses = JoinSet::new();
        loop {
            let response = stack.ready().await.unwrap().call(Unit::default());
            responses.spawn(response);
            while responses.try_join_next().is_some() {}
        }
    });
    sleep(Duration::from_secs(1)).await;
    is_down.store(true, SeqCst);
    sleep(Duration::from_secs(10)).await;
    is_down.store(false, SeqCst);
    let (ended, before) = (Instant::now(), served.get());
    until(|| served.get() > before).await;
    let until_resumed = ended.elapsed();
    let before = served.get();
    sleep(work * 10).await;
    consumer.abort();
    Outage {
        wasted: wasted.get() as u64,
        until_resumed,
        served: served.get() - before,
    }
}

const OUTAGE: Duration = Duration::from_secs(10);

#[tokio::test(start_paused = true)]
async fn an_outage_wastes_no_more_than_the_bound() {
    let layer = IntensityLayer::new;
    for (layer, gate, bound, wasted) in [
        // 64 are in flight when it begins, and 10 of these are enough.
        (layer(), 64, 10 + 63 + 6, 64 + 6),
        // One at a time: the bound is reached.
        (layer(), 1, 10 + 6, 10 + 6),
        (layer().window(100).threshold(0.55), 1, 55 + 6, 55 + 6),
        (layer().window(100).minimum_sample(80), 1, 80 + 6, 50 + 6),
        (layer().window(100).threshold(0.55), 8, 55 + 7 + 6, 56 + 6),
        (
            layer().pause(ms(10)..=ms(250)),
            8,
            // 10, 20, … 160 ms, and 250 ms from then on.
            10 + 7 + 5 + (10_000 - 310) / 250,
            16 + 5 + (10_000 - 310) / 250,
        ),
    ] {
        let case = format!("{layer:?} behind {gate}");
        assert_eq!(layer.most_wasted(gate, OUTAGE), bound, "{case}");
        let outage = outage(layer, gate, ms(1)).await;
        assert_eq!(outage.wasted, wasted, "{case}");
        assert!(outage.wasted <= bound, "{case}");
    }
}

#[tokio::test(start_paused = true)]
async fn full_throughput_is_back_after_one_probe() {
    let outage = outage(IntensityLayer::new(), 64, ms(1)).await;
    // The seventh pause, of 6.4 s, began 6.3 s after the outage did, and its probe is the first to
    // succeed. `until` looks in steps that grow, up to 75 ms here.
    let expected = ms(100 + 200 + 400 + 800 + 1_600 + 3_200 + 6_400) - OUTAGE;
    assert!(
        (expected..expected + ms(100)).contains(&outage.until_resumed),
        "{outage:?}"
    );
    // 64 in each millisecond.
    assert_eq!(outage.served, 640);
}

/// Jobs of 64 ms, of which one ends in each millisecond, so that each that fails is replaced
/// before the next one does.
#[tokio::test(start_paused = true)]
async fn what_was_let_through_before_a_pause_is_wasted_too() {
    let (failures, recorder) = (Count::default(), Recorder::default());
    let layer = IntensityLayer::new().pause(OUTAGE..=OUTAGE);
    let bound = layer.most_wasted(64, Duration::ZERO);
    let failing = {
        let failures = failures.clone();
        service_fn(move |_: Unit| {
            let failures = failures.clone();
            async move {
                sleep(ms(64)).await;
                failures.add();
                Err::<(), _>(Refused)
            }
        })
    };
    let mut stack = ServiceBuilder::new()
        .concurrency_limit(64)
        .layer(SentinelLayer::new(recorder.policy()))
        .layer(layer)
        .service(failing);
    let consumer = tokio::spawn(async move {
        loop {
            tokio::spawn(stack.ready().await.unwrap().call(Unit::default()));
            sleep(ms(1)).await;
        }
    });
    sleep(OUTAGE / 2).await;
    consumer.abort();
    assert_eq!(failures.get() as u64, bound);
    assert_eq!(bound, 10 + 63);
}

#[test]
fn pauses_below_a_millisecond_grow_in_the_bound_as_they_do() {
    // In whole milliseconds, 0.3 ms doubled is 1, 1, 2, 5, 10, ... and no two alike end the growth.
    let short = IntensityLayer::new().pause(Duration::from_micros(300)..=Duration::from_secs(30));
    let probes = |outage| short.most_wasted(1, outage) - 10;
    assert_eq!(probes(Duration::from_micros(2_300)), 3);
    assert!(
        probes(Duration::from_secs(10)) < 17,
        "{}",
        probes(Duration::from_secs(10))
    );
    let tiny = IntensityLayer::new().pause(Duration::from_nanos(1)..=Duration::from_secs(30));
    let most = tiny.most_wasted(1, Duration::from_secs(10)) - 10;
    assert!(most < 40, "{most}");
}

#[tokio::test(start_paused = true)]
async fn a_bound_is_found_at_once_for_any_setting() {
    let tiny = IntensityLayer::new().pause(Duration::from_nanos(1)..=Duration::from_nanos(1));
    assert_eq!(tiny.most_wasted(1, ms(1)), 10 + 1_000_000);
    assert_eq!(tiny.most_wasted(1, Duration::MAX), u64::MAX);
    let endless = IntensityLayer::new().pause(Duration::MAX..=Duration::MAX);
    assert_eq!(endless.most_wasted(0, OUTAGE), 10);
    assert_eq!(endless.most_wasted(usize::MAX, OUTAGE), u64::MAX);
    // Half of them, and it is found though they can't be tried one by one.
    let huge = IntensityLayer::new().window(usize::MAX);
    let half = huge.most_wasted(1, Duration::ZERO);
    assert!((1 << 62..=1 << 63).contains(&half), "{half}");
    for window in 1..200 {
        for threshold in [0.01, 0.3, 0.5, 0.55, 0.999, 1.0] {
            let layer = IntensityLayer::new().window(window).minimum_sample(1);
            let layer = layer.threshold(threshold);
            let run = (1..=window).find(|it| *it as f64 / window as f64 >= threshold);
            let found = layer.most_wasted(1, Duration::ZERO);
            assert_eq!(found, run.unwrap() as u64, "{threshold} of {window}");
        }
    }

    // A pause that no timer reaches has no end.
    let mut service = endless.layer(Worker::new(Fate::Ok));
    let_it_pause(&mut service).await;
    let patience = Duration::from_secs(60 * 60);
    assert!(timeout(patience, service.ready()).await.is_err());
}
