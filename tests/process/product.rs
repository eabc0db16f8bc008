//! Each fault of a job by each stop: one outcome each, and nothing left.
//!
//! It runs in a process of its own, so that descriptors and processes can be counted to the last one.

use std::{convert::Infallible, os::unix::process::ExitStatusExt, time::Duration};

use tokio::{runtime::Builder, sync::mpsc};
use tokio_util::sync::CancellationToken;
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_sentinel::{
    Outcome, Report, SentinelLayer,
    process::{ProcessError, ProcessPool},
};

use crate::{
    child::{Decode, pool},
    ends::run,
    stops::Begin,
    tree::{children, descriptors, mark, marked, tree, until},
};

type Outcomes = Outcome<String, ProcessError<String, std::str::Utf8Error>>;

/// What becomes of a job that is not stopped.
#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Signal(i32),
    Code(i32),
    OutOfMemory,
    Garbled,
    Completed(&'static str),
    /// Nothing, so it is of use with a stop only. Then it is killed.
    Never,
}

const FAULTS: [(&str, End); 12] = [
    ("abort", End::Signal(6)),
    ("segv", End::Signal(11)),
    ("overflow", End::Signal(6)),
    ("allocate", End::OutOfMemory),
    ("reserve", End::Signal(6)),
    ("spin", End::Never),
    ("block", End::Never),
    ("exit 0", End::Code(0)),
    ("garbage", End::Garbled),
    ("answer twice", End::Completed("first")),
    // Its own fault is the end of a socket that it still needs, so the pool ends it.
    ("close", End::Signal(9)),
    ("hold and abort", End::Signal(6)),
];

#[derive(Clone, Copy, Debug, PartialEq)]
enum Stop {
    TimeLimit,
    CallerDrops,
    Shutdown,
    None,
}

const STOPS: [Stop; 4] = [
    Stop::TimeLimit,
    Stop::CallerDrops,
    Stop::Shutdown,
    Stop::None,
];

/// Outcomes of cells, as the policy is told.
type Told = mpsc::UnboundedSender<(usize, Outcomes)>;

macro_rules! layer {
    ($told:expr, $cell:expr) => {{
        let (told, cell): (Told, usize) = ($told.clone(), $cell);
        let policy = service_fn(
            move |report: Report<(), String, ProcessError<String, std::str::Utf8Error>>| {
                told.send((cell, report.outcome)).unwrap();
                async { Ok::<(), Infallible>(()) }
            },
        );
        SentinelLayer::with_tag(policy, |_: &String| ())
    }};
}

#[test]
fn each_fault_by_each_stop_has_one_outcome_and_leaves_nothing() {
    let (mut command, mark) = marked(module_path!(), "whole");
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}");
    // The one that the filter has found.
    assert!(text.contains("1 passed"), "{text}");
    // Neither did it leave anything behind at its own end.
    assert_eq!(tree(&mark), [""; 0]);
}

#[test]
#[ignore = "it is a process that the other test starts"]
fn whole() {
    // What the process itself needs for that stays.
    let mut before = 0;
    for round in 0..2 {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let pool = pool(2).memory(256 << 20).address_space(3 << 30);
            match round {
                0 => drop(run(&mut pool.clone(), "four").await),
                _ => product(&pool).await,
            }
            drop(pool);
            // Killed and reaped, and so are those that they have started.
            until(children, Vec::is_empty).await;
            until(|| tree(&mark()), Vec::is_empty).await;
        });
        drop(runtime);
        match round {
            0 => before = descriptors(),
            _ => assert_eq!(descriptors(), before),
        }
    }
}

async fn product(pool: &ProcessPool<Decode>) {
    let (told, mut outcomes) = mpsc::unbounded_channel();
    // A neighbour has a job all the time.
    let shutdown = CancellationToken::new();
    let begin = Begin::new("neighbour");
    let layer = layer!(told, usize::MAX).no_timeout();
    let mut sentinel = layer
        .grace(Duration::MAX)
        .shutdown(shutdown.clone())
        .layer(pool.clone());
    let job = format!("at {} stop", begin.path());
    let neighbour = tokio::spawn(sentinel.ready().await.unwrap().call(job));
    drop(sentinel);
    begin.has_begun().await;

    let mut cells = 0;
    for (fault, end) in FAULTS {
        for stop in STOPS {
            if (stop, end) == (Stop::None, End::Never) {
                continue;
            }
            run_cell(pool, &told, cells, fault, end, stop).await;
            let (cell, outcome) = outcomes.recv().await.unwrap();
            assert_eq!(cell, cells, "{fault} by {stop:?}: {outcome:?}");
            check(&outcome, end, stop, &format!("{fault} by {stop:?}"));
            // The pool is as before.
            assert_eq!(run(&mut pool.clone(), "four").await.unwrap(), "4");
            cells += 1;
        }
    }
    assert_eq!(cells, FAULTS.len() * STOPS.len() - 2);

    assert!(!neighbour.is_finished());
    shutdown.cancel();
    neighbour.await.unwrap().unwrap();
    let (cell, outcome) = outcomes.recv().await.unwrap();
    assert_eq!(cell, usize::MAX);
    assert!(matches!(outcome, Outcome::Completed(text) if text == "told to stop"));
    // None is told twice, up to the end of all sentinels.
    drop(told);
    assert!(outcomes.recv().await.is_none());
}

/// Runs a job that has its fault when it is told to stop, or at once if it is not stopped.
async fn run_cell(
    pool: &ProcessPool<Decode>,
    told: &Told,
    cell: usize,
    fault: &str,
    end: End,
    stop: Stop,
) {
    let grace = match end {
        End::Never => Duration::from_millis(20),
        _ => Duration::from_secs(1_000),
    };
    let shutdown = CancellationToken::new();
    let layer = layer!(told, cell).grace(grace).shutdown(shutdown.clone());
    let layer = match stop {
        Stop::TimeLimit => layer.timeout(Duration::from_millis(50)),
        Stop::CallerDrops | Stop::Shutdown | Stop::None => layer.no_timeout(),
    };
    let begin = Begin::new("cell");
    let job = match stop {
        Stop::None => fault.to_owned(),
        _ => format!("at {} told {fault}", begin.path()),
    };
    let mut sentinel = layer.layer(pool.clone());
    let job = tokio::spawn(sentinel.ready().await.unwrap().call(job));
    match stop {
        Stop::TimeLimit | Stop::None => job.await.unwrap().unwrap(),
        Stop::Shutdown => {
            begin.has_begun().await;
            shutdown.cancel();
            job.await.unwrap().unwrap();
        }
        Stop::CallerDrops => {
            begin.has_begun().await;
            job.abort();
            assert!(job.await.unwrap_err().is_cancelled());
        }
    }
}

fn check(outcome: &Outcomes, end: End, stop: Stop, name: &str) {
    let found = match outcome {
        Outcome::Completed(text) => {
            assert!(
                matches!(end, End::Completed(expected) if text == expected),
                "{name}: {text}"
            );
            return;
        }
        Outcome::Failed(ProcessError::Crashed { status }) => {
            let status = status.unwrap();
            match status.signal() {
                Some(signal) => End::Signal(signal),
                None => End::Code(status.code().unwrap()),
            }
        }
        Outcome::Failed(ProcessError::OutOfMemory { .. }) => End::OutOfMemory,
        Outcome::Failed(ProcessError::Garbled) => End::Garbled,
        Outcome::TimedOut(timed_out) => {
            assert_eq!(stop, Stop::TimeLimit, "{name}");
            assert!(timed_out.stopped(), "{name}");
            End::Never
        }
        Outcome::Cancelled(cancelled) => {
            assert!(matches!(stop, Stop::CallerDrops | Stop::Shutdown), "{name}");
            assert!(cancelled.stopped(), "{name}");
            End::Never
        }
        other => panic!("{name}: {other:?}"),
    };
    assert_eq!(found, end, "{name}");
}
