//! What a step of the broker leaves to be done when its lock is released.

use std::task::Waker;

/// What is to be done when the lock is released.
#[derive(Debug)]
#[must_use = "wakers are to be woken"]
pub(super) struct Step<T, P> {
    pub(super) output: T,
    pub(super) wakers: Wakers,
    /// What is no longer needed, and may panic when it is dropped.
    pub(super) garbage: Option<P>,
}

impl<T, P> Step<T, P> {
    pub(super) fn new(output: T, wakers: Wakers) -> Self {
        Self {
            output,
            wakers,
            garbage: None,
        }
    }

    /// Wakes who waits; the lock must not be held.
    pub(super) fn finish(self) -> T {
        self.wakers.wake();
        drop(self.garbage);
        self.output
    }
}

/// Wakers, without an allocation for the first.
#[derive(Debug, Default)]
pub(super) struct Wakers {
    first: Option<Waker>,
    others: Vec<Waker>,
}

impl Wakers {
    pub(super) fn push(&mut self, waker: Waker) {
        match &self.first {
            None => self.first = Some(waker),
            Some(_) => self.others.push(waker),
        }
    }

    /// Wakes them; the lock must not be held.
    pub(super) fn wake(self) {
        self.first
            .into_iter()
            .chain(self.others)
            .for_each(Waker::wake);
    }
}
