//! [`Supervision`] of one job from its call to its settlement, independent of who polls it.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::time::Instant;
use tower_service::Service;

use crate::{
    cancel::{JobContext, JobHandle},
    outcome::{CancelReason, Elsewhere, Outcome, guard},
    policy::Report,
    sentinel::{
        base::Base,
        course::Course,
        error::SentinelError,
        isolate::Isolated,
        roll_call::{self, RunningJob},
        runtimes::Clock,
        settlement::Settlement,
    },
    settle::events::{self, End},
    telemetry::{GuardedSpan, metrics::InFlightGauge},
    time::deadline,
};

/// State shared by all clones of a sentinel and their response futures.
pub(crate) struct Shared<H> {
    pub(crate) base: Base,
    pub(crate) hooks: H,
}

/// Sentinel that a supervision began in.
///
/// A trait object, because a `Drop` impl can have no bounds that its struct lacks, and a spawn needs `Send +
/// 'static`: these bounds are checked where the trait object is made.
pub(crate) trait Origin<P, F, Tag, T, E>: Send + Sync {
    fn base(&self) -> &Base;

    /// Returns whether the policy reports outcomes itself, as a [`SettlePolicy`] does.
    ///
    /// [`SettlePolicy`]: crate::SettlePolicy
    fn policy_tells(&self) -> bool;

    /// Returns the runtime to drop the remains of jobs on, if that is not the current one.
    fn elsewhere(&self) -> Option<Box<Elsewhere<Outcome<T, E>>>>;

    /// Describes a job, unless its task was [taken away](Isolated::take_running).
    fn running_job(
        &self,
        tag: &Tag,
        isolated: &Isolated<T, E>,
        context: &JobContext,
        span: &GuardedSpan,
    ) -> Option<RunningJob>;

    /// Counts a job that still runs although its outcome is known.
    fn abandon(&self, isolated: &mut Isolated<T, E>, context: &Arc<JobContext>);

    /// Takes a supervision over from a response future that is dropped, or from a runtime that ends. It goes
    /// on on the first usable runtime from `rank` on.
    fn take_over(self: Arc<Self>, supervision: Supervision<P, F, Tag, T, E>, rank: usize);
}

/// Course of one job from its call to its settlement.
///
/// `Unpin`, so that it can move from the response future to a separate task half-way.
pub(crate) struct Supervision<P, F, Tag, T, E> {
    pub(crate) stage: Stage<P, F, Tag, T, E>,
    pub(crate) context: JobHandle,
    /// Counts the job first as running, then as unsettled.
    pub(crate) in_flight: InFlightGauge,
    /// Current in the job and in the policy.
    pub(crate) span: GuardedSpan,
    pub(crate) origin: Arc<dyn Origin<P, F, Tag, T, E>>,
}

pub(crate) enum Stage<P, F, Tag, T, E> {
    Running {
        isolated: Isolated<T, E>,
        // `None` once it is reported.
        answerable: Option<(Tag, P)>,
    },
    Settling {
        settlement: Settlement<P, F, Tag, T, E>,
        /// Set when the policy is pending for the first time.
        due: Option<Instant>,
    },
}

impl<P, F, Tag, T, E> Supervision<P, F, Tag, T, E>
where
    P: Service<Report<Tag, T, E>, Future = F>,
    F: Future<Output = Result<P::Response, P::Error>>,
{
    pub(crate) fn poll(
        &mut self,
        mut clock: Pin<&mut Clock>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<P::Response, SentinelError<E, P::Error>>> {
        let _entered = self.span.enter();
        let base = self.origin.base();
        let _runtime = match &mut self.stage {
            Stage::Settling { .. } => base.runtimes.enter(),
            Stage::Running {
                isolated,
                answerable,
            } => {
                let context: &Arc<JobContext> = &self.context;
                let outcome = ready!(isolated.poll_outcome(context, clock.as_mut(), base, cx));
                // Not earlier: a poll that finds the job running needs none.
                let runtime = base.runtimes.enter();
                let end = End::of(&outcome);
                let is_told = !outcome.is_completed() && self.origin.policy_tells();
                let elapsed = conclude(base, &isolated.course, context, &self.span, end, is_told);
                self.in_flight = base.instruments.conclude(end.kind(), elapsed);
                let is_stopped = end.is_stopped();
                let stuck = match &*answerable {
                    Some((tag, _)) if !is_stopped => {
                        self.origin.running_job(tag, isolated, context, &self.span)
                    }
                    _ => None,
                };
                // A job that never started holds no thread.
                let runs_on = !is_stopped || context.is_blocking();
                if base.abandoned.is_some() && runs_on {
                    self.origin.abandon(isolated, context);
                }
                // Invariant: the stage is left below.
                let (tag, policy) = answerable.take().expect("a job has one outcome");
                let mut report = Report::new(tag, outcome, elapsed);
                report.measured = base.instruments.measured();
                if base.runtimes.jobs().is_some() && report.outcome.has_destructor() {
                    report.elsewhere = self.origin.elsewhere();
                }
                self.stage = Stage::Settling {
                    settlement: Settlement::Readying(policy, Some(report)),
                    due: None,
                };
                if let Some(job) = stuck {
                    base.settings.on_stuck.tell(&job);
                }
                runtime
            }
        };
        let Stage::Settling { settlement, due } = &mut self.stage else {
            unreachable!("the stage was left above");
        };
        match settlement.poll(cx) {
            Poll::Ready(Ok(answer)) => Poll::Ready(answer.map_err(SentinelError::Policy)),
            Poll::Ready(Err(panic)) => Poll::Ready(Err(SentinelError::PolicyPanicked(panic))),
            Poll::Pending => {
                let limit = ready!(poll_limit(due, clock, base, cx));
                settlement.end();
                Poll::Ready(Err(SentinelError::PolicyTimedOut(limit)))
            }
        }
    }
}

impl<P, F, Tag, T, E> Supervision<P, F, Tag, T, E> {
    /// Adds the job to the roll call of its consumer, and stops it if it is asked for that.
    pub(super) fn answer(&self) {
        let Stage::Running {
            isolated,
            answerable: Some((tag, _)),
        } = &self.stage
        else {
            return;
        };
        if isolated.id().is_none_or(roll_call::has_answered) {
            return;
        }
        let job = self
            .origin
            .running_job(tag, isolated, &self.context, &self.span);
        if job.is_some_and(roll_call::answer) {
            self.context.ask(CancelReason::Requested, Instant::now());
        }
    }

    /// Continues in the background, because the caller is gone.
    ///
    /// The job is stopped if the layer's [`OnDrop`] says so. A settlement that has begun goes on.
    pub(crate) fn hand_over(mut self) {
        let origin = Arc::clone(&self.origin);
        if let Stage::Running { isolated, .. } = &mut self.stage {
            isolated.lose_caller(&self.context, origin.base());
        }
        origin.take_over(self, 0);
    }

    /// Gives up, because no runtime is left to settle on; the broker will redeliver.
    pub(super) fn lose(mut self) {
        let _entered = self.span.enter();
        tell_lost();
        // A job on another runtime must not run on beside its next delivery.
        if let Stage::Running { isolated, .. } = &mut self.stage {
            isolated.give_up(&self.context);
        }
    }
}

fn tell_lost() {
    guard(|| tracing::error!("job not settled: its runtimes have ended"));
}

/// Tells all who are to know of the end of a job, and returns the time that the job took.
fn conclude(
    base: &Base,
    course: &Course,
    context: &JobContext,
    span: &GuardedSpan,
    end: End<'_>,
    is_told: bool,
) -> Duration {
    let settings = &base.settings;
    context.dismiss(end.is_stopped());
    let elapsed = course.elapsed();
    events::conclude(span, end, is_told);
    settings
        .outliving
        .tell(end.kind(), || context.is_kept_alive());
    if let End::Completed | End::Failed(_) = end {
        if let Some(late) = course.lateness(elapsed, settings.ladder.grace) {
            events::tell_late(end.kind(), late);
        }
    }
    elapsed
}

/// Waits for the limit of a settlement, which is pending, and returns it.
fn poll_limit(
    due: &mut Option<Instant>,
    clock: Pin<&mut Clock>,
    base: &Base,
    cx: &mut Context<'_>,
) -> Poll<Duration> {
    let limit = base.settings.settle_timeout;
    *due = due.or_else(|| deadline(Instant::now(), limit));
    clock.poll(*due, &base.runtimes, cx).map(|()| limit)
}
