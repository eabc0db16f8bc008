//! Isolation of one call of a service on its own task, and the only place that stops a job.
//!
//! Every stop goes through the same ladder: the job is told to stop, it has its grace, it is aborted, and the
//! sentinel waits for its end for a while. The result is exactly one [`Outcome`].

use std::{
    any::Any,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    task::{self, JoinError, JoinHandle},
    time::Instant,
};
use tokio_util::sync::WaitForCancellationFutureOwned;
use tower_service::Service;

use crate::{
    cancel::{JobContext, Stopping},
    outcome::{CancelReason, Outcome, Panic, Stop},
    sentinel::{
        cause::{Cause, Ladder},
        runtimes::{Clock, Runtimes},
        settings::Settings,
        shutdown::Shutdown,
        task::{Output, Task},
    },
    telemetry::GuardedSpan,
    time::deadline,
};

/// Longest delay after its limit that is normal for a job that does not block its thread.
const LATE: Duration = Duration::from_secs(1);

/// Rung of the ladder that a job has reached.
#[derive(Clone, Copy)]
enum Rung {
    Running,
    /// The job has been told to stop.
    Grace(Cause),
    /// The job has been told to stop, and aborted.
    Stopping(Cause),
}

/// A job on its own task, as its supervisor sees it.
///
/// `Unpin`, so that it can move to another supervisor half-way; the [`Clock`] stays behind.
pub(crate) struct Isolated<T, E> {
    // `None` after `take_running`, from when on this job is no longer polled.
    join: Option<JoinHandle<Output<T, E>>>,
    /// Boxed, since it is absent without a shutdown token.
    shutdown: Option<Pin<Box<WaitForCancellationFutureOwned>>>,
    started: Instant,
    step: Rung,
    /// Time of the next step, if a step is due by time alone.
    due: Option<Instant>,
}

impl<T, E> Isolated<T, E> {
    /// Calls `service` on a new task, in `span`. The time limit counts from `started`.
    #[track_caller]
    pub(crate) fn spawn<S, J>(
        runtimes: &Runtimes,
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
            join: Some(runtimes.spawn(task)),
            shutdown: None,
            started,
            step: Rung::Running,
            due: context.due(),
        }
    }

    /// Follows the time limit of the job, which is another one once the job is kept alive.
    #[inline]
    fn follow_limit(&mut self, context: &JobContext) {
        if let Rung::Running = self.step {
            self.due = context.due();
        }
    }

    /// Returns the id of the task, unless it was [taken away](Self::take_running).
    pub(crate) fn id(&self) -> Option<task::Id> {
        self.join.as_ref().map(JoinHandle::id)
    }

    /// Returns the time of the call.
    pub(crate) fn started(&self) -> Instant {
        self.started
    }

    /// Returns the time since the call.
    pub(crate) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Returns the outcome, and takes the steps of the ladder that lead to it.
    pub(crate) fn poll_outcome(
        &mut self,
        context: &JobContext,
        mut clock: Pin<&mut Clock>,
        settings: &Settings,
        runtimes: &Runtimes,
        shutdown: Option<&Shutdown>,
        cx: &mut Context<'_>,
    ) -> Poll<Outcome<T, E>> {
        let ladder = settings.ladder;
        self.follow_limit(context);
        let mut is_blocking = false;
        if let Rung::Stopping(_) = self.step {
            is_blocking = context.poll_blocking(cx.waker()).is_pending();
        }
        // Checked first, and after every wake-up: a job that has returned has completed or failed. Its
        // blocking closures are waited for like the job itself.
        if let Some(join) = self.join.as_mut().filter(|_| !is_blocking) {
            if let Poll::Ready(exit) = Pin::new(join).poll(cx) {
                return Poll::Ready(self.conclude(context, runtimes, exit));
            }
        }
        loop {
            match self.step {
                Rung::Running => {
                    let cause = ready!(self.poll_cause(
                        context,
                        clock.as_mut(),
                        settings,
                        runtimes,
                        shutdown,
                        cx
                    ));
                    if self.has_ended() {
                        return Poll::Pending;
                    }
                    let _runtime = runtimes.enter();
                    self.stop(context, cause, ladder);
                }
                Rung::Grace(cause) => {
                    ready!(clock.as_mut().poll(self.due, runtimes, cx));
                    let _runtime = runtimes.enter();
                    self.abort(cause, ladder);
                }
                Rung::Stopping(cause) => {
                    ready!(clock.as_mut().poll(self.due, runtimes, cx));
                    if self.has_ended() {
                        return match (is_blocking, &mut self.join) {
                            (true, Some(join)) => {
                                let exit = ready!(Pin::new(join).poll(cx));
                                Poll::Ready(self.conclude(context, runtimes, exit))
                            }
                            _ => Poll::Pending,
                        };
                    }
                    let started = context.has_started();
                    return Poll::Ready(cause.into_outcome(Stop {
                        started,
                        // It never will start: it was aborted before.
                        stopped: !started,
                        panic: None,
                    }));
                }
            }
        }
    }

    fn poll_cause(
        &mut self,
        context: &JobContext,
        clock: Pin<&mut Clock>,
        settings: &Settings,
        runtimes: &Runtimes,
        shutdown: Option<&Shutdown>,
        cx: &mut Context<'_>,
    ) -> Poll<Cause> {
        let is_requested = context.poll_request(cx.waker()).is_some();
        let is_due =
            !is_requested && self.due.is_some() && clock.poll(self.due, runtimes, cx).is_ready();
        if !is_requested && !is_due {
            let is_shut_down = match &mut self.shutdown {
                Some(shutdown) => shutdown.as_mut().poll(cx).is_ready(),
                None => settings.is_shut_down(),
            };
            if !is_shut_down {
                return Poll::Pending;
            }
        }
        match self.first_cause(context, runtimes, shutdown, is_due) {
            Some(cause) => Poll::Ready(cause),
            None => Poll::Pending,
        }
    }

    /// Makes this job wait for `shutdown` itself from now on, independent of who polls it.
    pub(crate) fn listen(&mut self, shutdown: &Shutdown) {
        self.shutdown = Some(Box::pin(shutdown.cancelled()));
    }

    /// Returns the cause that came first, if one came while the job is running. The time of a cause counts,
    /// not the poll that sees it.
    fn first_cause(
        &self,
        context: &JobContext,
        runtimes: &Runtimes,
        shutdown: Option<&Shutdown>,
        is_due: bool,
    ) -> Option<Cause> {
        let request = context.request().map(|it| (it.at, it.into()));
        let shutdown = shutdown.and_then(Shutdown::since);
        let shutdown = shutdown.map(|at| (at, Cause::Cancelled(CancelReason::Shutdown)));
        let cancelled = [request, shutdown].into_iter().flatten();
        let cancelled = cancelled.min_by_key(|&(at, _)| at);
        // The clock of a request may be ahead of the clock of the call. The limit passes by the latter alone.
        let limit = self.due.filter(|&due| is_due || due <= runtimes.now());
        match (limit, cancelled) {
            (Some(due), Some((at, cause))) if at < due => Some(cause),
            (Some(due), _) => Some(Cause::TimeLimit(due - self.started)),
            (None, cancelled) => cancelled.map(|(_, cause)| cause),
        }
    }

    /// Begins to stop the job because its caller is gone, unless the job is already being stopped.
    ///
    /// An earlier cause that no poll has seen yet keeps its place; so does the end of the job.
    pub(crate) fn stop_without_caller(
        &mut self,
        context: &JobContext,
        ladder: Ladder,
        runtimes: &Runtimes,
        shutdown: Option<&Shutdown>,
    ) {
        self.follow_limit(context);
        if self.has_ended() || !matches!(self.step, Rung::Running) {
            return;
        }
        let cause = self.first_cause(context, runtimes, shutdown, false);
        let cause = cause.unwrap_or(Cause::Cancelled(CancelReason::CallerDropped));
        self.stop(context, cause, ladder);
    }

    /// Returns whether the task has ended although its last poll was pending. Either it ended since, or the
    /// poll was out of budget. In both cases the supervisor is woken.
    fn has_ended(&self) -> bool {
        self.join.as_ref().is_none_or(JoinHandle::is_finished)
    }

    fn stop(&mut self, context: &JobContext, cause: Cause, ladder: Ladder) {
        context.tell(cause.stopping());
        if ladder.grace.is_zero() {
            self.abort(cause, ladder);
        } else {
            self.step = Rung::Grace(cause);
            self.due = deadline(Instant::now(), ladder.grace);
        }
    }

    fn abort(&mut self, cause: Cause, ladder: Ladder) {
        if let Some(join) = &self.join {
            join.abort();
        }
        self.step = Rung::Stopping(cause);
        self.due = deadline(Instant::now(), ladder.stop_wait);
    }

    /// Stops the job as far as possible without waiting for it.
    pub(crate) fn give_up(&mut self, context: &JobContext) {
        context.tell(Stopping::Cancelled);
        if let Some(join) = &self.join {
            join.abort();
        }
        context.dismiss(false);
    }

    #[inline]
    fn conclude(
        &self,
        context: &JobContext,
        runtimes: &Runtimes,
        exit: Result<Output<T, E>, JoinError>,
    ) -> Outcome<T, E> {
        let exit = match exit.map(|output| output.into_inner().0) {
            Ok(Ok(result)) => return result.into(),
            Ok(Err(panic)) => Ok(panic),
            Err(error) => Err(error),
        };
        let cause = match self.step {
            Rung::Running => {
                let request = context.request();
                request.and_then(|_| self.first_cause(context, runtimes, None, false))
            }
            Rung::Grace(cause) | Rung::Stopping(cause) => Some(cause),
        };
        let panic = match (exit, cause) {
            (Ok(panic), None) => return Outcome::Panicked(panic),
            (Ok(panic), Some(Cause::Unwinding(_))) if context.has_unwound() => {
                return Outcome::Panicked(panic);
            }
            (Ok(panic), Some(_)) => Some(panic),
            // A destructor that panics makes an aborted task look like one that panicked.
            (Err(error), _) => error.try_into_panic().ok().map(panic_of),
        };
        // Nobody else holds an abort handle, so a task dropped without an abort ended with its runtime.
        let cause = cause.unwrap_or_else(|| {
            runtimes.lose_jobs();
            Cause::Cancelled(CancelReason::RuntimeGone)
        });
        cause.into_outcome(Stop {
            started: context.has_started(),
            stopped: !context.is_blocking(),
            panic,
        })
    }

    /// Returns the time from its limit until a job was found to have returned, if that is too late for its
    /// `grace`.
    #[inline]
    pub(crate) fn lateness(&self, elapsed: Duration, grace: Duration) -> Option<Duration> {
        if elapsed <= LATE {
            return None;
        }
        let limit = match self.step {
            Rung::Running => self.due? - self.started,
            Rung::Grace(Cause::TimeLimit(limit)) | Rung::Stopping(Cause::TimeLimit(limit)) => limit,
            Rung::Grace(_) | Rung::Stopping(_) => return None,
        };
        let late = elapsed.checked_sub(limit)?;
        (late > grace.saturating_add(LATE)).then_some(late)
    }

    /// Takes the task away, if it still runs although the outcome is known.
    pub(crate) fn take_running(&mut self) -> Option<JoinHandle<Output<T, E>>> {
        self.join.take_if(|join| !join.is_finished())
    }
}

/// Returns the panic of a task's destructor; see [`Task`].
fn panic_of(payload: Box<dyn Any + Send>) -> Panic {
    match payload.downcast::<Panic>() {
        Ok(panic) => *panic,
        Err(payload) => Panic::from_payload(payload),
    }
}
