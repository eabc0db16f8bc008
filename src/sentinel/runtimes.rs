//! Runtimes of jobs and of their supervision, and the one timer of a supervision.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use pin_project_lite::pin_project;
use tokio::{
    runtime::{EnterGuard, Handle},
    task::{self, JoinHandle},
    time::{Instant, Sleep, sleep_until},
};

use crate::time::poll_timer;

/// Runtimes of one sentinel: that of its jobs, and that of their supervision.
#[derive(Debug)]
pub(crate) struct Runtimes {
    /// The separate runtime of the jobs, if there is one.
    jobs: Option<Handle>,
    /// `true` once that runtime was found to have ended.
    has_lost_jobs: AtomicBool,
    /// The runtime of the first call, for a response future that is dropped outside of any runtime. There is
    /// one for all calls, since a handle for each job would cost it two counts on a contended cache line.
    first: OnceLock<Handle>,
}

impl Runtimes {
    pub(crate) fn new(jobs: Option<Handle>) -> Self {
        Self {
            jobs,
            has_lost_jobs: AtomicBool::new(false),
            first: OnceLock::new(),
        }
    }

    /// Notes that the runtime of a job has ended. Without a separate runtime for jobs, the next job may be on
    /// another one, so nothing is noted.
    pub(crate) fn lose_jobs(&self) {
        if self.jobs.is_some() {
            self.has_lost_jobs.store(true, Ordering::Relaxed);
        }
    }

    /// Returns `true` if no job will run any more.
    pub(crate) fn has_lost_jobs(&self) -> bool {
        self.has_lost_jobs.load(Ordering::Relaxed)
    }

    /// Notes the runtime in which a call is made.
    #[track_caller]
    #[inline]
    pub(crate) fn arrive(&self) {
        let known = self.first.get().is_some();
        if !known || self.jobs.is_none() && !is_inside_a_runtime() {
            self.arrive_first();
        }
    }

    /// Notes the runtime of the first call.
    #[cold]
    #[track_caller]
    fn arrive_first(&self) {
        let Some(handle) = Handle::try_current().ok().or_else(|| self.jobs.clone()) else {
            panic!(
                "`Sentinel::call` outside of a tokio runtime: call it inside one, or give the \
                 layer a `runtime(handle)`"
            )
        };
        // A supervision needs timers even without a limit. If there are none, the first call panics, since
        // nothing can be lost yet.
        let _context = handle.enter();
        drop(sleep_until(Instant::now()));
        drop(self.first.set(handle.clone()));
    }

    /// Returns the time by the clock of the calls: outside of any runtime the clock may be another one.
    pub(crate) fn now(&self) -> Instant {
        let first = self.first.get().filter(|_| !is_inside_a_runtime());
        let _clock = first.map(Handle::enter);
        Instant::now()
    }

    /// Returns the clock of a call.
    ///
    /// If jobs have a separate runtime, the call may be outside of any other. Then only the poll knows the
    /// runtime, and the timer is made by the poll.
    #[inline]
    #[track_caller]
    pub(crate) fn clock(&self, due: Option<Instant>) -> Clock {
        let due = due.filter(|_| self.jobs.is_none());
        Clock {
            sleep: due.map(sleep_until),
        }
    }

    /// Spawns the task of a job.
    #[track_caller]
    pub(crate) fn spawn<F>(&self, task: F) -> JoinHandle<F::Output>
    where
        F: Future<Output: Send + 'static> + Send + 'static,
    {
        match &self.jobs {
            Some(runtime) => runtime.spawn(task),
            None => tokio::spawn(task),
        }
    }

    /// Number of runtimes that a supervision may try.
    pub(crate) const MOST: usize = 3;

    /// Returns a runtime to supervise on, if those before `rank` are gone or unusable: a future can be
    /// polled, or dropped, anywhere.
    pub(crate) fn runtime(&self, rank: usize) -> Option<Handle> {
        match rank {
            0 => Handle::try_current().ok(),
            1 => self.jobs.clone(),
            _ => self.first.get().cloned(),
        }
    }

    /// Returns the first usable runtime from `rank` on, with its rank.
    pub(crate) fn usable(&self, rank: usize) -> Option<(usize, Handle)> {
        (rank..Self::MOST).find_map(|rank| Some((rank, self.runtime(rank)?)))
    }

    /// Enters a runtime if the current thread is outside of any, since a policy may need timers.
    #[inline]
    pub(crate) fn enter(&self) -> Option<EnterGuard<'_>> {
        if is_inside_a_runtime() {
            return None;
        }
        let runtime = self.jobs.as_ref().or_else(|| self.first.get());
        runtime.map(Handle::enter)
    }

    /// Returns the separate runtime of the jobs, if there is one.
    #[inline]
    pub(crate) fn jobs(&self) -> Option<&Handle> {
        self.jobs.as_ref()
    }

    /// Returns the runtime of the task that watches a job after its outcome, which lives as long as the job.
    pub(crate) fn watch(&self) -> Handle {
        self.jobs.clone().unwrap_or_else(|| self.handle())
    }

    /// Returns the first known runtime to supervise on.
    pub(crate) fn handle(&self) -> Handle {
        let usable = self.usable(0);
        usable.expect("a call was made, so a runtime is known").1
    }
}

/// Looks for a task first, since a new handle would cost each job two counts on a contended cache line.
#[inline]
fn is_inside_a_runtime() -> bool {
    task::try_id().is_some() || Handle::try_current().is_ok()
}

pin_project! {
    /// Timer of a supervisor, which serves the limit and then each step in turn.
    #[derive(Default)]
    pub(crate) struct Clock {
        #[pin]
        sleep: Option<Sleep>,
    }
}

impl Clock {
    /// Waits until `due`, or for ever.
    #[inline]
    pub(crate) fn poll(
        self: Pin<&mut Self>,
        due: Option<Instant>,
        runtimes: &Runtimes,
        cx: &mut Context<'_>,
    ) -> Poll<()> {
        let Some(due) = due else {
            return Poll::Pending;
        };
        let runtimes = (0..Runtimes::MOST).filter_map(|rank| runtimes.runtime(rank));
        let polled = poll_timer(self.project().sleep, due, runtimes, cx);
        polled.unwrap_or_else(|| match due <= Instant::now() {
            // No runtime with timers is left, so the time is checked only by a poll.
            true => Poll::Ready(()),
            false => Poll::Pending,
        })
    }
}
