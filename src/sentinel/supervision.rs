//! [`Supervision`] of one job from its call to its settlement, independent of who polls it.

use std::{
    any::TypeId,
    future::Future,
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll, ready},
};

use pin_project_lite::pin_project;
use tokio::time::Instant;
use tower_service::Service;

use crate::{
    cancel::{JobContext, JobHandle},
    outcome::{Elsewhere, Outcome, guard},
    policy::{AckPolicy, Report},
    sentinel::{
        abandoned::Abandoned,
        error::SentinelError,
        hooks::{Hooks, OnUnsettled},
        isolate::Isolated,
        runtimes::{Clock, Runtimes},
        settings::{OnDrop, Settings},
        settlement::Settlement,
        shutdown::Shutdown,
    },
    settle::{Settled, events},
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

    /// Counts a job that still runs although its outcome is known.
    fn abandon(&self, isolated: &mut Isolated<T, E>, context: &Arc<JobContext>);

    /// Takes a supervision over from a response future that is dropped, or from a runtime that ends. It goes
    /// on on the first usable runtime from `rank` on.
    fn take_over(self: Arc<Self>, supervision: Supervision<P, F, Tag, T, E>, rank: usize);
}

impl<P, F, Tag, T, E, G, M, U> Origin<P, F, Tag, T, E> for Shared<Hooks<G, M, U>>
where
    P: AckPolicy<Tag, T, E> + Service<Report<Tag, T, E>, Future = F> + Send + 'static,
    F: Future<Output = Result<P::Response, P::Error>> + Send + 'static,
    Tag: Send + 'static,
    T: Send + 'static,
    E: Send + 'static,
    G: Send + Sync + 'static,
    M: Send + Sync + 'static,
    U: OnUnsettled<E, P::Error> + Send + Sync + 'static,
{
    fn base(&self) -> &Base {
        &self.base
    }

    fn policy_tells(&self) -> bool {
        // No other policy has this response.
        TypeId::of::<P::Response>() == TypeId::of::<Settled>()
    }

    fn elsewhere(&self) -> Option<Box<Elsewhere<Outcome<T, E>>>> {
        let jobs = self.base.runtimes.jobs()?;
        Some(Box::new(Elsewhere::new(jobs.clone())))
    }

    fn abandon(&self, isolated: &mut Isolated<T, E>, context: &Arc<JobContext>) {
        let task = isolated.take_running();
        if let (Some(abandoned), true) = (
            &self.base.abandoned,
            task.is_some() || context.is_blocking(),
        ) {
            abandoned.watch(&self.base.runtimes.watch(), task, Arc::clone(context));
        }
    }

    fn take_over(self: Arc<Self>, supervision: Supervision<P, F, Tag, T, E>, rank: usize) {
        let known = |rank| Some((rank, self.base.runtimes.runtime(rank)?));
        let Some((rank, runtime)) = (rank..Runtimes::MOST).find_map(known) else {
            return supervision.lose();
        };
        // If that runtime is gone, the orphan is dropped at once, and its destructor tries the next one.
        runtime.spawn(Orphan {
            clock: Clock::default(),
            supervision: Some(supervision),
            origin: self,
            rank,
        });
    }
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
        let _runtime = runtimes.enter();
        if let Stage::Running {
            isolated,
            answerable,
        } = &mut self.stage
        {
            let shutdown = shutdown.get();
            let outcome =
                isolated.poll_outcome(context, clock.as_mut(), settings, runtimes, shutdown, cx);
            let outcome = ready!(outcome);
            context.dismiss(outcome.is_stopped());
            let elapsed = isolated.elapsed();
            events::conclude(&self.span, &outcome, self.origin.policy_tells());
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
            // A job that never started holds no thread.
            let runs_on = !outcome.is_stopped() || context.is_blocking();
            let mut report = Report::new(tag, outcome, elapsed);
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
    fn lose(mut self) {
        let _entered = self.span.enter();
        guard(|| tracing::error!("job not settled: its runtimes have ended"));
        // A job on another runtime must not run on beside its next delivery.
        if let Stage::Running { isolated, .. } = &mut self.stage {
            isolated.give_up(&self.context);
        }
    }
}

pin_project! {
    /// A supervision whose caller is gone.
    struct Orphan<P, F, Tag, T, E, H> {
        #[pin]
        clock: Clock,
        // `None` once it is settled.
        supervision: Option<Supervision<P, F, Tag, T, E>>,
        origin: Arc<Shared<H>>,
        // Rank of the present runtime.
        rank: usize,
    }

    impl<P, F, Tag, T, E, H> PinnedDrop for Orphan<P, F, Tag, T, E, H> {
        fn drop(this: Pin<&mut Self>) {
            let this = this.project();
            if let Some(supervision) = this.supervision.take() {
                let origin = Arc::clone(&supervision.origin);
                origin.take_over(supervision, *this.rank + 1);
            }
        }
    }
}

impl<P, F, Tag, T, E, G, M, U> Future for Orphan<P, F, Tag, T, E, Hooks<G, M, U>>
where
    P: Service<Report<Tag, T, E>, Future = F>,
    F: Future<Output = Result<P::Response, P::Error>>,
    U: OnUnsettled<E, P::Error>,
{
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.project();
        let Some(supervision) = this.supervision else {
            return Poll::Ready(());
        };
        let result = ready!(supervision.poll(this.clock, cx));
        // Before the callback, since a settled job must not be handed on.
        let supervision = this.supervision.take();
        if let (Err(error), Some(Supervision { span, .. })) = (result, supervision) {
            let _entered = span.enter();
            guard(|| {
                tracing::error!(
                    error = error.brief(),
                    "settlement failed after the response future was dropped"
                );
            });
            // tokio would drop the payload of its panic, and that destructor may panic too.
            guard(|| this.origin.hooks.unsettled.unsettled(error));
        }
        Poll::Ready(())
    }
}
