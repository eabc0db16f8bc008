//! [`Settlement`], the future that settles a delivery on its server.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use crate::settle::Unsettled;

/// Future that settles a delivery on its server.
///
/// Each adapter has a name for its own. What it means to drop one is documented there.
#[must_use = "a delivery is not settled unless this is polled"]
pub struct Settlement<Tag, E> {
    future: Pin<Box<dyn Future<Output = Result<(), Unsettled<Tag, E>>> + Send>>,
}

impl<Tag, E> Settlement<Tag, E> {
    pub(super) fn new(
        future: impl Future<Output = Result<(), Unsettled<Tag, E>>> + Send + 'static,
    ) -> Self {
        let future = Box::pin(future);
        Self { future }
    }
}

impl<Tag, E> Future for Settlement<Tag, E> {
    type Output = Result<(), Unsettled<Tag, E>>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.future.as_mut().poll(cx)
    }
}

impl<Tag, E> fmt::Debug for Settlement<Tag, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settlement").finish_non_exhaustive()
    }
}
