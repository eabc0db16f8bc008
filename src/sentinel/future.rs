//! [`ResponseFuture`]: one supervised call, as its caller sees it.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
};

use pin_project_lite::pin_project;
use tower_service::Service;

use crate::{
    outcome::guard_dyn,
    policy::Report,
    sentinel::{error::SentinelError, roll_call, runtimes::Clock, supervision::Supervision},
};

pin_project! {
    /// Future of a [`Sentinel`], which resolves to the response of the policy.
    ///
    /// # Errors
    ///
    /// Resolves to a [`SentinelError`] if the policy fails, panics or takes too long.
    ///
    /// # Panics
    ///
    /// Panics if it is polled after it resolved.
    ///
    /// # Cancel safety
    ///
    /// It is safe to drop it at any point: the job is ended according to [`OnDrop`], and is still settled.
    #[must_use = "a response future that is never polled has no time limit"]
    pub struct ResponseFuture<P, F, Tag, T, E> {
        #[pin]
        pub(super) clock: Clock,
        // `None` once the future has resolved.
        pub(super) supervision: Option<Supervision<P, F, Tag, T, E>>,
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
        if roll_call::is_on() {
            supervision.answer();
        }
        let result = ready!(supervision.poll(this.clock, cx));
        guard_dyn(&mut || *this.supervision = None);
        Poll::Ready(result)
    }
}

impl<P, F, Tag, T, E> fmt::Debug for ResponseFuture<P, F, Tag, T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}
