//! [`Sentinel`], the service that supervises its calls.

use std::{
    any::type_name,
    fmt, mem,
    sync::Arc,
    task::{Context, Poll, ready},
};

use tokio::time::Instant;
use tower_service::Service;

use crate::{
    cancel::JobHandle,
    outcome::{CancelReason, Cancelled, Outcome, catch_dyn},
    policy::{AckPolicy, Report},
    sentinel::{
        base::Base,
        error::SentinelError,
        future::ResponseFuture,
        hooks::{Hooks, MakeSpan, OnUnsettled, Tagging},
        isolate::Isolated,
        listening,
        settlement::Settlement,
        supervision::{Origin, Shared, Stage, Supervision},
    },
    settle::events::{self, End},
    telemetry::GuardedSpan,
    waiters::Waiter,
};

/// Service of a [`SentinelLayer`](crate::SentinelLayer), which runs each call of `S` on its own task and
/// returns the response of the policy `P`.
///
/// # Contract
///
/// - *Outcome*: for a response future that is polled to its end or dropped, the policy is called once, or
///   never if it cannot become ready. This holds for a value, an error, a panic in `call`, in the future and
///   in its destructor, a job that hangs or blocks its thread, and a caller who drops the future at any
///   point, also before its first poll.
/// - *Readiness*: `poll_ready` is that of the inner service. The instance that became ready is the one that
///   is called; a clone takes its place. An error or a panic in the inner `poll_ready` is returned as an
///   error of `poll_ready` and never becomes an outcome. So a service that is down does not drain the queue.
///   After such an error, discard the service.
/// - *Cancellation*: a dropped response future hands its job over to a background task. The task ends the job
///   according to [`OnDrop`](crate::sentinel::OnDrop), and settles it. It runs on the runtime in which the
///   future is dropped, or else on the [`runtime`](crate::SentinelLayer::runtime) of the jobs, or on that of
///   the sentinel's first call. If its runtime ends, it moves on to the next of these. If none is left, the
///   job is stopped and not settled, with an event at level ERROR. That also happens if a later call was made
///   in a runtime that is still alive. So drop the future inside of that runtime, or make a sentinel for each
///   runtime.
/// - *Panics*: a panic of the job becomes its outcome, a panic of the policy becomes an error of this call.
/// - *Blocking*: a waker that a job leaves with [`cancelled()`](crate::cancelled) runs on the thread that
///   polls the response future. If it blocks that thread, it delays the limits and settlements of all jobs
///   that are polled in the same task. So does the destructor of a value or an error that a job returned,
///   after the job's own settlement. If the jobs have a [`runtime`](crate::SentinelLayer::runtime), a
///   [`SettlePolicy`](crate::SettlePolicy) leaves that destructor to a task on it. Other policies choose
///   themselves where and when they drop their report.
///
/// Not covered: a future that is forgotten or never polled (no limit fires), `panic = "abort"`, a panic while
/// another one unwinds, the end of the process or of each of these runtimes. In these cases the broker
/// redelivers.
///
/// # Panics
///
/// `call` panics before anything is spawned
///
/// - outside of a tokio runtime, unless the layer has a [`runtime`](crate::SentinelLayer::runtime);
/// - in a runtime without timers (a later call without a limit may do without: if it needs a timer after all,
///   another runtime of the sentinel provides it);
/// - if the tag, the time limit, the span, or the clone of the inner service or of the policy panics: such a
///   panic reaches the caller.
///
/// `call` without `poll_ready` is a mistake of the caller, as everywhere in tower. The inner service may
/// panic, and that panic is then the job's outcome.
pub struct Sentinel<S, P, H = Hooks> {
    service: S,
    policy: P,
    shared: Arc<Shared<H>>,
    // Made the first time that this clone waits for an abandoned job.
    waiter: Option<Waiter>,
}

impl<S, P, H> Sentinel<S, P, H> {
    pub(super) fn new(service: S, policy: P, shared: Arc<Shared<H>>) -> Self {
        Self {
            service,
            policy,
            shared,
            waiter: None,
        }
    }

    /// Returns the inner service.
    pub fn get_ref(&self) -> &S {
        &self.service
    }

    /// Returns the inner service.
    pub fn get_mut(&mut self) -> &mut S {
        &mut self.service
    }

    /// Returns the inner service, and drops the policy.
    pub fn into_inner(self) -> S {
        self.service
    }
}

impl<S, P, J, G, M, U> Service<J> for Sentinel<S, P, Hooks<G, M, U>>
where
    S: Service<J> + Clone + Send + 'static,
    S::Future: Send + 'static,
    S::Response: Send + 'static,
    S::Error: Send + 'static,
    J: Send + 'static,
    G: Tagging<J> + Send + Sync + 'static,
    G::Tag: Send + 'static,
    M: MakeSpan<G::Tag> + Send + Sync + 'static,
    P: AckPolicy<G::Tag, S::Response, S::Error> + Send + 'static,
    P::Future: Send + 'static,
    U: OnUnsettled<S::Error, P::Error> + Send + Sync + 'static,
{
    type Response = P::Response;
    type Error = SentinelError<S::Error, P::Error>;
    type Future = ResponseFuture<P, P::Future, G::Tag, S::Response, S::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        listening::note(self.shared.base.settings.shutdown.is_some());
        if self.shared.base.runtimes.has_lost_jobs() {
            return Poll::Ready(Err(SentinelError::RuntimeGone));
        }
        if let Some(abandoned) = &self.shared.base.abandoned {
            ready!(abandoned.poll_ready(&mut self.waiter, cx));
        }
        let mut ready = Poll::Pending;
        match catch_dyn(&mut || ready = self.service.poll_ready(cx)) {
            Ok(()) => ready.map_err(SentinelError::Unready),
            Err(panic) => Poll::Ready(Err(SentinelError::UnreadyPanicked(panic))),
        }
    }

    #[track_caller]
    fn call(&mut self, job: J) -> Self::Future {
        let started = Instant::now();
        let Shared { base, hooks } = &*self.shared;
        let Base {
            settings, runtimes, ..
        } = base;
        runtimes.arrive();

        // All user code that may panic comes before the spawn.
        let tag = hooks.tag.tag(&job);
        let limit = hooks.tag.time_limit(&job);
        let limit = settings.limit(started, limit, hooks.tag.lease(&job));
        // This panics if the runtime has no timers; the ready instance is then still there.
        let clock = runtimes.clock(limit.due);
        let span = GuardedSpan::new(hooks.span.make_span(&tag));
        let policy = self.policy.clone();
        let context = JobHandle::new(limit);
        let describe = || hooks.tag.messaging(&job);
        let mut in_flight = base.instruments.begin(type_name::<S::Error>(), describe);
        base.instruments.waited(|| hooks.tag.queued_since(&job));
        let origin: Arc<dyn Origin<_, _, _, _, _>> = Arc::clone(&self.shared) as _;
        let stage = match hooks.tag.refusal(&tag) {
            Some(reason) => {
                let cancelled = refuse(&span, reason, origin.policy_tells());
                let outcome = Outcome::Cancelled(cancelled);
                let mut report = Report::new(tag, outcome, started.elapsed());
                report.measured = base.instruments.measured();
                in_flight = base
                    .instruments
                    .conclude(report.outcome.kind(), report.elapsed);
                Stage::Settling {
                    settlement: Settlement::Readying(policy, Some(report)),
                    due: None,
                }
            }
            None => {
                let job_span = span.clone();
                let clone = self.service.clone();
                // The ready instance is the one to call.
                let service = mem::replace(&mut self.service, clone);
                let call = (service, job);
                Stage::Running {
                    isolated: Isolated::spawn(base, &context, job_span, call, started),
                    answerable: Some((tag, policy)),
                }
            }
        };
        let supervision = Supervision {
            stage,
            context,
            in_flight,
            span,
            origin,
        };
        ResponseFuture {
            clock,
            supervision: Some(supervision),
        }
    }
}

/// Returns the outcome of a job that is not run, and tells of it in its span.
fn refuse(span: &GuardedSpan, reason: CancelReason, is_told: bool) -> Cancelled {
    let cancelled = Cancelled::new(reason, true).never_started();
    let _entered = span.enter();
    events::conclude(span, End::Cancelled(&cancelled), is_told);
    cancelled
}

impl<S: Clone, P: Clone, H> Clone for Sentinel<S, P, H> {
    fn clone(&self) -> Self {
        Self {
            service: self.service.clone(),
            policy: self.policy.clone(),
            shared: Arc::clone(&self.shared),
            waiter: None,
        }
    }
}

impl<S: fmt::Debug, P: fmt::Debug, H> fmt::Debug for Sentinel<S, P, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sentinel")
            .field("service", &self.service)
            .field("policy", &self.policy)
            .field("settings", &self.shared.base.settings)
            .finish_non_exhaustive()
    }
}
