//! Races for a probe.

use std::{
    future::poll_fn,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{
    runtime::{Builder, Runtime},
    time::timeout,
};

use super::{
    machine::Limits,
    shared::{Probe, Shared, Trial, Wait},
};
use crate::{
    backoff::Delays,
    race::{LOST, race},
};

/// Has the timers of the pauses.
static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    let runtime = Builder::new_multi_thread()
        .worker_threads(1)
        .enable_time()
        .build();
    runtime.expect("a runtime starts")
});

/// Returns a state in which one probe at a time is let through, after a pause.
fn paused() -> Arc<Shared> {
    let pause = Duration::from_nanos(1);
    let shared = Arc::new(Shared::new(Limits {
        window: 1,
        threshold: 1.0,
        sample: 1,
        pauses: Delays::new(pause..=pause),
    }));
    Trial::begin(&shared, None).end(true);
    assert!(!shared.is_running());
    shared
}

/// Waits for a probe, or until there are none any more.
fn next(shared: &Arc<Shared>) -> Option<Probe> {
    let mut waiting = Wait::default();
    let next = async { timeout(LOST, poll_fn(|cx| waiting.poll(shared, cx))).await };
    RUNTIME.block_on(next).expect("a wake-up is lost")
}

#[test]
fn a_probe_that_is_given_back_goes_to_the_service_that_waits() {
    let take = |(shared, is_held): &(Arc<Shared>, AtomicBool)| {
        for _ in 0..3 {
            let probe = next(shared).expect("nobody has succeeded");
            assert!(!is_held.swap(true, Ordering::AcqRel), "two have the probe");
            is_held.store(false, Ordering::Release);
            drop(probe);
        }
    };
    let new = || (paused(), AtomicBool::new(false));
    race(new, take, take, |(shared, _)| assert!(!shared.is_running()));
}

#[test]
fn a_probe_that_succeeds_lets_the_service_through_that_waits() {
    let run = |shared: &Arc<Shared>| {
        let probe = next(shared);
        Trial::begin(shared, probe).end(false);
    };
    race(paused, run, run, |shared| assert!(shared.is_running()));
}
