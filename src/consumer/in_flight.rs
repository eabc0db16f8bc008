//! The calls that a session waits for.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
};

use futures_util::stream::{FuturesUnordered, Stream};
use pin_project_lite::pin_project;

use crate::outcome::{Panic, catch};

/// All calls that have not ended; polled by one task, each only when it was woken.
pub(super) type InFlight<F> = FuturesUnordered<Call<F>>;

pub(super) fn poll_next<F: Future>(
    calls: &mut InFlight<F>,
    cx: &mut Context<'_>,
) -> Poll<Option<Result<F::Output, Panic>>> {
    Pin::new(calls).poll_next(cx)
}

pin_project! {
    /// One call. Its panics are its own, those of its destructor too.
    pub(super) struct Call<F> {
        // `None` once it has ended.
        #[pin]
        future: Option<F>,
    }

    impl<F> PinnedDrop for Call<F> {
        fn drop(this: Pin<&mut Self>) {
            this.end();
        }
    }
}

impl<F> Call<F> {
    pub(super) fn new(future: F) -> Self {
        let future = Some(future);
        Self { future }
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
        // Invariant: a call is not polled after its end.
        let future = self.as_mut().project().future.as_pin_mut();
        let future = future.expect("a call ends once");
        let output = match catch(|| future.poll(cx)) {
            Ok(poll) => Ok(ready!(poll)),
            Err(panic) => Err(panic),
        };
        self.end();
        Poll::Ready(output)
    }
}
