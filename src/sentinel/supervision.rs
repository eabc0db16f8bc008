//! [`Supervision`] of one job from its call to its settlement, independent of who polls it.

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll, ready},
};

use tokio::{task, time::Instant};
use tower_service::Service;

use crate::{
    cancel::{JobContext, JobHandle},
    outcome::{CancelReason, Elsewhere, Outcome, guard},
    policy::Report,
    sentinel::{
        abandoned::Abandoned,
        error::SentinelError,
        isolate::Isolated,
        roll_call::{self, RunningJob},
        runtimes::{Clock, Runtimes},
        settings::{OnDrop, Settings},
        settlement::Settlement,
        shutdown::Shutdown,
    },
    settle::events,
    telemetry::{
        GuardedSpan,
        metrics::{InFlightGauge, Instruments},
    },
    time::deadline,
};

/// State shared by all clones of a sentinel and their response futures.
pub(crate) struct Shared<H> {
    pub(crate) base: Base,
    pub(crate) hooks: H,
}

/// The part of [`Shared`] that has no type parameters.
pub(crate) struct Base {
    pub(crate) settings: Settings,
    pub(crate) runtimes: Runtimes,
    /// Made by the first call that has a token.
    pub(crate) shutdown: OnceLock<Shutdown>,
    pub(crate) abandoned: Option<Arc<Abandoned>>,
    pub(crate) instruments: Arc<Instruments>,
}

impl Base {
    /// Returns the shutdown of the jobs. It is watched from the first call on.
    pub(crate) fn shutdown(&self) -> Option<&Shutdown> {
        let token = self.settings.shutdown.as_ref()?;
        let watch = || Shutdown::new(token, self.runtimes.handle());
        Some(self.shutdown.get_or_init(watch))
    }
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

    /// Returns the tag as `Debug` prints it, and the id of its message.
    fn describe(&self, tag: &Tag) -> (Box<str>, Option<Box<str>>);

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
        let context: &Arc<JobContext> = &self.context;
        let _entered = self.span.enter();
        let Base {
            settings,
            runtimes,
            shutdown,
            abandoned,
            instruments,
        } = self.origin.base();
        let outcome = match &mut self.stage {
            Stage::Running { isolated, .. } => {
                let (clock, shutdown) = (clock.as_mut(), shutdown.get());
                let polled =
                    isolated.poll_outcome(context, clock, settings, runtimes, shutdown, cx);
                Some(ready!(polled))
            }
            Stage::Settling { .. } => None,
        };
        // Not earlier: a poll that finds the job running needs none.
        let _runtime = runtimes.enter();
        if let (
            Some(outcome),
            Stage::Running {
                isolated,
                answerable,
            },
        ) = (outcome, &mut self.stage)
        {
            context.dismiss(outcome.is_stopped());
            let elapsed = isolated.elapsed();
            events::conclude(&self.span, &outcome, || self.origin.policy_tells());
            settings
                .outliving
                .tell(&outcome, || context.is_kept_alive());
            if let Outcome::Completed(_) | Outcome::Failed(_) = outcome {
                if let Some(late) = isolated.lateness(elapsed, settings.ladder.grace) {
                    events::tell_late(outcome.kind(), late);
                }
            }
            // Invariant: the stage is left below.
            let (tag, policy) = answerable.take().expect("a job has one outcome");
            let stuck = match (outcome.is_stopped(), isolated.id()) {
                (false, Some(id)) => Some(running_job(
                    id,
                    &*self.origin,
                    isolated,
                    context,
                    &self.span,
                    &tag,
                )),
                _ => None,
            };
            // A job that never started holds no thread.
            let runs_on = !outcome.is_stopped() || context.is_blocking();
            let mut report = Report::new(tag, outcome, elapsed);
            report.measured = instruments.measured();
            if runtimes.jobs().is_some() && report.outcome.has_destructor() {
                report.elsewhere = self.origin.elsewhere();
            }
            self.in_flight = instruments.conclude(report.outcome.kind(), report.elapsed);
            if abandoned.is_some() && runs_on {
                self.origin.abandon(isolated, context);
            }
            self.stage = Stage::Settling {
                settlement: Settlement::Readying(policy, Some(report)),
                due: None,
            };
            if let Some(job) = stuck {
                settings.on_stuck.tell(&job);
            }
        }
        let Stage::Settling { settlement, due } = &mut self.stage else {
            unreachable!("the stage was left above");
        };
        match settlement.poll(cx) {
            Poll::Ready(Ok(answer)) => Poll::Ready(answer.map_err(SentinelError::Policy)),
            Poll::Ready(Err(panic)) => Poll::Ready(Err(SentinelError::PolicyPanicked(panic))),
            Poll::Pending => {
                let limit = settings.settle_timeout;
                *due = due.or_else(|| deadline(Instant::now(), limit));
                ready!(clock.poll(*due, runtimes, cx));
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
        let Some(id) = isolated.id() else {
            return;
        };
        let (origin, context) = (&*self.origin, &self.context);
        let job = || running_job(id, origin, isolated, context, &self.span, tag);
        if roll_call::answer(id, job) {
            context.ask(CancelReason::Requested, Instant::now());
        }
    }

    /// Continues in the background, because the caller is gone.
    ///
    /// The job is stopped if the layer's [`OnDrop`] says so. A settlement that has begun goes on.
    pub(crate) fn hand_over(mut self) {
        let origin = Arc::clone(&self.origin);
        let Base {
            settings,
            runtimes,
            shutdown,
            ..
        } = origin.base();
        if let (Stage::Running { isolated, .. }, OnDrop::Abort) =
            (&mut self.stage, settings.on_drop)
        {
            isolated.stop_without_caller(&self.context, settings.ladder, runtimes, shutdown.get());
        }
        if let (Stage::Running { isolated, .. }, Some(shutdown), true) =
            (&mut self.stage, shutdown.get(), settings.is_told_by_polls)
        {
            // Its caller no longer polls it.
            isolated.listen(shutdown);
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

fn running_job<P, F, Tag, T, E>(
    id: task::Id,
    origin: &dyn Origin<P, F, Tag, T, E>,
    isolated: &Isolated<T, E>,
    context: &JobContext,
    span: &GuardedSpan,
    tag: &Tag,
) -> RunningJob {
    let (tag, message_id) = origin.describe(tag);
    RunningJob {
        id,
        tag,
        message_id,
        span: span.name(),
        since: isolated.started(),
        time_left: context.time_left(),
        is_told_to_stop: context.is_told(),
        is_blocking: context.is_blocking(),
    }
}
