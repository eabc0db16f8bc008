//! A drop beside other causes: the first one wins.

use std::{
    future::pending,
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use tokio::{runtime::Handle, time::timeout};
use tokio_util::sync::CancellationToken;
use tower::{Layer, service_fn};
use tower_sentinel::{
    Report, SentinelLayer,
    cancel::Cancellation,
    cancelled,
    outcome::{CancelReason, OutcomeKind},
};

use super::{BOTH, LIMIT, SECOND, call_and_look_away, caller_dropped, layer};
use crate::support::{
    Count, Fate, Recorder, Refused, Seen, Unit, WORK, Work, Worker, call, idle, raise,
};

#[tokio::test(start_paused = true)]
async fn a_drop_after_the_limit_is_a_time_out_though_nobody_had_looked() {
    for on_drop in BOTH {
        let recorder = Recorder::default();
        let mut sentinel = layer(&recorder).on_drop(on_drop).layer(Worker::default());
        let response = call_and_look_away(&mut sentinel, Work::new(Fate::Hang), LIMIT).await;
        drop(response);
        idle(&Handle::current()).await;
        assert_eq!(recorder.reports(), [Seen::timed_out(true)], "{on_drop:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_drop_by_a_plain_thread_is_timed_by_the_clock_of_its_caller() {
    for (time, seen) in [
        (LIMIT - SECOND, caller_dropped()),
        (LIMIT + SECOND, Seen::timed_out(true)),
    ] {
        let recorder = Recorder::default();
        let mut sentinel = layer(&recorder).layer(Worker::default());
        let response = call_and_look_away(&mut sentinel, Work::new(Fate::Hang), time).await;
        thread::spawn(move || drop(response)).join().unwrap();
        idle(&Handle::current()).await;
        assert_eq!(recorder.reports(), [seen], "{time:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_drop_just_before_the_limit_is_a_cancellation() {
    let recorder = Recorder::default();
    let mut sentinel = layer(&recorder).layer(Worker::default());
    let response = call_and_look_away(
        &mut sentinel,
        Work::new(Fate::Hang),
        LIMIT - Duration::from_millis(1),
    )
    .await;
    drop(response);
    idle(&Handle::current()).await;
    assert_eq!(recorder.reports(), [caller_dropped()]);
}

#[tokio::test(start_paused = true)]
async fn a_drop_during_the_stop_does_not_change_its_cause_nor_cut_its_grace() {
    for on_drop in BOTH {
        let times = Arc::new(Mutex::new(Vec::new()));
        let noted = Arc::clone(&times);
        let policy = service_fn(move |report: Report<Fate, (), Refused>| {
            let seen = Seen::from(&report.outcome);
            noted.lock().unwrap().push((seen, report.elapsed));
            async { Ok::<_, Refused>(()) }
        });
        let mut sentinel = SentinelLayer::new(policy)
            .timeout(LIMIT)
            .grace(3 * SECOND)
            .on_drop(on_drop)
            .layer(Worker::default());
        let response = call(&mut sentinel, Work::new(Fate::Hang));
        assert!(timeout(LIMIT + SECOND, response).await.is_err());
        idle(&Handle::current()).await;
        let expected = [(Seen::timed_out(true), LIMIT + 3 * SECOND)];
        assert_eq!(*times.lock().unwrap(), expected, "{on_drop:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_job_that_finished_before_the_drop_has_completed_though_nobody_had_looked() {
    for on_drop in BOTH {
        // Even if the limit has passed since: a finished job must not run twice.
        for time in [2 * WORK, 2 * LIMIT] {
            for (fate, seen) in [
                (Fate::Value, Seen::completed()),
                (Fate::Error, Seen::failed()),
            ] {
                let recorder = Recorder::default();
                let mut sentinel = layer(&recorder).on_drop(on_drop).layer(Worker::default());
                let response = call_and_look_away(&mut sentinel, Work::new(fate), time).await;
                drop(response);
                idle(&Handle::current()).await;
                assert_eq!(recorder.reports(), [seen], "{on_drop:?} after {time:?}");
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_job_that_panicked_before_the_drop_has_panicked_though_nobody_had_looked() {
    for on_drop in BOTH {
        for time in [2 * WORK, 2 * LIMIT] {
            let recorder = Recorder::default();
            let mut sentinel = layer(&recorder).on_drop(on_drop).layer(Worker::default());
            let response =
                call_and_look_away(&mut sentinel, Work::new(Fate::PanicLater), time).await;
            drop(response);
            idle(&Handle::current()).await;
            // Nobody had cancelled it: a poison job must not pass for a cancelled one.
            assert_eq!(
                recorder.reports(),
                [Seen::panicked()],
                "{on_drop:?} {time:?}"
            );
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_before_the_drop_wins() {
    for on_drop in BOTH {
        let recorder = Recorder::default();
        let service = service_fn(|_: Unit| async {
            Cancellation::current().cancel(CancelReason::LeaseLost);
            pending::<Result<(), Refused>>().await
        });
        let mut sentinel = layer(&recorder).on_drop(on_drop).layer(service);
        let response = call_and_look_away(&mut sentinel, Unit::default(), SECOND).await;
        drop(response);
        idle(&Handle::current()).await;
        let seen = Seen::cancelled(CancelReason::LeaseLost, true);
        assert_eq!(recorder.reports(), [seen], "{on_drop:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_before_the_drop_wins() {
    for on_drop in BOTH {
        let (recorder, shutdown) = (Recorder::default(), CancellationToken::new());
        let mut sentinel = layer(&recorder)
            .on_drop(on_drop)
            .shutdown(shutdown.clone())
            .layer(Worker::default());
        let response = call_and_look_away(&mut sentinel, Work::new(Fate::Hang), SECOND).await;
        // As a server does that cancels its token and then lets go of its futures.
        shutdown.cancel();
        drop(response);
        idle(&Handle::current()).await;
        let seen = Seen::cancelled(CancelReason::Shutdown, true);
        assert_eq!(recorder.reports(), [seen], "{on_drop:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_jobs_future_is_gone_before_the_policy_hears_of_the_drop() {
    let drops = Count::default();
    let (guarded, heard) = (drops.clone(), Count::default());
    let hearing = heard.clone();
    let policy = service_fn(move |report: Report<Unit, (), Refused>| {
        assert_eq!(report.outcome.kind(), OutcomeKind::Cancelled);
        assert_eq!(drops.get(), 1);
        hearing.add();
        async move { Ok::<_, Refused>(()) }
    });
    let mut sentinel = SentinelLayer::new(policy).layer(service_fn(move |_: Unit| {
        let guard = guarded.guard();
        async move {
            let _guard = guard;
            pending::<Result<(), Refused>>().await
        }
    }));
    let response = call(&mut sentinel, Unit::default());
    assert!(timeout(SECOND, response).await.is_err());
    idle(&Handle::current()).await;
    assert_eq!(heard.get(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_panic_in_a_destructor_after_a_drop_is_attached_to_the_cancellation() {
    let recorder = Recorder::default();
    let service = service_fn(|_: Unit| async {
        cancelled().await;
        raise("while tidying up");
        #[expect(unreachable_code, reason = "tells the type of the block")]
        Ok::<(), Refused>(())
    });
    let mut sentinel = layer(&recorder).grace(SECOND).layer(service);
    let response = call(&mut sentinel, Unit::default());
    assert!(timeout(SECOND, response).await.is_err());
    idle(&Handle::current()).await;
    assert_eq!(recorder.reports(), [caller_dropped().with_panic(true)]);
}
