//! Runtimes on which a sentinel works, and calls without one.

use std::{
    cell::RefCell,
    future::{Future, pending, ready},
    panic::{self, AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    task::Context,
    thread,
    time::Duration,
};

use futures_util::{
    future::{Either, select},
    poll,
    task::noop_waker,
};
use tokio::{
    runtime::{Builder, Handle, Runtime},
    sync::oneshot,
    task::{JoinSet, yield_now},
    time::sleep,
};
use tower::{Layer, Service, ServiceBuilder, service_fn};
use tower_sentinel::{
    Consumer, Job, Outcome, Report, SentinelError, SentinelLayer, SettlePolicy, TimeLimit,
    ack_on_success,
    broker::memory::{Broker, Delivery},
    cancel::Cancellation,
    consumer::EndCause,
    outcome::{CancelReason, OutcomeKind},
};

use crate::support::{
    Fate, Plan, Recorder, Refused, Seen, Unit, Work, Worker, block_on, call, current_thread, idle,
    log::Log, raise, turn,
};

const SHORT: Duration = Duration::from_millis(20);

fn multi_thread() -> Runtime {
    Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
}

// === both flavours ===

/// A job that ends as its number says.
struct Numbered(usize);

impl Job for Numbered {
    type Tag = usize;

    fn tag(&self) -> usize {
        self.0
    }

    fn time_limit(&self) -> TimeLimit {
        match self.0 % 4 {
            // It hangs. No other job can run into a limit, however busy the machine is.
            3 => TimeLimit::After(SHORT),
            _ => TimeLimit::Never,
        }
    }
}

async fn jobs_of_all_fates_settle_once() {
    const JOBS: usize = 1_000;
    let calls: Arc<Vec<AtomicUsize>> = Arc::new((0..JOBS).map(|_| AtomicUsize::new(0)).collect());
    let counted = Arc::clone(&calls);
    let policy = service_fn(move |report: Report<usize, (), Refused>| {
        counted[report.tag].fetch_add(1, Ordering::Relaxed);
        async move { Ok::<_, Refused>(report) }
    });
    let service = service_fn(|Numbered(n)| async move {
        sleep(Duration::from_millis(n as u64 % 7)).await;
        match n % 4 {
            0 => Ok(()),
            1 => Err(Refused),
            2 => raise("told to"),
            _ => pending().await,
        }
    });
    let sentinel = SentinelLayer::new(policy).layer(service);
    let mut callers = JoinSet::new();
    for n in 0..JOBS {
        let mut sentinel = sentinel.clone();
        callers.spawn(async move { call(&mut sentinel, Numbered(n)).await.unwrap() });
    }
    for report in callers.join_all().await {
        let kind = match report.tag % 4 {
            0 => OutcomeKind::Completed,
            1 => OutcomeKind::Failed,
            2 => OutcomeKind::Panicked,
            _ => OutcomeKind::TimedOut,
        };
        assert_eq!(report.outcome.kind(), kind, "job {}", report.tag);
    }
    for (n, calls) in calls.iter().enumerate() {
        assert_eq!(calls.load(Ordering::Relaxed), 1, "job {n}");
    }
}

#[test]
fn g1_jobs_of_all_fates_settle_once_on_a_runtime_of_one_thread() {
    current_thread().block_on(jobs_of_all_fates_settle_once());
}

#[test]
fn g1_jobs_of_all_fates_settle_once_on_a_runtime_of_threads() {
    multi_thread().block_on(jobs_of_all_fates_settle_once());
}

// === no runtime at all ===

thread_local! {
    static PANICKED_IN: RefCell<Option<String>> = const { RefCell::new(None) };
}

#[test]
fn a_call_outside_of_a_runtime_panics_where_it_is_made_and_says_why() {
    let recorder = Recorder::default();
    let service = service_fn(|_: Unit| ready(Ok::<_, Refused>(())));
    let mut sentinel = SentinelLayer::new(recorder.policy()).layer(service);

    // Beside the hook of the other tests, which may panic on their threads meanwhile.
    let others = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        let file = info.location().map(|location| location.file().to_owned());
        PANICKED_IN.set(file);
        others(info);
    }));
    let called = catch_unwind(AssertUnwindSafe(|| drop(sentinel.call(Unit::default()))));
    let payload = called.unwrap_err();

    let message = payload.downcast_ref::<&str>().unwrap();
    assert!(message.contains("outside of a tokio runtime"), "{message}");
    assert!(message.contains("runtime(handle)"), "{message}");
    let file = PANICKED_IN.take().unwrap();
    assert!(file.ends_with("runtimes.rs"), "{file}");
    assert_eq!(recorder.asked(), 0);
}

#[test]
fn a_call_outside_of_a_runtime_works_with_a_handle() {
    let recorder = Recorder::default();
    let jobs = multi_thread();
    for (fate, seen) in [
        (Fate::PanicInCall, Seen::panicked()),
        // The limit needs a timer, of which there is none here.
        (Fate::Hang, Seen::timed_out(true)),
        (Fate::PanicInDrop, Seen::timed_out(true).with_panic(true)),
    ] {
        let mut sentinel = SentinelLayer::new(recorder.policy())
            .timeout(SHORT)
            .runtime(jobs.handle().clone())
            .layer(Worker::default());
        // A busy machine may come to a job too late.
        let report = loop {
            let report = block_on(call(&mut sentinel, Work::new(fate))).unwrap();
            match &report.outcome {
                Outcome::TimedOut(timed_out) if !timed_out.started() => {}
                _ => break report,
            }
        };
        assert_eq!(Seen::from(&report.outcome), seen, "{fate:?}");
    }
}

#[test]
fn each_timer_works_outside_of_a_runtime() {
    let recorder = Recorder::default();
    let jobs = multi_thread();
    // Without a limit the first timer is that of the grace, then of the stop, then of the policy.
    let service = service_fn(|_: Unit| async {
        Cancellation::current().cancel(CancelReason::Requested);
        pending::<Result<(), Refused>>().await
    });
    let mut sentinel = SentinelLayer::new(recorder.scripted(Plan::Hang, Duration::ZERO))
        .no_timeout()
        .grace(SHORT)
        .settle_timeout(SHORT)
        .runtime(jobs.handle().clone())
        .layer(service);
    let error = block_on(call(&mut sentinel, Unit::default())).unwrap_err();
    assert!(matches!(error, SentinelError::PolicyTimedOut(SHORT)));
    assert_eq!(recorder.reports()[0].kind, OutcomeKind::Cancelled);
}

#[test]
fn a_response_may_be_polled_outside_of_the_runtime_that_it_was_made_in() {
    for (limit, grace) in [(true, Duration::ZERO), (true, SHORT), (false, SHORT)] {
        let recorder = Recorder::default();
        let runtime = multi_thread();
        let layer = SentinelLayer::new(recorder.policy()).grace(grace);
        let layer = match limit {
            true => layer.timeout(SHORT),
            false => layer.no_timeout(),
        };
        let mut sentinel = layer.layer(service_fn(|_: Unit| async {
            sleep(2 * SHORT).await;
            Cancellation::current().cancel(CancelReason::LeaseLost);
            pending::<Result<(), Refused>>().await
        }));
        let response = {
            let _context = runtime.enter();
            sentinel.call(Unit::default())
        };
        let report = block_on(response).unwrap();
        let kind = match limit {
            true => OutcomeKind::TimedOut,
            false => OutcomeKind::Cancelled,
        };
        assert_eq!(report.outcome.kind(), kind, "{limit} {grace:?}");
    }
}

#[test]
fn a_drop_outside_of_any_runtime_is_told_where_the_first_runtime_has_ended() {
    let recorder = Recorder::default();
    let mut sentinel = SentinelLayer::new(recorder.policy()).layer(Worker::default());
    let first = current_thread();
    first
        .block_on(call(&mut sentinel, Work::new(Fate::PanicInCall)))
        .unwrap();
    drop(first);
    let second = current_thread();
    let response = {
        let _context = second.enter();
        Box::pin(sentinel.call(Work::new(Fate::Hang)))
    };
    turn(&second);
    assert_eq!(second.metrics().num_alive_tasks(), 1);
    let (log, guard) = Log::start();
    drop(response);
    drop(guard);
    // It can't be settled: the runtime of the drop is not known. The broker delivers it again, and it
    // is not to run beside that.
    let told = "ERROR job not settled: its runtimes have ended";
    assert_eq!(log.lines(), [told]);
    second.block_on(idle(second.handle()));
    assert_eq!(recorder.reports(), [Seen::panicked()]);
}

#[test]
fn a_caller_without_a_runtime_may_drop() {
    let recorder = Recorder::default();
    let jobs = multi_thread();
    let mut sentinel = SentinelLayer::new(recorder.policy())
        .runtime(jobs.handle().clone())
        .layer(Worker::default());
    let mut response = Box::pin(sentinel.call(Work::new(Fate::Hang)));
    let waker = noop_waker();
    let polled = response.as_mut().poll(&mut Context::from_waker(&waker));
    assert!(polled.is_pending());
    drop(response);
    // It settles on the runtime of the jobs, the only one there is.
    jobs.block_on(idle(jobs.handle()));
    assert_eq!(recorder.reports().len(), 1);
    assert_eq!(recorder.reports()[0].kind, OutcomeKind::Cancelled);
}

#[test]
fn a_job_of_another_runtime_can_be_selected_against_on_this_one() {
    let recorder = Recorder::default();
    let jobs = multi_thread();
    current_thread().block_on(async {
        let mut sentinel = SentinelLayer::new(recorder.policy())
            .runtime(jobs.handle().clone())
            .layer(service_fn(|_: Unit| async {
                Ok::<_, Refused>(Handle::current().id())
            }));
        let response = Box::pin(call(&mut sentinel, Unit::default()));
        let late = Box::pin(sleep(Duration::from_secs(10)));
        let Either::Left((report, _)) = select(response, late).await else {
            panic!("no answer");
        };
        // The job ran there, though its caller is here.
        let Outcome::Completed(id) = report.unwrap().outcome else {
            panic!("not completed");
        };
        assert_eq!(id, jobs.handle().id());
        assert_ne!(id, Handle::current().id());
    });
}

// === a runtime without timers ===

// With no limit too: to stop a job and to give up on a policy takes a timer.
#[test]
fn a_call_in_a_runtime_without_timers_panics_before_anything_is_spawned() {
    let recorder = Recorder::default();
    let runtime = Builder::new_current_thread().build().unwrap();
    let service = service_fn(|_: Unit| ready(Ok::<_, Refused>(())));
    let layer = SentinelLayer::new(recorder.policy());
    let _context = runtime.enter();
    for layer in [layer.clone(), layer.no_timeout()] {
        let mut sentinel = layer.layer(service);
        for _ in 0..2 {
            let called = catch_unwind(AssertUnwindSafe(|| drop(sentinel.call(Unit::default()))));
            assert!(called.is_err());
            assert_eq!(runtime.metrics().num_alive_tasks(), 0);
        }
    }
    assert_eq!(recorder.reports(), []);
}

// === runtimes that come and go under a job ===

fn without_timers() -> Runtime {
    Builder::new_current_thread().build().unwrap()
}

#[test]
fn a_later_call_outside_of_a_runtime_says_why_as_the_first_does() {
    let layer = SentinelLayer::new(Recorder::default().policy());
    for layer in [layer.clone(), layer.no_timeout()] {
        let service = service_fn(|_: Unit| ready(Ok::<_, Refused>(())));
        let mut sentinel = layer.layer(service);
        current_thread()
            .block_on(call(&mut sentinel, Unit::default()))
            .unwrap();
        let called = catch_unwind(AssertUnwindSafe(|| drop(sentinel.call(Unit::default()))));
        let payload = called.unwrap_err();
        let message = payload.downcast_ref::<&str>();
        assert!(message.is_some_and(|it| it.contains("`Sentinel::call` outside")));
    }
}

#[test]
fn a_later_call_in_a_runtime_without_timers_panics_at_once_or_settles() {
    let recorder = Recorder::default();
    let service = service_fn(|_: Unit| async {
        Cancellation::current().cancel(CancelReason::Requested);
        pending::<Result<(), Refused>>().await
    });
    let mut sentinel = SentinelLayer::new(recorder.policy())
        .no_timeout()
        .layer(service);
    let first = multi_thread();
    first
        .block_on(call(&mut sentinel, Unit::default()))
        .unwrap();
    without_timers().block_on(async {
        if let Ok(response) = catch_unwind(AssertUnwindSafe(|| sentinel.call(Unit::default()))) {
            response.await.unwrap();
            assert_eq!(recorder.reports().len(), 2);
        }
    });
}

#[test]
fn g1_a_response_that_is_polled_in_a_runtime_without_timers_settles() {
    let recorder = Recorder::default();
    let runtime = multi_thread();
    let mut sentinel = SentinelLayer::new(recorder.policy())
        .no_timeout()
        .layer(service_fn(|_: Unit| async {
            Cancellation::current().cancel(CancelReason::Requested);
            pending::<Result<(), Refused>>().await
        }));
    let response = {
        let _context = runtime.enter();
        sentinel.call(Unit::default())
    };
    without_timers().block_on(response).unwrap();
    assert_eq!(recorder.reports().len(), 1);
}

#[test]
fn g1_a_response_that_is_dropped_in_a_runtime_without_timers_settles() {
    let recorder = Recorder::default();
    let runtime = multi_thread();
    let mut sentinel = SentinelLayer::new(recorder.policy())
        .grace(SHORT)
        .layer(Worker::default());
    let response = {
        let _context = runtime.enter();
        sentinel.call(Work::new(Fate::Hang))
    };
    without_timers().block_on(async {
        drop(response);
        for _ in 0..1_000 {
            thread::sleep(Duration::from_millis(1));
            yield_now().await;
            if !recorder.reports().is_empty() {
                break;
            }
        }
    });
    let seen = Seen::cancelled(CancelReason::CallerDropped, true);
    assert_eq!(recorder.reports(), [seen]);
}

#[test]
fn a_limit_does_not_pass_because_the_runtime_of_its_timer_ends() {
    let recorder = Recorder::default();
    let jobs = multi_thread();
    let mut sentinel = SentinelLayer::new(recorder.policy())
        .runtime(jobs.handle().clone())
        .layer(service_fn(|_: Unit| async {
            sleep(50 * SHORT).await;
            Ok::<_, Refused>(())
        }));
    let first = current_thread();
    let mut response = {
        let _context = first.enter();
        Box::pin(sentinel.call(Unit::default()))
    };
    first.block_on(async { assert!(poll!(&mut response).is_pending()) });
    drop(first);
    let report = current_thread().block_on(response).unwrap();
    assert_eq!(report.outcome.kind(), OutcomeKind::Completed);
}

#[test]
fn a_settle_timeout_does_not_pass_because_the_runtime_of_its_timer_ends() {
    let (answer, answered) = oneshot::channel();
    let answered = Arc::new(Mutex::new(Some(answered)));
    let policy = service_fn(move |_: Report<Unit, (), Refused>| {
        let answered = answered.lock().unwrap().take().unwrap();
        async { answered.await.map_err(|_| Refused) }
    });
    let mut sentinel =
        SentinelLayer::new(policy).layer(service_fn(|_: Unit| ready(Ok::<_, Refused>(()))));
    let first = current_thread();
    let mut response = {
        let _context = first.enter();
        Box::pin(sentinel.call(Unit::default()))
    };
    first.block_on(async {
        yield_now().await;
        assert!(poll!(&mut response).is_pending());
    });
    drop(first);
    let settled = current_thread().block_on(async {
        let response = tokio::spawn(response);
        yield_now().await;
        answer.send("acked").ok();
        response.await.unwrap()
    });
    assert_eq!(settled.unwrap(), "acked");
}

#[test]
fn a_policy_has_its_time_though_no_runtime_is_left_to_measure_it() {
    let gone = multi_thread();
    let policy = service_fn(|report: Report<Unit, (), Refused>| async move {
        yield_now().await;
        Ok::<_, Refused>(report.outcome.kind())
    });
    let mut sentinel = SentinelLayer::new(policy)
        .runtime(gone.handle().clone())
        .layer(service_fn(|_: Unit| ready(Ok::<_, Refused>(()))));
    drop(gone);
    let settled = block_on(call(&mut sentinel, Unit::default()));
    assert_eq!(settled.unwrap(), OutcomeKind::Cancelled);
}

#[test]
fn a_policy_has_timers_though_its_caller_has_no_runtime() {
    let jobs = multi_thread();
    let policy = service_fn(|report: Report<Unit, (), Refused>| async move {
        sleep(SHORT).await;
        Ok::<_, Refused>(report.outcome.kind())
    });
    let mut sentinel = SentinelLayer::new(policy)
        .runtime(jobs.handle().clone())
        .layer(service_fn(|_: Unit| ready(Ok::<_, Refused>(()))));
    let settled = block_on(call(&mut sentinel, Unit::default()));
    assert_eq!(settled.unwrap(), OutcomeKind::Completed);
}

#[tokio::test(start_paused = true)]
async fn g3_a_service_whose_jobs_have_no_runtime_any_more_is_not_ready() {
    let queue = Broker::new().queue("jobs").declare();
    (0..100).for_each(|job: u32| queue.publish(job));
    let jobs = current_thread();
    let policy = SettlePolicy::new(ack_on_success());
    let service = ServiceBuilder::new()
        .concurrency_limit(4)
        .layer(SentinelLayer::new(policy).runtime(jobs.handle().clone()))
        .service_fn(async |_: Delivery<u32>| Ok::<_, Refused>(()));
    jobs.shutdown_background();
    let ended = Consumer::new(queue.subscribe(4).unwrap(), service).run();
    let error = ended.await.unwrap_err();
    let EndCause::Unready(SentinelError::RuntimeGone) = error.cause() else {
        panic!("{error:?}");
    };
    assert!(error.summary().called <= 4, "{error:?}");
    assert_eq!(queue.counts().ready, 100);
}

#[tokio::test(start_paused = true)]
async fn a_job_that_gives_the_end_of_a_runtime_for_its_reason_ends_no_service() {
    let jobs = multi_thread();
    let mut sentinel = SentinelLayer::new(Recorder::default().policy())
        .runtime(jobs.handle().clone())
        .layer(service_fn(async |_: Unit| {
            Cancellation::current().cancel(CancelReason::RuntimeGone);
            pending::<Result<(), Refused>>().await
        }));
    for _ in 0..2 {
        call(&mut sentinel, Unit::default()).await.unwrap();
    }
    jobs.shutdown_background();
}
