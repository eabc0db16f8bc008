//! The jobs that still run though their outcome is given.

use std::{
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

use tokio::{runtime::Handle, task::JoinHandle};

use crate::outcome::drop_quietly;

/// Counts the jobs that still run though their outcome is given.
#[derive(Debug)]
pub(crate) struct Abandoned {
    max: usize,
    jobs: Mutex<Jobs>,
}

#[derive(Debug, Default)]
struct Jobs {
    running: usize,
    waiting: Vec<Waker>,
}

impl Abandoned {
    pub(crate) fn new(max: usize) -> Self {
        Self {
            max,
            jobs: Mutex::default(),
        }
    }

    /// Waits until fewer than `max` abandoned jobs run.
    pub(crate) fn poll_ready(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut jobs = self.lock();
        if jobs.running < self.max {
            return Poll::Ready(());
        }
        if !jobs.waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
            jobs.waiting.push(cx.waker().clone());
        }
        Poll::Pending
    }

    /// Counts `task` until it ends.
    pub(crate) fn watch<R: Send + 'static>(self: &Arc<Self>, home: &Handle, task: JoinHandle<R>) {
        self.lock().running += 1;
        let place = Place(Arc::clone(self));
        home.spawn(async move {
            drop_quietly(task.await);
            drop(place);
        });
    }

    fn lock(&self) -> MutexGuard<'_, Jobs> {
        // Nothing panics while the lock is held.
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One abandoned job. Counted down in `Drop`, as the watching task may die with its runtime.
struct Place(Arc<Abandoned>);

impl Drop for Place {
    fn drop(&mut self) {
        let mut jobs = self.0.lock();
        jobs.running -= 1;
        let waiting = mem::take(&mut jobs.waiting);
        drop(jobs);
        waiting.into_iter().for_each(Waker::wake);
    }
}
