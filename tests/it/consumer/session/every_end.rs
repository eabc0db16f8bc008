//! Causes of a consumer's end × running jobs × number of tasks.

use std::{sync::Arc, time::Duration};

use tokio::{
    runtime::{Builder, Handle},
    task::{spawn_blocking, yield_now},
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;
use tower_sentinel::{Consumer, Verdict, consumer::EndCause, outcome::OutcomeKind};

use super::{MS, Switch};
use crate::{
    consumer::{ends, here, stack},
    support::{
        Blocked, Fate, Refused, Worker,
        subscription::{Channel, End, Refusal, Stopping},
        until, wait_until,
    },
};

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

/// Expected observations at the end.
struct Expected {
    verdicts: Vec<Verdict>,
    /// Time at which it stops pulling jobs, counted from the first poll.
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
