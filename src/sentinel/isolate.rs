//! Isolation of one call of a service on its own task.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use tokio::{
    task::{self, JoinHandle},
    time::Instant,
};
use tower_service::Service;

use crate::{
    cancel::{JobContext, Stopping},
    outcome::Outcome,
    sentinel::{
        base::Base,
        course::Course,
        runtimes::Clock,
        task::{Output, Task},
    },
    telemetry::GuardedSpan,
};

/// A job on its own task, as its supervisor sees it.
///
/// `Unpin`, so that it can move to another supervisor half-way; the [`Clock`] stays behind.
pub(crate) struct Isolated<T, E> {
    // `None` after `take_running`, from when on this job is no longer polled.
    join: Option<JoinHandle<Output<T, E>>>,
    pub(crate) course: Course,
}

impl<T, E> Isolated<T, E> {
    /// Calls `service` on a new task, in `span`. The time limit counts from `started`.
    #[track_caller]
    pub(crate) fn spawn<S, J>(
        base: &Base,
        context: &Arc<JobContext>,
        span: GuardedSpan,
        (service, job): (S, J),
        started: Instant,
    ) -> Self
    where
        S: Service<J, Response = T, Error = E> + Send + 'static,
        S::Future: Send + 'static,
        J: Send + 'static,
        T: Send + 'static,
        E: Send + 'static,
    {
        let task = Task::new(Arc::clone(context), (service, job), span);
        Self {
            join: Some(base.runtimes.spawn(task)),
            course: Course::new(context, started, base),
        }
    }

    /// Returns the id of the task, unless it was [taken away](Self::take_running).
    pub(crate) fn id(&self) -> Option<task::Id> {
        self.join.as_ref().map(JoinHandle::id)
    }

    /// Returns the outcome, and takes the steps of the ladder that lead to it.
    pub(crate) fn poll_outcome(
        &mut self,
        context: &JobContext,
        mut clock: Pin<&mut Clock>,
        base: &Base,
        cx: &mut Context<'_>,
    ) -> Poll<Outcome<T, E>> {
        let Some(join) = &mut self.join else {
            return Poll::Pending;
        };
        let mut is_blocking = self.course.begin_poll(context, cx);
        loop {
            // Checked first, and after every wake-up: a job that has returned has completed or failed. Its
            // blocking closures are waited for like the job itself.
            if !is_blocking {
                if let Poll::Ready(exit) = Pin::new(&mut *join).poll(cx) {
                    let exit = match exit {
                        Ok(output) => match output.into_inner().0 {
                            Ok(result) => return Poll::Ready(result.into()),
                            Err(panic) => Ok(panic),
                        },
                        Err(error) => Err(error),
                    };
                    let failure = self.course.conclude(context, &base.runtimes, exit);
                    return Poll::Ready(Outcome::unreturned(failure));
                }
            }
            let clock = clock.as_mut();
            let step = self
                .course
                .poll(join, is_blocking, context, clock, base, cx);
            match ready!(step) {
                Some(failure) => return Poll::Ready(Outcome::unreturned(failure)),
                None => is_blocking = false,
            }
        }
    }

    /// Goes on without the caller, or begins to stop the job.
    pub(crate) fn lose_caller(&mut self, context: &JobContext, base: &Base) {
        if let Some(join) = &self.join {
            self.course.lose_caller(join, context, base);
        }
    }

    /// Stops the job as far as possible without waiting for it.
    pub(crate) fn give_up(&mut self, context: &JobContext) {
        context.tell(Stopping::Cancelled);
        if let Some(join) = &self.join {
            join.abort();
        }
        context.dismiss(false);
    }

    /// Takes the task away, if it still runs although the outcome is known.
    pub(crate) fn take_running(&mut self) -> Option<JoinHandle<Output<T, E>>> {
        match &self.join {
            Some(join) if !join.is_finished() => self.join.take(),
            _ => None,
        }
    }
}
