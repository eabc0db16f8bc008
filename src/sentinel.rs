//! Middleware that supervises each call of a service and settles its outcome with a policy.
//!
//! See [`SentinelLayer`].

use std::{
    fmt,
    future::Future,
    marker::PhantomPinned,
    mem,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use pin_project_lite::pin_project;
use tokio::{runtime::Handle, time::Instant};
use tokio_util::sync::CancellationToken;
use tower::ServiceBuilder;
use tower_layer::{Layer, Stack};
use tower_service::Service;
use tracing::Span;

use crate::{
    error::SentinelError,
    hooks::{CallerSpan, EventOnly, Hooks, MakeSpan, OnUnsettled},
    isolate::{Abandoned, Clock, Home, Isolated, Ladder},
    job::{Tagging, TimeLimit},
    outcome::catch,
    policy::{AckPolicy, Report},
    supervision::{Base, OnDrop, Settings, Shared, Stage, Supervision},
};

// === impl SentinelLayer ===

pub struct SentinelLayer<P, H = Hooks> {
    policy: P,
    settings: Settings,
    runtime: Option<Handle>,
    hooks: H,
    // Keeps a layer from being `Unpin`, and so from being taken for a bare policy by the `From`
    // below: `ServiceBuilderExt::sentinel` could not tell the two apart.
    _not_a_policy: PhantomPinned,
}

impl<P> SentinelLayer<P> {
    pub fn new(policy: P) -> Self {
        Self::from_hooks(policy, Hooks::default())
    }
}

impl<P, J, Tag> SentinelLayer<P, Hooks<fn(&J) -> Tag>> {
    pub fn with_tag(policy: P, tag: fn(&J) -> Tag) -> Self {
        let (span, unsettled) = (CallerSpan, EventOnly);
        Self::from_hooks(
            policy,
            Hooks {
                tag,
                span,
                unsettled,
            },
        )
    }
}

impl<P, H> SentinelLayer<P, H> {
    fn from_hooks(policy: P, hooks: H) -> Self {
        let ladder = Ladder {
            grace: Duration::ZERO,
            stop_wait: Duration::from_secs(5),
        };
        let settings = Settings {
            timeout: Some(Duration::from_secs(30)),
            ladder,
            settle_timeout: Duration::from_secs(30),
            on_drop: OnDrop::Abort,
            shutdown: None,
            max_abandoned: None,
        };
        Self {
            policy,
            settings,
            runtime: None,
            hooks,
            _not_a_policy: PhantomPinned,
        }
    }

    pub fn timeout(mut self, limit: Duration) -> Self {
        self.settings.timeout = Some(limit);
        self
    }

    pub fn no_timeout(mut self) -> Self {
        self.settings.timeout = None;
        self
    }

    pub fn grace(mut self, grace: Duration) -> Self {
        self.settings.ladder.grace = grace;
        self
    }

    pub fn stop_wait(mut self, wait: Duration) -> Self {
        self.settings.ladder.stop_wait = wait;
        self
    }

    pub fn settle_timeout(mut self, limit: Duration) -> Self {
        self.settings.settle_timeout = limit;
        self
    }

    pub fn on_drop(mut self, on_drop: OnDrop) -> Self {
        self.settings.on_drop = on_drop;
        self
    }

    pub fn runtime(mut self, runtime: Handle) -> Self {
        self.runtime = Some(runtime);
        self
    }

    pub fn shutdown(mut self, token: CancellationToken) -> Self {
        self.settings.shutdown = Some(token);
        self
    }

    #[track_caller]
    pub fn max_abandoned(mut self, max: usize) -> Self {
        assert!(max > 0, "`max_abandoned(0)` would never let a job in");
        self.settings.max_abandoned = Some(max);
        self
    }

    fn map_hooks<I>(self, map: impl FnOnce(H) -> I) -> SentinelLayer<P, I> {
        SentinelLayer {
            policy: self.policy,
            settings: self.settings,
            runtime: self.runtime,
            hooks: map(self.hooks),
            _not_a_policy: PhantomPinned,
        }
    }
}

impl<P, G, M, U> SentinelLayer<P, Hooks<G, M, U>> {
    pub fn make_span<Tag>(
        self,
        span: fn(&Tag) -> Span,
    ) -> SentinelLayer<P, Hooks<G, fn(&Tag) -> Span, U>> {
        self.map_hooks(|Hooks { tag, unsettled, .. }| Hooks {
            tag,
            span,
            unsettled,
        })
    }

    pub fn on_unsettled<E, R, F>(self, unsettled: F) -> SentinelLayer<P, Hooks<G, M, F>>
    where
        F: Fn(SentinelError<E, R>),
    {
        self.map_hooks(|Hooks { tag, span, .. }| Hooks {
            tag,
            span,
            unsettled,
        })
    }
}

/// A bare policy is a layer with every default.
impl<P: Unpin> From<P> for SentinelLayer<P> {
    fn from(policy: P) -> Self {
        Self::new(policy)
    }
}

impl<S, P: Clone, H: Clone> Layer<S> for SentinelLayer<P, H> {
    type Service = Sentinel<S, P, H>;

    fn layer(&self, service: S) -> Self::Service {
        let max_abandoned = self.settings.max_abandoned;
        Sentinel {
            service,
            policy: self.policy.clone(),
            shared: Arc::new(Shared {
                base: Base {
                    settings: self.settings.clone(),
                    home: Home::new(self.runtime.clone()),
                    abandoned: max_abandoned.map(|max| Arc::new(Abandoned::new(max))),
                },
                hooks: self.hooks.clone(),
            }),
        }
    }
}

impl<P: Clone, H: Clone> Clone for SentinelLayer<P, H> {
    fn clone(&self) -> Self {
        Self {
            policy: self.policy.clone(),
            settings: self.settings.clone(),
            runtime: self.runtime.clone(),
            hooks: self.hooks.clone(),
            _not_a_policy: PhantomPinned,
        }
    }
}

impl<P: fmt::Debug, H> fmt::Debug for SentinelLayer<P, H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SentinelLayer")
            .field("policy", &self.policy)
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

/// Adds [`sentinel`](ServiceBuilderExt::sentinel) to [`tower::ServiceBuilder`].
pub trait ServiceBuilderExt<L> {
    /// Supervises each call; see [`SentinelLayer`]. A bare policy stands for
    /// [`SentinelLayer::new`]`(policy)`.
    fn sentinel<P, H>(
        self,
        layer: impl Into<SentinelLayer<P, H>>,
    ) -> ServiceBuilder<Stack<SentinelLayer<P, H>, L>>;
}

impl<L> ServiceBuilderExt<L> for ServiceBuilder<L> {
    fn sentinel<P, H>(
        self,
        layer: impl Into<SentinelLayer<P, H>>,
    ) -> ServiceBuilder<Stack<SentinelLayer<P, H>, L>> {
        self.layer(layer.into())
    }
}

// === impl Sentinel ===

pub struct Sentinel<S, P, H = Hooks> {
    service: S,
    policy: P,
    shared: Arc<Shared<H>>,
}

impl<S, P, H> Sentinel<S, P, H> {
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
        if let Some(abandoned) = &self.shared.base.abandoned {
            ready!(abandoned.poll_ready(cx));
        }
        match catch(|| self.service.poll_ready(cx)) {
            Ok(ready) => ready.map_err(SentinelError::Unready),
            Err(panic) => Poll::Ready(Err(SentinelError::UnreadyPanicked(panic))),
        }
    }

    #[track_caller]
    fn call(&mut self, job: J) -> Self::Future {
        let started = Instant::now();
        let Shared { base, hooks } = &*self.shared;
        let Base { settings, home, .. } = base;
        home.arrive();

        // All that is the user's and may panic comes before the spawn.
        let tag = hooks.tag.tag(&job);
        let limit = match hooks.tag.time_limit(&job) {
            TimeLimit::Inherit => settings.timeout,
            TimeLimit::Never => None,
            TimeLimit::After(limit) => Some(limit),
        };
        let due = limit.and_then(|limit| started.checked_add(limit));
        let span = hooks.span.make_span(&tag);
        let policy = self.policy.clone();
        let clone = self.service.clone();
        // The instance that is ready is the one to call.
        let service = mem::replace(&mut self.service, clone);

        let shutdown = settings.shutdown.as_ref();
        // Before the spawn as well: it panics if the runtime has no timers.
        let clock = home.clock(due);
        let isolated = Isolated::spawn(home, &span, (service, job), started, due, shutdown);
        let supervision = Supervision {
            stage: Stage::Running {
                isolated,
                answerable: Some((tag, policy)),
            },
            span,
            origin: Arc::clone(&self.shared) as _,
        };
        ResponseFuture {
            clock,
            supervision: Some(supervision),
        }
    }
}

impl<S: Clone, P: Clone, H> Clone for Sentinel<S, P, H> {
    fn clone(&self) -> Self {
        Self {
            service: self.service.clone(),
            policy: self.policy.clone(),
            shared: Arc::clone(&self.shared),
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

// === impl ResponseFuture ===

pin_project! {
    /// The future of a [`Sentinel`]: resolves when the job's outcome is settled.
    #[must_use = "a response future that is never polled has no time limit"]
    pub struct ResponseFuture<P, F, Tag, T, E> {
        #[pin]
        clock: Clock,
        // `None` once the future has resolved.
        supervision: Option<Supervision<P, F, Tag, T, E>>,
    }

    impl<P, F, Tag, T, E> PinnedDrop for ResponseFuture<P, F, Tag, T, E> {
        fn drop(this: Pin<&mut Self>) {
            if let Some(supervision) = this.project().supervision.take() {
                supervision.hand_over();
            }
        }
    }
}

impl<P, F, Tag, T, E> Future for ResponseFuture<P, F, Tag, T, E>
where
    P: Service<Report<Tag, T, E>, Future = F>,
    F: Future<Output = Result<P::Response, P::Error>>,
{
    type Output = Result<P::Response, SentinelError<E, P::Error>>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let supervision = this.supervision.as_mut();
        let supervision = supervision.expect("`ResponseFuture` polled after completion");
        let result = ready!(supervision.poll(this.clock, cx));
        *this.supervision = None;
        Poll::Ready(result)
    }
}

impl<P, F, Tag, T, E> fmt::Debug for ResponseFuture<P, F, Tag, T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}
