//! [`Step`]: the result of one step of the broker, and the foreign code to run after its lock.

use crate::{
    outcome::{drop_quietly, guard},
    waiters::Waiter,
};

/// Result of one step, with the wakers to wake and the payload to drop once the lock is released.
#[derive(Debug)]
#[must_use = "the wakers must be woken"]
pub(super) struct Step<T, P> {
    pub(super) output: T,
    pub(super) wakers: Wakers,
    /// A payload that is no longer needed.
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
        drop_quietly(self.garbage);
        self.output
    }
}

/// List of wakers, without an allocation for the first.
#[derive(Debug, Default)]
pub(super) struct Wakers {
    first: Option<Waiter>,
    others: Vec<Waiter>,
}

impl Wakers {
    pub(super) fn push(&mut self, waker: Waiter) {
        match &self.first {
            None => self.first = Some(waker),
            Some(_) => self.others.push(waker),
        }
    }

    /// Wakes all of them; the lock must not be held.
    pub(super) fn wake(self) {
        // Most settlements wake nobody, and a chain of both costs each of them 6 % more.
        let Some(first) = self.first else {
            return;
        };
        guard(|| first.wake());
        self.others.iter().for_each(|it| guard(|| it.wake()));
    }
}
