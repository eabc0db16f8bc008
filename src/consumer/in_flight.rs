//! Calls that a session waits for.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll, Waker, ready},
};

use futures_util::stream::{FuturesUnordered, Stream};
use pin_project_lite::pin_project;
use tokio::task::coop::has_budget_remaining;

use crate::outcome::{Panic, catch};

/// All calls that have not ended. One task polls them, each only after it was woken.
pub(super) type InFlight<F> = FuturesUnordered<Call<F>>;

pub(super) fn poll_next<F: Future>(
    calls: &mut InFlight<F>,
    cx: &mut Context<'_>,
) -> Poll<Option<Result<F::Output, Panic>>> {
    Pin::new(calls).poll_next(cx)
}

/// Wakes each call, so that it is polled again.
pub(super) fn wake_all<F>(calls: &mut InFlight<F>) {
    for call in Pin::new(calls).iter_pin_mut() {
        if let Some(waker) = call.project().waker.take() {
            waker.wake();
        }
    }
}

pin_project! {
    /// One call. It catches its own panics, also those of its destructor.
    pub(super) struct Call<F> {
        // `None` once it has ended.
        #[pin]
        future: Option<F>,
        // The waker of the first poll, which is the same in every poll: a set has one for each call.
        waker: Option<Waker>,
    }

    impl<F> PinnedDrop for Call<F> {
        fn drop(this: Pin<&mut Self>) {
            this.end();
        }
    }
}

impl<F> Call<F> {
    pub(super) fn new(future: F) -> Self {
        Self {
            future: Some(future),
            waker: None,
        }
    }

    fn end(self: Pin<&mut Self>) {
        let mut future = self.project().future;
        if future.is_some() {
            drop(catch(|| future.set(None)));
        }
    }
}

impl<F: Future> Future for Call<F> {
    type Output = Result<F::Output, Panic>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        // A task that has used up its budget gets nothing from tokio, and a set polls all calls that are woken. So of
        // n calls that are due at once, each would be polled n / 128 times. A call that wakes itself lets the set
        // yield.
        if !has_budget_remaining() {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        // Invariant: a call is not polled after its end.
        let this = self.as_mut().project();
        this.waker.get_or_insert_with(|| cx.waker().clone());
        let future = this.future.as_pin_mut();
        let future = future.expect("a call ends once");
        let output = match catch(|| future.poll(cx)) {
            Ok(poll) => Ok(ready!(poll)),
            Err(panic) => Err(panic),
        };
        self.end();
        Poll::Ready(output)
    }
}
