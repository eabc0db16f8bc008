//! [`Course`] of a job, without its types, and the only place that stops a job.
//!
//! Every stop goes through the same ladder: the job is told to stop, it has its grace, it is aborted, and the
//! sentinel waits for its end for a while. The result is exactly one [`Outcome`](crate::Outcome).

use std::{
    any::Any,
    convert::Infallible,
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    task::{self, JoinError, JoinHandle},
    time::Instant,
};
use tokio_util::sync::WaitForCancellationFutureOwned;

use crate::{
    cancel::JobContext,
    outcome::{CancelReason, Failure, Panic, Stop},
    sentinel::{
        base::Base,
        cause::{Cause, Ladder},
        roll_call::RunningJob,
        runtimes::{Clock, Runtimes},
        settings::OnDrop,
        shutdown::Shutdown,
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

/// Outcome of a job that has not returned.
pub(super) type Unreturned = Failure<Infallible>;

/// Task of a job, without the type of its output.
pub(super) trait Running {
    /// Returns whether the task has ended although its last poll was pending. Either it ended since, or the
    /// poll was out of budget. In both cases the supervisor is woken.
    fn has_ended(&self) -> bool;

    fn abort(&self);
}

impl<T> Running for JoinHandle<T> {
    fn has_ended(&self) -> bool {
        self.is_finished()
    }

    fn abort(&self) {
        self.abort();
    }
}

/// Course of a job's run, as its supervisor follows it.
pub(crate) struct Course {
    /// Boxed, since it is absent without a shutdown token.
    shutdown: Option<Pin<Box<WaitForCancellationFutureOwned>>>,
    started: Instant,
    step: Rung,
    /// Time of the next step, if a step is due by time alone.
    due: Option<Instant>,
}

impl Course {
    /// Follows a job that was called at `started`, from when on its limit counts.
    #[inline]
    pub(super) fn new(context: &JobContext, started: Instant, base: &Base) -> Self {
        let mut course = Self {
            shutdown: None,
            started,
            step: Rung::Running,
            due: context.due(),
        };
        if let (Some(shutdown), false) = (base.shutdown(), base.settings.is_told_by_polls) {
            course.listen(shutdown);
        }
        course
    }

    /// Follows the time limit of the job, which is another one once the job is kept alive.
    #[inline]
    fn follow_limit(&mut self, context: &JobContext) {
        if let Rung::Running = self.step {
            self.due = context.due();
        }
    }

    /// Returns the time since the call.
    pub(crate) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Makes this job wait for `shutdown` itself from now on, independent of who polls it.
    pub(crate) fn listen(&mut self, shutdown: &Shutdown) {
        self.shutdown = Some(Box::pin(shutdown.cancelled()));
    }

    /// Begins a poll, and returns whether the job is being stopped and blocks a thread.
    #[inline]
    pub(super) fn begin_poll(&mut self, context: &JobContext, cx: &mut Context<'_>) -> bool {
        self.follow_limit(context);
        match self.step {
            Rung::Stopping(_) => context.poll_blocking(cx.waker()).is_pending(),
            Rung::Running | Rung::Grace(_) => false,
        }
    }

    /// Takes the steps of the ladder that are due, and returns the outcome if the job has not ended after the
    /// last one; `None` if it has, and is to be joined.
    pub(super) fn poll(
        &mut self,
        job: &dyn Running,
        is_blocking: bool,
        context: &JobContext,
        mut clock: Pin<&mut Clock>,
        base: &Base,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Unreturned>> {
        let ladder = base.settings.ladder;
        let runtimes = &base.runtimes;
        loop {
            match self.step {
                Rung::Running => {
                    let cause = ready!(self.poll_cause(context, clock.as_mut(), base, cx));
                    if job.has_ended() {
                        return Poll::Pending;
                    }
                    let _runtime = runtimes.enter();
                    self.stop(job, context, cause, ladder);
                }
                Rung::Grace(cause) => {
                    ready!(clock.as_mut().poll(self.due, runtimes, cx));
                    let _runtime = runtimes.enter();
                    self.abort(job, cause, ladder);
                }
                Rung::Stopping(cause) => {
                    ready!(clock.as_mut().poll(self.due, runtimes, cx));
                    if job.has_ended() {
                        return match is_blocking {
                            true => Poll::Ready(None),
                            false => Poll::Pending,
                        };
                    }
                    let started = context.has_started();
                    return Poll::Ready(Some(cause.into_outcome(Stop {
                        started,
                        // It never will start: it was aborted before.
                        stopped: !started,
                        panic: None,
                    })));
                }
            }
        }
    }

    fn poll_cause(
        &mut self,
        context: &JobContext,
        clock: Pin<&mut Clock>,
        base: &Base,
        cx: &mut Context<'_>,
    ) -> Poll<Cause> {
        let runtimes = &base.runtimes;
        let is_requested = context.poll_request(cx.waker()).is_some();
        let is_due =
            !is_requested && self.due.is_some() && clock.poll(self.due, runtimes, cx).is_ready();
        if !is_requested && !is_due {
            let is_shut_down = match &mut self.shutdown {
                Some(shutdown) => shutdown.as_mut().poll(cx).is_ready(),
                None => base.settings.is_shut_down(),
            };
            if !is_shut_down {
                return Poll::Pending;
            }
        }
        match self.first_cause(context, runtimes, base.shutdown.get(), is_due) {
            Some(cause) => Poll::Ready(cause),
            None => Poll::Pending,
        }
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

    /// Goes on without the caller. The job is stopped if the layer's [`OnDrop`] says so.
    pub(super) fn lose_caller(&mut self, job: &dyn Running, context: &JobContext, base: &Base) {
        if let OnDrop::Abort = base.settings.on_drop {
            self.stop_without_caller(job, context, base);
        }
        if let (Some(shutdown), true) = (base.shutdown.get(), base.settings.is_told_by_polls) {
            // Its caller no longer polls it.
            self.listen(shutdown);
        }
    }

    /// Begins to stop the job because its caller is gone, unless the job is already being stopped.
    ///
    /// An earlier cause that no poll has seen yet keeps its place; so does the end of the job.
    fn stop_without_caller(&mut self, job: &dyn Running, context: &JobContext, base: &Base) {
        self.follow_limit(context);
        if job.has_ended() || !matches!(self.step, Rung::Running) {
            return;
        }
        let cause = self.first_cause(context, &base.runtimes, base.shutdown.get(), false);
        let cause = cause.unwrap_or(Cause::Cancelled(CancelReason::CallerDropped));
        self.stop(job, context, cause, base.settings.ladder);
    }

    fn stop(&mut self, job: &dyn Running, context: &JobContext, cause: Cause, ladder: Ladder) {
        context.tell(cause.stopping());
        if ladder.grace.is_zero() {
            self.abort(job, cause, ladder);
        } else {
            self.step = Rung::Grace(cause);
            self.due = deadline(Instant::now(), ladder.grace);
        }
    }

    fn abort(&mut self, job: &dyn Running, cause: Cause, ladder: Ladder) {
        job.abort();
        self.step = Rung::Stopping(cause);
        self.due = deadline(Instant::now(), ladder.stop_wait);
    }

    /// Returns the outcome of a job that ended by a panic, or whose task did not end by itself.
    #[cold]
    pub(super) fn conclude(
        &self,
        context: &JobContext,
        runtimes: &Runtimes,
        exit: Result<Panic, JoinError>,
    ) -> Unreturned {
        let cause = match self.step {
            Rung::Running => {
                let request = context.request();
                request.and_then(|_| self.first_cause(context, runtimes, None, false))
            }
            Rung::Grace(cause) | Rung::Stopping(cause) => Some(cause),
        };
        let panic = match (exit, cause) {
            (Ok(panic), None) => return Failure::Panicked(panic),
            (Ok(panic), Some(Cause::Unwinding(_))) if context.has_unwound() => {
                return Failure::Panicked(panic);
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

    /// Describes the job.
    pub(super) fn running_job(
        &self,
        id: task::Id,
        (tag, message_id): (Box<str>, Option<Box<str>>),
        context: &JobContext,
        span: &GuardedSpan,
    ) -> RunningJob {
        RunningJob {
            id,
            tag,
            message_id,
            span: span.name(),
            since: self.started,
            time_left: context.time_left(),
            is_told_to_stop: context.is_told(),
            is_blocking: context.is_blocking(),
        }
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
}

/// Returns the panic of a task's destructor; see [`Task`](super::task::Task).
fn panic_of(payload: Box<dyn Any + Send>) -> Panic {
    match payload.downcast::<Panic>() {
        Ok(panic) => *panic,
        Err(payload) => Panic::from_payload(payload),
    }
}
