//! Calls that a session waits for.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll, Waker},
};

use futures_util::stream::{FuturesUnordered, Stream};
use pin_project_lite::pin_project;
use tokio::task::coop::has_budget_remaining;

use crate::outcome::{Panic, catch_dyn};

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
            drop(catch_dyn(&mut || future.set(None)));
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
        if this.waker.is_none() {
            *this.waker = Some(cx.waker().clone());
        }
        let mut slot = this.future;
        let mut output = None;
        // One `catch` for everything, since each one costs time on the path of every job.
        let caught = catch_dyn(&mut || {
            let Some(future) = slot.as_mut().as_pin_mut() else {
                return;
            };
            if let Poll::Ready(ready) = future.poll(cx) {
                output = Some(ready);
                slot.set(None);
            }
        });
        match (caught, output) {
            // A destructor that panics cannot undo an output.
            (_, Some(output)) => Poll::Ready(Ok(output)),
            (Ok(()), None) => Poll::Pending,
            (Err(panic), None) => {
                self.end();
                Poll::Ready(Err(panic))
            }
        }
    }
}
