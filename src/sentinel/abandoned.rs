//! Jobs that still run although their outcome is known.

use std::{
    future::Future,
    mem,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    task::{Context, Poll},
};

use futures_util::task::AtomicWaker;
use tokio::{runtime::Handle, task::JoinHandle};

use crate::{
    cancel::JobContext,
    outcome::{drop_quietly, guard},
    telemetry::metrics::{InFlightGauge, Instruments},
    unready::{self, Cause},
};

/// Counter of the jobs that still run although their outcome is known.
pub(crate) struct Abandoned {
    max: usize,
    instruments: Arc<Instruments>,
    jobs: Mutex<Jobs>,
}

#[derive(Debug, Default)]
struct Jobs {
    running: usize,
    waiting: Vec<Weak<AtomicWaker>>,
}

/// End of a job's task, without its type.
type End = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Waker of a clone of a service that waits: one for each clone, and none for a clone that is dropped.
pub(crate) type Waiter = Arc<AtomicWaker>;

impl Abandoned {
    pub(crate) fn new(max: usize, instruments: Arc<Instruments>) -> Self {
        Self {
            max,
            instruments,
            jobs: Mutex::default(),
        }
    }

    /// Waits until fewer than `max` abandoned jobs run.
    pub(crate) fn poll_ready(&self, waiter: &mut Option<Waiter>, cx: &mut Context<'_>) -> Poll<()> {
        let mut jobs = self.lock();
        if jobs.running < self.max {
            *waiter = None;
            return Poll::Ready(());
        }
        let waiter = waiter.get_or_insert_with(Waiter::default);
        waiter.register(cx.waker());
        jobs.waiting
            .retain(|it| it.strong_count() > 0 && it.as_ptr() != Arc::as_ptr(waiter));
        jobs.waiting.push(Arc::downgrade(waiter));
        unready::note(Cause::Abandoned);
        Poll::Pending
    }

    /// Counts a job until its `task` has ended and none of its closures blocks a thread.
    pub(crate) fn watch<R: Send + 'static>(
        self: &Arc<Self>,
        runtime: &Handle,
        task: Option<JoinHandle<R>>,
        job: Arc<JobContext>,
    ) {
        let end = task.map(|task| -> End { Box::pin(async move { drop_quietly(task.await) }) });
        self.watch_end(runtime, end, job);
    }

    fn watch_end(self: &Arc<Self>, runtime: &Handle, end: Option<End>, job: Arc<JobContext>) {
        let place = self.seat();
        runtime.spawn(async move {
            if let Some(end) = end {
                end.await;
            }
            job.unblocked().await;
            drop(place);
        });
    }

    /// Counts a job.
    fn seat(self: &Arc<Self>) -> Seat {
        self.lock().running += 1;
        Seat {
            abandoned: Arc::clone(self),
            _counted: self.instruments.abandon(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Jobs> {
        // Only a waker of the caller can panic while the lock is held, and it leaves nothing half-done.
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One abandoned job. It is counted down in `Drop`, since the watching task may end with its runtime.
struct Seat {
    abandoned: Arc<Abandoned>,
    _counted: InFlightGauge,
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut jobs = self.abandoned.lock();
        jobs.running -= 1;
        let waiting = mem::take(&mut jobs.waiting);
        drop(jobs);
        let waiting = waiting.iter().filter_map(Weak::upgrade);
        waiting.for_each(|waiter| guard(|| waiter.wake()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        race::{race, wait},
        telemetry::metrics::Labels,
    };

    #[test]
    fn the_end_of_an_abandoned_job_is_not_missed_by_a_service_that_begins_to_wait() {
        race(
            || {
                let instruments = Arc::new(Instruments::new(&Labels::default()));
                let abandoned = Arc::new(Abandoned::new(1, instruments));
                let seat = abandoned.seat();
                (abandoned, Mutex::new(Some(seat)))
            },
            |(_, seat)| drop(seat.lock().unwrap().take()),
            |(abandoned, _)| {
                let mut waiter = None;
                wait(|cx| abandoned.poll_ready(&mut waiter, cx));
                assert!(waiter.is_none());
            },
            |(abandoned, _)| {
                let jobs = abandoned.lock();
                assert_eq!((jobs.running, jobs.waiting.len()), (0, 0));
            },
        );
    }
}
