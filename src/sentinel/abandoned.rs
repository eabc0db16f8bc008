//! Jobs that still run although their outcome is known.

use std::{
    future::Future,
    mem,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
};

use tokio::{runtime::Handle, task::JoinHandle};

use crate::{
    cancel::JobContext,
    outcome::drop_quietly,
    telemetry::metrics::{InFlightGauge, Instruments},
    unready::{self, Cause},
    waiters::{Waiter, Waiters},
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
    waiting: Waiters,
}

/// End of a job's task, without its type.
type End = Pin<Box<dyn Future<Output = ()> + Send>>;

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
        let running = self.lock().running;
        if running >= self.max && self.poll_full(waiter, cx).is_pending() {
            return Poll::Pending;
        }
        *waiter = None;
        Poll::Ready(())
    }

    #[cold]
    fn poll_full(&self, waiter: &mut Option<Waiter>, cx: &mut Context<'_>) -> Poll<()> {
        let waiter = waiter.get_or_insert_with(Waiter::default);
        waiter.register(cx.waker());
        let mut jobs = self.lock();
        if jobs.running < self.max {
            return Poll::Ready(());
        }
        jobs.waiting.add(waiter);
        drop(jobs);
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
        // Nothing panics while it is held.
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
        waiting.wake();
    }
}

#[cfg(test)]
mod tests {
    use std::task::{Wake, Waker};

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

    /// Finds out in its destructor whether the lock is free.
    struct Foreign(Arc<Abandoned>, Arc<Mutex<Vec<bool>>>);

    impl Wake for Foreign {
        fn wake(self: Arc<Self>) {}
    }

    impl Drop for Foreign {
        fn drop(&mut self) {
            self.1.lock().unwrap().push(self.0.jobs.try_lock().is_ok());
        }
    }

    #[test]
    fn a_foreign_waker_is_not_dropped_under_the_lock() {
        let instruments = Arc::new(Instruments::new(&Labels::default()));
        let abandoned = Arc::new(Abandoned::new(1, instruments));
        let seat = abandoned.seat();
        let is_free = Arc::<Mutex<Vec<_>>>::default();
        let mut waiter = None;
        for _ in 0..2 {
            let waker = Waker::from(Arc::new(Foreign(abandoned.clone(), is_free.clone())));
            let mut cx = Context::from_waker(&waker);
            assert!(abandoned.poll_ready(&mut waiter, &mut cx).is_pending());
        }
        // The first was replaced.
        assert_eq!(*is_free.lock().unwrap(), [true]);
        let waiting = mem::take(&mut abandoned.lock().waiting);
        drop(seat);
        let mut cx = Context::from_waker(Waker::noop());
        assert!(abandoned.poll_ready(&mut waiter, &mut cx).is_ready());
        drop(waiting);
        assert_eq!(*is_free.lock().unwrap(), [true; 2]);
    }
}
