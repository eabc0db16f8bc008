//! Races of a job, its supervisor and handles for the context of the job.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    task::Poll,
};

use futures_util::FutureExt;
use tokio::time::Instant;

use super::context::{Companion, JobContext};
use crate::{
    outcome::CancelReason,
    race::{race, wait},
};

fn new() -> Arc<JobContext> {
    Arc::default()
}

#[test]
fn a_request_is_not_missed_by_a_supervisor_that_begins_to_wait() {
    race(
        new,
        |job| job.ask(CancelReason::Requested, Instant::now()),
        |job| {
            let request = wait(|cx| match job.poll_request(cx.waker()) {
                Some(request) => Poll::Ready(request),
                None => Poll::Pending,
            });
            assert_eq!(request.reason, CancelReason::Requested);
        },
        |job| assert!(job.request().is_some()),
    );
}

#[test]
fn of_two_requests_one_counts() {
    let [one, other] = [CancelReason::Requested, CancelReason::LeaseLost];
    race(
        || (new(), AtomicU32::new(0)),
        |(job, _)| job.ask(one, Instant::now()),
        |(job, _)| job.ask(other, Instant::now()),
        |(job, _)| {
            let first = job.request().map(|request| request.reason);
            assert!(first == Some(one) || first == Some(other));
            job.ask(one, Instant::now());
            assert_eq!(job.request().map(|request| request.reason), first);
        },
    );
}

#[test]
fn a_job_and_its_supervisor_agree_on_whether_it_starts() {
    race(
        || (new(), AtomicBool::new(false), AtomicBool::new(false)),
        |(job, starts, _)| {
            let may = Arc::clone(job).run(JobContext::start_current);
            starts.store(may, Ordering::Relaxed);
        },
        |(job, _, has_started)| has_started.store(job.has_started(), Ordering::Relaxed),
        |(_, starts, has_started)| assert_eq!(starts.into_inner(), has_started.into_inner()),
    );
}

#[test]
fn the_end_of_a_closure_that_blocks_is_not_missed() {
    let blocked = || {
        let job = new();
        job.block();
        job
    };
    let by_supervisor = |job: &Arc<JobContext>| {
        wait(|cx| job.poll_blocking(cx.waker()));
        assert!(!job.is_blocking());
    };
    let by_watcher = |job: &Arc<JobContext>| {
        let mut unblocked = Box::pin(job.unblocked());
        wait(|cx| unblocked.poll_unpin(cx));
    };
    race(blocked, |job| job.unblock(), by_supervisor, drop);
    race(blocked, |job| job.unblock(), by_watcher, drop);
}

#[test]
fn a_companion_that_comes_with_the_outcome_is_stopped() {
    #[derive(Default)]
    struct Counting(AtomicU32);

    impl Companion for Counting {
        fn stop(&self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    race(
        || (new(), Arc::new(Counting::default())),
        |(job, companion)| job.accompany(Arc::clone(companion) as _),
        |(job, _)| job.dismiss(false),
        |(_, companion)| assert_eq!(companion.0.load(Ordering::Relaxed), 1),
    );
}
