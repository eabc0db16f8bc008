//! Behaviour of a job × of its policy × of its caller: one outcome in every cell (G1).
//!
//! [`expected`] returns the required result of each cell, from the documented rules alone.

use std::{
    fmt,
    future::{Future, poll_fn},
    sync::Arc,
    task::Poll,
    thread,
    time::Duration,
};

use tokio::{
    runtime::{Handle, Runtime},
    task::{spawn_blocking, yield_now},
    time::sleep,
};
use tokio_util::sync::CancellationToken;
use tower::{Layer, Service, ServiceExt};
use tower_sentinel::{SentinelLayer, TimeLimit, outcome::CancelReason, sentinel::OnDrop};

use crate::support::{
    Answer, BLOCK, Blocked, Fate, Plan, Recorder, Seen, WORK, Work, Worker, current_thread, idle,
    paused_time, turn, until, wait_until,
};

/// Behaviour of a job's caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Caller {
    Waits,
    DropsUnpolled,
    DropsRunning,
    DropsSettling,
    /// Drops before the first poll, under [`OnDrop::Detach`].
    DetachesUnpolled,
    /// Drops while the job runs, under [`OnDrop::Detach`].
    DetachesRunning,
}

impl Caller {
    const ALL: [Caller; 6] = [
        Caller::Waits,
        Caller::DropsUnpolled,
        Caller::DropsRunning,
        Caller::DropsSettling,
        Caller::DetachesUnpolled,
        Caller::DetachesRunning,
    ];

    fn on_drop(self) -> OnDrop {
        match self {
            Caller::DetachesUnpolled | Caller::DetachesRunning => OnDrop::Detach,
            _ => OnDrop::Abort,
        }
    }
}

/// Place where a job runs, and its clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rig {
    /// One thread and virtual time, for all that does not block.
    Paused,
    /// One thread, for the job and for its supervision.
    SharedThread,
    /// A thread for the jobs (`.runtime(handle)`) and one for the supervision.
    OwnThread,
}

#[derive(Clone, Copy)]
struct Cell {
    rig: Rig,
    fate: Fate,
    plan: Plan,
    caller: Caller,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            rig,
            fate,
            plan,
            caller,
        } = self;
        write!(
            f,
            "[job {fate:?} × policy {plan:?} × caller {caller:?} on {rig:?}]"
        )
    }
}

/// Result of a cell.
#[derive(Debug, PartialEq, Eq)]
struct Observed {
    /// Report of each call of the policy.
    reports: Vec<Seen>,
    /// Response to a caller that waits.
    answer: Option<Answer>,
    /// Errors that `on_unsettled` gets.
    unsettled: Vec<Answer>,
}

// === the oracle ===

fn expected(cell: Cell) -> Observed {
    // The documented exception to "exactly once": a policy that cannot become ready.
    let reports = match cell.plan {
        Plan::PanicInReadiness | Plan::ReadinessError | Plan::NeverReady => Vec::new(),
        _ => vec![expected_outcome(cell)],
    };
    let answer = match cell.plan {
        Plan::Ok | Plan::SlowReadiness => Answer::Ok,
        Plan::Error | Plan::ReadinessError => Answer::Policy,
        Plan::PanicInReadiness | Plan::PanicInCall | Plan::PanicInFuture => Answer::PolicyPanicked,
        // The settle timeout covers readiness and call alike.
        Plan::NeverReady | Plan::Hang => Answer::PolicyTimedOut,
    };
    match (cell.caller, answer) {
        // Somebody waits for the error, so nobody else gets it.
        (Caller::Waits, _) => Observed {
            reports,
            answer: Some(answer),
            unsettled: Vec::new(),
        },
        (_, Answer::Ok) => Observed {
            reports,
            answer: None,
            unsettled: Vec::new(),
        },
        (_, _) => Observed {
            reports,
            answer: None,
            unsettled: vec![answer],
        },
    }
}

fn expected_outcome(cell: Cell) -> Seen {
    let dropped = |stopped| Seen::cancelled(CancelReason::CallerDropped, stopped);
    match cell.caller {
        // While it settles, the outcome is known already: a drop cannot change it.
        Caller::Waits | Caller::DropsSettling => undisturbed(cell),
        // A detached job goes on as if nothing had happened.
        Caller::DetachesUnpolled | Caller::DetachesRunning => undisturbed(cell),
        // In each rig the job has had no chance to run: it is aborted before it panics, blocks
        // or makes the guard that would panic, and whoever cancels it comes second.
        Caller::DropsUnpolled => dropped(true),
        Caller::DropsRunning => match (cell.fate, cell.rig) {
            // These have panicked by the time of the drop, though nobody has polled: a job that was over was
            // not stopped.
            (Fate::PanicInCall | Fate::PanicFirst, _) => Seen::panicked(),
            // The thread is back by the time that its caller can drop. The limit has passed
            // meanwhile, so it came first …
            (Fate::BlockFirst, Rig::SharedThread) => Seen::timed_out(true),
            // … but a job that returned has completed.
            (Fate::BlockLater, Rig::SharedThread) => Seen::completed(),
            // An abort acts at an await only.
            (Fate::BlockFirst | Fate::BlockLater, _) => dropped(false),
            // Attached, and still a cancellation.
            (Fate::PanicInDrop, _) => dropped(true).with_panic(true),
            _ => dropped(true),
        },
    }
}

/// Returns the result of a job whose caller lets it run.
fn undisturbed(cell: Cell) -> Seen {
    let cancelled = |reason| Seen::cancelled(reason, true);
    match (cell.fate, cell.rig) {
        (Fate::Value, _) => Seen::completed(),
        (Fate::Error, _) => Seen::failed(),
        (Fate::PanicInCall | Fate::PanicFirst | Fate::PanicLater, _) => Seen::panicked(),
        // Attached, and still a time-out.
        (Fate::PanicInDrop, _) => Seen::timed_out(true).with_panic(true),
        (Fate::Hang, _) => Seen::timed_out(true),
        // The limit is seen when the thread comes back: stopped at its next await …
        (Fate::BlockFirst, Rig::SharedThread) => Seen::timed_out(true),
        // … or not at all, if it returned: it must not run twice.
        (Fate::BlockLater, Rig::SharedThread) => Seen::completed(),
        // The limit is punctual, and the thread is still blocked.
        (Fate::BlockFirst | Fate::BlockLater, _) => Seen::timed_out(false),
        (Fate::CancelsItself, _) => cancelled(CancelReason::Requested),
        (Fate::Shutdown, _) => cancelled(CancelReason::Shutdown),
        (Fate::RuntimeEnds, _) => cancelled(CancelReason::RuntimeGone),
    }
}

// === the cells ===

/// Runs a cell in the current runtime, which has nothing else to do.
async fn observe(cell: Cell) -> Observed {
    let recorder = Recorder::default();
    let thread = match cell.rig {
        Rig::OwnThread => Blocked::until_released(),
        Rig::Paused | Rig::SharedThread => Arc::default(),
    };
    let worker = Worker {
        thread: Arc::clone(&thread),
    };
    let shutdown = CancellationToken::new();
    let blocked_when_stopped = blocks_beside_virtual_time(cell);
    if blocked_when_stopped {
        // Holds the time until the job has begun.
        let thread = Arc::clone(&thread);
        spawn_blocking(move || while !wait_until(|| thread.entered()) {});
    }
    let mut layer = SentinelLayer::new(recorder.scripted(cell.plan, Duration::from_millis(10)))
        .timeout(match cell.rig {
            Rig::Paused => Duration::from_secs(10),
            // A job must have begun by then, with the threads of all cells beside it.
            Rig::SharedThread => BLOCK / 2,
            Rig::OwnThread => Duration::from_millis(50),
        })
        // Long wherever the job does stop, so that a busy machine does not show.
        .stop_wait(match blocked_when_stopped {
            true => Duration::from_millis(50),
            false => Duration::from_secs(10),
        })
        .settle_timeout(Duration::from_secs(1))
        .on_drop(cell.caller.on_drop())
        .shutdown(shutdown.clone())
        .on_unsettled(recorder.unsettled());
    // It is only run when the caller has had its chance to drop.
    let jobs = match (cell.rig, cell.fate) {
        (Rig::OwnThread, _) | (_, Fate::RuntimeEnds) => Some(current_thread()),
        _ => None,
    };
    if let Some(jobs) = &jobs {
        layer = layer.runtime(jobs.handle().clone());
    }
    let mut sentinel = layer.layer(worker);
    let work = Work {
        fate: cell.fate,
        limit: match (cell.rig, cell.caller) {
            // Here the drop comes first with any scheduling.
            (Rig::SharedThread | Rig::OwnThread, Caller::DropsUnpolled)
            | (Rig::OwnThread, Caller::DropsRunning) => TimeLimit::Never,
            _ => TimeLimit::Inherit,
        },
    };

    let mut response = Box::pin(sentinel.ready().await.unwrap().call(work));
    let mut answer = None;
    match cell.caller {
        Caller::Waits => {
            let world = World::start(cell, jobs, shutdown);
            answer = Some(match response.await {
                Ok(_) => Answer::Ok,
                Err(error) => Answer::from(&error),
            });
            world.end(&recorder, &thread).await;
        }
        Caller::DropsUnpolled | Caller::DetachesUnpolled => {
            drop(response);
            let world = World::start(cell, jobs, shutdown);
            world.end(&recorder, &thread).await;
        }
        Caller::DropsRunning | Caller::DetachesRunning => {
            let world = World::start(cell, jobs, shutdown);
            assert!(futures_util::poll!(&mut response).is_pending());
            match cell.rig {
                Rig::Paused => sleep(WORK / 2).await,
                Rig::SharedThread => {
                    while !thread.entered() {
                        yield_now().await;
                    }
                }
                Rig::OwnThread => until(|| thread.entered()).await,
            }
            drop(response);
            world.end(&recorder, &thread).await;
        }
        Caller::DropsSettling => {
            let world = World::start(cell, jobs, shutdown);
            let settled = poll_fn(|cx| match response.as_mut().poll(cx) {
                Poll::Ready(_) => Poll::Ready(true),
                Poll::Pending if recorder.asked() > 0 => Poll::Ready(false),
                Poll::Pending => Poll::Pending,
            });
            assert!(!settled.await, "{cell} never let its caller drop");
            drop(response);
            world.end(&recorder, &thread).await;
        }
    }
    Observed {
        reports: recorder.reports(),
        answer,
        unsettled: recorder.unsettled_errors(),
    }
}

/// State around a job.
struct World(Option<thread::JoinHandle<()>>);

impl World {
    fn start(cell: Cell, jobs: Option<Runtime>, shutdown: CancellationToken) -> Self {
        match (cell.fate, jobs) {
            (Fate::Shutdown, _) => {
                tokio::spawn(async move {
                    sleep(WORK).await;
                    shutdown.cancel();
                });
            }
            (Fate::RuntimeEnds, Some(jobs)) => {
                tokio::spawn(async move {
                    turn(&jobs);
                    sleep(WORK).await;
                    jobs.shutdown_background();
                });
            }
            (_, Some(jobs)) => {
                return Self(Some(thread::spawn(move || {
                    jobs.block_on(idle(jobs.handle()));
                })));
            }
            (_, None) => {}
        }
        Self(None)
    }

    /// Waits until all is over and nobody is left who could call the policy again.
    async fn end(self, recorder: &Recorder, thread: &Blocked) {
        // The outcome is known then, so whoever blocks may go on.
        until(|| recorder.asked() > 0).await;
        thread.release();
        idle(&Handle::current()).await;
        if let Some(thread) = self.0 {
            thread.join().unwrap();
        }
    }
}

fn assert_cells(observed: impl IntoIterator<Item = (Cell, Observed)>) {
    let mut wrong = Vec::new();
    for (cell, observed) in observed {
        let expected = expected(cell);
        if observed != expected {
            wrong.push(format!(
                "{cell}\n  expected {expected:?}\n  observed {observed:?}"
            ));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

// === without a blocked thread: virtual time ===

const UNBLOCKED: [Fate; 10] = [
    Fate::Value,
    Fate::Error,
    Fate::PanicInCall,
    Fate::PanicFirst,
    Fate::PanicLater,
    Fate::PanicInDrop,
    Fate::Hang,
    Fate::CancelsItself,
    Fate::Shutdown,
    Fate::RuntimeEnds,
];

async fn every_cell_of(caller: Caller) {
    let mut observed = Vec::new();
    for fate in UNBLOCKED {
        for plan in Plan::ALL {
            let rig = Rig::Paused;
            let cell = Cell {
                rig,
                fate,
                plan,
                caller,
            };
            observed.push((cell, observe(cell).await));
        }
    }
    assert_cells(observed);
}

#[tokio::test(start_paused = true)]
async fn g1_each_job_settles_once_when_its_caller_waits() {
    every_cell_of(Caller::Waits).await;
}

#[tokio::test(start_paused = true)]
async fn g1_each_job_settles_once_when_its_caller_drops_before_the_first_poll() {
    every_cell_of(Caller::DropsUnpolled).await;
}

#[tokio::test(start_paused = true)]
async fn g1_each_job_settles_once_when_its_caller_drops_while_it_runs() {
    every_cell_of(Caller::DropsRunning).await;
}

#[tokio::test(start_paused = true)]
async fn g1_each_job_settles_once_when_its_caller_drops_while_it_settles() {
    every_cell_of(Caller::DropsSettling).await;
}

#[tokio::test(start_paused = true)]
async fn g1_each_job_settles_once_when_its_caller_detaches_before_the_first_poll() {
    every_cell_of(Caller::DetachesUnpolled).await;
}

#[tokio::test(start_paused = true)]
async fn g1_each_job_settles_once_when_its_caller_detaches_while_it_runs() {
    every_cell_of(Caller::DetachesRunning).await;
}

// === with a blocked thread: the cells side by side ===

/// Returns whether the job blocks its own thread while its caller uses virtual time.
fn blocks_beside_virtual_time(cell: Cell) -> bool {
    // If the job is dropped before it begins, there is no event to hold the time for.
    cell.rig == Rig::OwnThread && cell.caller != Caller::DropsUnpolled
}

fn every_blocking_cell_of(fate: Fate, rig: Rig) {
    let mut cells = Vec::new();
    for plan in Plan::ALL {
        for caller in Caller::ALL {
            cells.push(Cell {
                rig,
                fate,
                plan,
                caller,
            });
        }
    }
    let run = |cell| {
        let runtime = move || match blocks_beside_virtual_time(cell) {
            true => paused_time(),
            false => current_thread(),
        };
        let cell = thread::spawn(move || (cell, runtime().block_on(observe(cell))));
        move || cell.join().unwrap()
    };
    let running: Vec<_> = cells.into_iter().map(run).collect();
    assert_cells(running.into_iter().map(|join| join()));
}

#[test]
fn g1_a_job_that_blocks_before_an_await_settles_once_on_the_runtime_of_its_caller() {
    every_blocking_cell_of(Fate::BlockFirst, Rig::SharedThread);
}

#[test]
fn g1_a_job_that_blocks_after_an_await_settles_once_on_the_runtime_of_its_caller() {
    every_blocking_cell_of(Fate::BlockLater, Rig::SharedThread);
}

#[test]
fn g1_a_job_that_blocks_before_an_await_settles_once_on_a_runtime_of_its_own() {
    every_blocking_cell_of(Fate::BlockFirst, Rig::OwnThread);
}

#[test]
fn g1_a_job_that_blocks_after_an_await_settles_once_on_a_runtime_of_its_own() {
    every_blocking_cell_of(Fate::BlockLater, Rig::OwnThread);
}
