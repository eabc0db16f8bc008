//! [`Orphan`], a supervision whose caller is gone.

use std::{
    any::TypeId,
    fmt,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use pin_project_lite::pin_project;
use tower_service::Service;

use crate::{
    cancel::JobContext,
    outcome::{Elsewhere, Outcome, guard, guard_dyn},
    policy::{AckPolicy, Report},
    sentinel::{
        base::Base,
        hooks::{Hooks, MakeSpan, OnUnsettled},
        isolate::Isolated,
        roll_call::{self, RunningJob},
        runtimes::Clock,
        supervision::{Origin, Shared, Supervision},
    },
    settle::Settled,
    telemetry::GuardedSpan,
};

impl<P, F, Tag, T, E, G, M, U> Origin<P, F, Tag, T, E> for Shared<Hooks<G, M, U>>
where
    P: AckPolicy<Tag, T, E> + Service<Report<Tag, T, E>, Future = F> + Send + 'static,
    F: Future<Output = Result<P::Response, P::Error>> + Send + 'static,
    Tag: fmt::Debug + Send + 'static,
    T: Send + 'static,
    E: Send + 'static,
    G: Send + Sync + 'static,
    M: MakeSpan<Tag> + Send + Sync + 'static,
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

    fn running_job(
        &self,
        tag: &Tag,
        isolated: &Isolated<T, E>,
        context: &JobContext,
        span: &GuardedSpan,
    ) -> Option<RunningJob> {
        let id = isolated.id()?;
        let mut message_id = None;
        guard_dyn(&mut || message_id = self.hooks.span.message_id(tag));
        let described = (roll_call::printed(tag), message_id);
        Some(isolated.course.running_job(id, described, context, span))
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
        let Some((rank, runtime)) = self.base.runtimes.usable(rank) else {
            return supervision.lose();
        };
        // If that runtime is gone, the orphan is dropped at once, and its destructor tries the next one.
        // Boxed, so that the task is compiled once, and not for each type of job.
        let orphan: Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(Orphan {
            clock: Clock::default(),
            supervision: Some(supervision),
            origin: self,
            rank,
        });
        runtime.spawn(orphan);
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
        if let (Err(error), Some(supervision)) = (result, &supervision) {
            let _entered = supervision.span.enter();
            tell(error.brief());
            let mut error = Some(error);
            // tokio would drop the payload of its panic, and that destructor may panic too.
            guard_dyn(&mut || {
                if let Some(error) = error.take() {
                    this.origin.hooks.unsettled.unsettled(error);
                }
            });
        }
        Poll::Ready(())
    }
}

fn tell(error: &str) {
    guard(|| {
        tracing::error!(
            error,
            "settlement failed after the response future was dropped"
        );
    });
}
