//! Subscribers that panic.

use std::sync::atomic::Ordering;

use tokio::runtime::Handle;
use tower::{Layer as _, Service, ServiceExt};
use tower_sentinel::{SentinelLayer, outcome::OutcomeKind};

use super::{Burst, CALLERS, Caller, FATES, SITES, Site, run, span_of};
use crate::support::{Fate, Recorder, Work, Worker, idle};

#[tokio::test(start_paused = true)]
async fn g1_a_subscriber_that_panics_costs_no_policy_call() {
    let mut cells = 0;
    for site in SITES {
        for (fate, kind) in FATES {
            for caller in CALLERS {
                let cell = format!("[{site:?} × {fate:?} × {caller:?}]");
                let burst = Burst::new(site);
                let guard = burst.start();
                let recorder = Recorder::default();
                burst.arm();
                run(SentinelLayer::new(recorder.policy()), fate, caller).await;
                idle(&Handle::current()).await;
                burst.disarm();
                drop(guard);
                let reports = recorder.reports();
                assert_eq!(reports.len(), 1, "{cell}");
                let dropped = matches!(caller, Caller::Drops | Caller::DropsLater);
                match dropped && fate != Fate::PanicInCall {
                    // It never began, or was stopped.
                    true => assert_eq!(reports[0].kind, OutcomeKind::Cancelled, "{cell}"),
                    false if dropped => {}
                    false => assert_eq!(reports[0].kind, kind, "{cell}"),
                }
                let events_only = site == Site::Event && kind == OutcomeKind::Completed;
                if !events_only && caller == Caller::Waits && site != Site::Record {
                    assert!(burst.panics.load(Ordering::SeqCst) > 0, "{cell}");
                }
                cells += 1;
            }
        }
    }
    assert_eq!(cells, 6 * 7 * 4);
}

#[test]
fn a_subscriber_that_panics_at_the_end_of_all_runtimes_ends_no_process() {
    for site in SITES {
        let burst = Burst::new(site);
        let _guard = burst.start();
        let recorder = Recorder::default();
        let runtime = crate::support::current_thread();
        let response = runtime.block_on(async {
            let layer = SentinelLayer::new(recorder.policy());
            let mut sentinel = layer.make_span(span_of).layer(Worker::default());
            let call = sentinel.ready().await.unwrap().call(Work::new(Fate::Hang));
            Some(call)
        });
        burst.arm();
        drop(runtime);
        // Nobody is left to settle it: it is lost, with an event.
        drop(response);
        burst.disarm();
        assert!(recorder.reports().is_empty(), "{site:?}");
        assert!(
            burst.panics.load(Ordering::SeqCst) > 0 || site == Site::Record,
            "{site:?}"
        );
    }
}
