//! [`Step`]: the result of one step of the broker, and the foreign code to run after its lock.

use std::task::Waker;

/// Result of one step, with the wakers to wake and the payload to drop once the lock is released.
#[derive(Debug)]
#[must_use = "the wakers must be woken"]
pub(super) struct Step<T, P> {
    pub(super) output: T,
    pub(super) wakers: Wakers,
    /// A payload that is no longer needed; its drop may panic.
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

    /// Wakes the wakers, drops the garbage, and returns the output; the lock must not be held.
    pub(super) fn finish(self) -> T {
        self.wakers.wake();
        drop(self.garbage);
        self.output
    }
}

/// List of wakers, without an allocation for the first.
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

    /// Wakes all of them; the lock must not be held.
    pub(super) fn wake(self) {
        let Some(first) = self.first else {
            return;
        };
        first.wake();
        self.others.into_iter().for_each(Waker::wake);
    }
}
