//! The handle of a job, inside and outside of it.

use std::{
    future::pending,
    pin::pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::poll;
use tokio::time::{sleep, timeout};
use tower::{Layer, service_fn};
use tower_sentinel::{cancel::Cancellation, cancelled, outcome::CancelReason};

use super::{LIMIT, SECOND, layer, run};
use crate::support::{Recorder, Refused, Seen, Unit, call};

#[tokio::test(start_paused = true)]
async fn outside_a_job_the_handle_is_inert() {
    let handle = Cancellation::current();
    handle.cancel(CancelReason::Requested);
    assert!(!handle.is_cancelled());
    let year = 365 * 24 * 3600 * SECOND;
    assert!(timeout(year, handle.cancelled()).await.is_err());
    assert!(timeout(year, cancelled()).await.is_err());
}

#[test]
fn outside_a_runtime_the_handle_is_inert() {
    let handle = Cancellation::current();
    handle.cancel(CancelReason::Requested);
    assert!(!handle.is_cancelled());
}

#[tokio::test(start_paused = true)]
async fn a_job_is_told_when_its_limit_passes_and_not_before() {
    let recorder = Recorder::default();
    let report = run(layer(&recorder).grace(SECOND), || async {
        let handle = Cancellation::current();
        sleep(LIMIT - Duration::from_millis(1)).await;
        assert!(!handle.is_cancelled());
        handle.cancelled().await;
        assert!(handle.is_cancelled());
        // After the first one, each later call resolves at once.
        assert!(poll!(pin!(cancelled())).is_ready());
        assert!(poll!(pin!(handle.clone().cancelled())).is_ready());
        Ok(())
    });
    assert_eq!(report.await.elapsed, LIMIT);
    assert_eq!(recorder.reports(), [Seen::completed()]);
}

#[tokio::test(start_paused = true)]
async fn a_job_that_returns_leaves_its_handles_pending() {
    let recorder = Recorder::default();
    let handle = Arc::new(Mutex::new(None));
    let kept = Arc::clone(&handle);
    let report = run(layer(&recorder), move || {
        *kept.lock().unwrap() = Some(Cancellation::current());
        async { Ok(()) }
    });
    assert!(report.await.outcome.is_completed());
    let handle = handle.lock().unwrap().take().unwrap();
    // Too late to do anything.
    handle.cancel(CancelReason::LeaseLost);
    assert!(timeout(2 * LIMIT, handle.cancelled()).await.is_err());
    assert_eq!(recorder.reports(), [Seen::completed()]);
}

#[tokio::test(start_paused = true)]
async fn the_handle_is_known_in_call_in_the_future_and_in_its_destructor() {
    /// Cancels the job that it is dropped in, to no effect but to be seen.
    struct InDrop(Cancellation);

    impl Drop for InDrop {
        fn drop(&mut self) {
            assert!(self.0.is_cancelled());
            assert!(Cancellation::current().is_cancelled());
        }
    }

    let recorder = Recorder::default();
    let mut sentinel = layer(&recorder).layer(service_fn(|_: Unit| {
        let in_call = Cancellation::current();
        async move {
            let _in_drop = InDrop(Cancellation::current());
            sleep(SECOND).await;
            in_call.cancel(CancelReason::LeaseLost);
            pending::<Result<(), Refused>>().await
        }
    }));
    let report = call(&mut sentinel, Unit::default()).await.unwrap();
    assert_eq!(report.elapsed, SECOND);
    // No panic: the destructor saw the expected state.
    let seen = Seen::cancelled(CancelReason::LeaseLost, true);
    assert_eq!(recorder.reports(), [seen]);
}

#[tokio::test(start_paused = true)]
async fn a_child_task_does_not_inherit_the_handle_but_can_be_given_it() {
    let recorder = Recorder::default();
    let report = run(layer(&recorder).grace(SECOND), || async {
        let told = cancelled();
        let handle = Cancellation::current();
        let child = tokio::spawn(async move {
            let own = Cancellation::current();
            told.await;
            assert!(handle.is_cancelled());
            assert!(!own.is_cancelled());
        });
        child.await.unwrap();
        Ok(())
    });
    assert_eq!(report.await.elapsed, LIMIT);
    assert_eq!(recorder.reports(), [Seen::completed()]);
}
