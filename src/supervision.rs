//! Follows one job from its call to its settlement, whoever polls.

use std::{
    future::Future,
    mem,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use pin_project_lite::pin_project;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tower_service::Service;
use tracing::Span;

use crate::{
    error::SentinelError,
    hooks::{Hooks, OnUnsettled},
    isolate::{Abandoned, Clock, Home, Isolated, Ladder},
    outcome::drop_quietly,
    policy::{AckPolicy, Report, Settlement},
};

/// What happens to a job whose caller drops the response future.
///
/// Either way the job still has exactly one outcome, and the policy is called with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum OnDrop {
    /// The job is stopped, and is [`Cancelled`](crate::Outcome::Cancelled) with
    /// [`CancelReason::CallerDropped`](crate::CancelReason::CallerDropped) unless it returns on
    /// the way down.
    #[default]
    Abort,
    /// The job goes on under its time limit, in the background.
    Detach,
}

#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) timeout: Option<Duration>,
    pub(crate) ladder: Ladder,
    pub(crate) settle_timeout: Duration,
    pub(crate) on_drop: OnDrop,
    pub(crate) shutdown: Option<CancellationToken>,
    pub(crate) max_abandoned: Option<usize>,
}

/// What all clones of a sentinel and their response futures share.
pub(crate) struct Shared<H> {
    pub(crate) settings: Settings,
    pub(crate) home: Home,
    pub(crate) abandoned: Option<Arc<Abandoned>>,
    pub(crate) hooks: H,
}

/// What a supervision needs of the sentinel that began it.
///
/// Behind a `dyn`, because a `Drop` impl can have no bounds that its struct lacks, and a spawn
/// needs `Send + 'static`: those bounds hold where the trait object is made.
pub(crate) trait Origin<P, F, Tag, T, E>: Send + Sync {
    fn settings(&self) -> &Settings;

    fn home(&self) -> &Home;

    /// Counts a job whose outcome is given while `task` still runs.
    fn abandon(&self, isolated: Isolated<T, E>);

    /// Takes a supervision over from a response future that is dropped.
    fn take_over(self: Arc<Self>, supervision: Supervision<P, F, Tag, T, E>);
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
    fn settings(&self) -> &Settings {
        &self.settings
    }

    fn home(&self) -> &Home {
        &self.home
    }

    fn abandon(&self, isolated: Isolated<T, E>) {
        if let (Some(abandoned), Some(task)) = (&self.abandoned, isolated.into_running()) {
            abandoned.watch(&self.home.handle(), task);
        }
    }

    fn take_over(self: Arc<Self>, supervision: Supervision<P, F, Tag, T, E>) {
        self.home.handle().spawn(Orphan {
            clock: Clock::default(),
            supervision: Some(supervision),
            origin: self,
        });
    }
}

/// The way of one job from its call to its settlement.
///
/// `Unpin`, so that it can move from the response future to a task of its own half-way.
pub(crate) struct Supervision<P, F, Tag, T, E> {
    pub(crate) stage: Stage<P, F, Tag, T, E>,
    /// When the settlement is given up; set when it first has to be waited for.
    pub(crate) settle_by: Option<Instant>,
    pub(crate) span: Span,
    pub(crate) origin: Arc<dyn Origin<P, F, Tag, T, E>>,
}

pub(crate) enum Stage<P, F, Tag, T, E> {
    Running {
        isolated: Isolated<T, E>,
        tag: Tag,
        policy: P,
    },
    Settling(Settlement<P, F, Tag, T, E>),
    Settled,
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
        let Self {
            stage,
            settle_by,
            span,
            origin,
        } = self;
        let _entered = span.enter();
        let settled = if let Stage::Running { isolated, .. } = stage {
            let ladder = origin.settings().ladder;
            let outcome = ready!(isolated.poll_outcome(clock.as_mut(), ladder, origin.home(), cx));
            let Stage::Running {
                isolated,
                tag,
                policy,
            } = mem::replace(stage, Stage::Settled)
            else {
                unreachable!("the stage was matched above");
            };
            let report = Report::new(tag, outcome, isolated.elapsed());
            origin.abandon(isolated);
            Settlement::begin(policy, report, cx)
        } else {
            let Stage::Settling(settlement) = mem::replace(stage, Stage::Settled) else {
                unreachable!("a settled supervision is not polled");
            };
            settlement.poll(cx)
        };
        let settlement = match settled {
            Ok(Ok(answer)) => return Poll::Ready(answer.map_err(SentinelError::Policy)),
            Ok(Err(panic)) => return Poll::Ready(Err(SentinelError::PolicyPanicked(panic))),
            Err(settlement) => settlement,
        };
        let limit = origin.settings().settle_timeout;
        *settle_by = settle_by.or_else(|| Instant::now().checked_add(limit));
        if clock.poll(*settle_by, origin.home(), cx).is_ready() {
            drop_quietly(settlement);
            return Poll::Ready(Err(SentinelError::PolicyTimedOut(limit)));
        }
        *stage = Stage::Settling(settlement);
        Poll::Pending
    }
}

impl<P, F, Tag, T, E> Supervision<P, F, Tag, T, E> {
    /// Goes on in the background, because the caller is gone.
    ///
    /// The job is stopped if the layer's [`OnDrop`] says so; what is being settled is settled.
    pub(crate) fn hand_over(mut self) {
        let origin = Arc::clone(&self.origin);
        let Settings {
            ladder, on_drop, ..
        } = *origin.settings();
        if let (Stage::Running { isolated, .. }, OnDrop::Abort) = (&mut self.stage, on_drop) {
            isolated.stop_without_caller(ladder);
        }
        origin.take_over(self);
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
    }

    impl<P, F, Tag, T, E, H> PinnedDrop for Orphan<P, F, Tag, T, E, H> {
        fn drop(this: Pin<&mut Self>) {
            if let Some(supervision) = this.project().supervision.take() {
                // There is no runtime left to settle on; the broker will redeliver.
                let _entered = supervision.span.enter();
                tracing::error!("the runtime ended before a job was settled");
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
        if let Err(error) = result {
            let _entered = supervision.span.enter();
            tracing::error!(
                error = error.brief(),
                "nobody waits for a failed settlement"
            );
            this.origin.hooks.unsettled.unsettled(error);
        }
        *this.supervision = None;
        Poll::Ready(())
    }
}
