//! A panic in the grace of a job that is cancelled: the source of its outcome.

use std::error::Error as _;

use tower_sentinel::{Outcome, Panic, cancel::Cancellation, cancelled, outcome::CancelReason};

use super::{SECOND, layer, run};
use crate::support::{Recorder, raise};

#[tokio::test(start_paused = true)]
async fn a_panic_in_the_grace_is_the_source_of_the_cancellation() {
    let recorder = Recorder::default();
    let report = run(layer(&recorder).grace(SECOND), || async {
        Cancellation::current().cancel(CancelReason::Requested);
        cancelled().await;
        if Cancellation::current().is_cancelled() {
            raise("in its grace");
        }
        Ok(())
    });
    let Outcome::Cancelled(cancelled) = report.await.outcome else {
        panic!("not cancelled");
    };
    let panic = cancelled.source().unwrap().downcast_ref::<Panic>().unwrap();
    assert_eq!(panic.message(), "in its grace");
}
