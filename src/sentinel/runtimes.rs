//! Where jobs and their supervision run, and the one timer of a supervision.

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

/// The runtimes of one sentinel: that of its jobs, and that of their supervision.
#[derive(Debug)]
pub(crate) struct Home {
    /// The runtime of the jobs, if they have one of their own.
    jobs: Option<Handle>,
    /// Whether that one was found to have ended.
    has_lost_jobs: AtomicBool,
    /// The runtime of the first call, for a response future that is dropped outside of any. One
    /// for all calls, since a handle of its own costs each job two counts on a contended cache
    /// line.
    first: OnceLock<Handle>,
}

impl Home {
    pub(crate) fn new(jobs: Option<Handle>) -> Self {
        Self {
            jobs,
            has_lost_jobs: AtomicBool::new(false),
            first: OnceLock::new(),
        }
    }

    /// Learns that a job's runtime has ended. Without one of their own, the next job may have
    /// another.
    pub(crate) fn lose_jobs(&self) {
        if self.jobs.is_some() {
            self.has_lost_jobs.store(true, Ordering::Relaxed);
        }
    }

    /// Returns whether no job will run any more.
    pub(crate) fn has_lost_jobs(&self) -> bool {
        self.has_lost_jobs.load(Ordering::Relaxed)
    }

    /// Learns of the runtime in which a call is made.
    #[track_caller]
    #[inline]
    pub(crate) fn arrive(&self) {
        let known = self.first.get().is_some();
        if known && (self.jobs.is_some() || is_inside_a_runtime()) {
            return;
        }
        let Some(handle) = Handle::try_current().ok().or_else(|| self.jobs.clone()) else {
            panic!(
                "`Sentinel::call` outside of a tokio runtime: call it inside one, or give the \
                 layer a `runtime(handle)`"
            )
        };
        // A supervision needs timers even without a limit. To panic for want of them is for the
        // first call, which has nothing to lose yet.
        let _context = handle.enter();
        drop(sleep_until(Instant::now()));
        drop(self.first.set(handle.clone()));
    }

    /// Returns the time by the clock of the calls: outside of any runtime there may be another.
    pub(crate) fn now(&self) -> Instant {
        let first = self.first.get().filter(|_| !is_inside_a_runtime());
        let _clock = first.map(Handle::enter);
        Instant::now()
    }

    /// Returns the clock of a call.
    ///
    /// Where jobs have a runtime of their own there may be no other, and it is the poll that
    /// knows: the timer is made then.
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

    /// How many runtimes there may be to supervise on.
    pub(crate) const RUNTIMES: usize = 3;

    /// Returns the runtime to supervise on, if those before `rank` are gone or of no use: a
    /// future can be polled, or dropped, anywhere.
    pub(crate) fn runtime(&self, rank: usize) -> Option<Handle> {
        match rank {
            0 => Handle::try_current().ok(),
            1 => self.jobs.clone(),
            _ => self.first.get().cloned(),
        }
    }

    /// Enters a runtime, if this is outside of any: a policy may need timers.
    #[inline]
    pub(crate) fn enter(&self) -> Option<EnterGuard<'_>> {
        if is_inside_a_runtime() {
            return None;
        }
        let runtime = self.jobs.as_ref().or_else(|| self.first.get());
        runtime.map(Handle::enter)
    }

    /// Returns the runtime of the jobs, if they have one of their own.
    #[inline]
    pub(crate) fn jobs(&self) -> Option<&Handle> {
        self.jobs.as_ref()
    }

    /// Returns the runtime that watches a job beyond its outcome: one that lives as long.
    pub(crate) fn watch(&self) -> Handle {
        self.jobs.clone().unwrap_or_else(|| self.handle())
    }

    /// Returns the first runtime to supervise on.
    pub(crate) fn handle(&self) -> Handle {
        (0..Self::RUNTIMES)
            .find_map(|rank| self.runtime(rank))
            .expect("a call was made, so a runtime is known")
    }
}

/// Looks for a task first: a handle of its own would cost each job two counts on a contended
/// cache line.
#[inline]
fn is_inside_a_runtime() -> bool {
    task::try_id().is_some() || Handle::try_current().is_ok()
}

pin_project! {
    /// The one timer of a supervisor: it serves the limit, then each step in its turn.
    #[derive(Default)]
    pub(crate) struct Clock {
        #[pin]
        sleep: Option<Sleep>,
    }
}

impl Clock {
    /// Waits until `due`, or for ever.
    pub(crate) fn poll(
        self: Pin<&mut Self>,
        due: Option<Instant>,
        home: &Home,
        cx: &mut Context<'_>,
    ) -> Poll<()> {
        let Some(due) = due else {
            return Poll::Pending;
        };
        let runtimes = (0..Home::RUNTIMES).filter_map(|rank| home.runtime(rank));
        let polled = poll_timer(self.project().sleep, due, runtimes, cx);
        polled.unwrap_or_else(|| match due <= Instant::now() {
            // No runtime is left that has timers: time is told only when somebody asks.
            true => Poll::Ready(()),
            false => Poll::Pending,
        })
    }
}
