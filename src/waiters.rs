//! [`Waiters`], which wait for the same event.

use std::sync::{Arc, Weak};

use futures_util::task::AtomicWaker;

use crate::outcome::guard;

/// Waker of one that waits, such as a clone of a service.
///
/// It is registered before the lock is taken under which its owner looks for the event: no event is missed
/// then, and no foreign waker is cloned or dropped under the lock.
pub(crate) type Waiter = Arc<AtomicWaker>;

/// Those that wait; each is entered once.
#[derive(Debug, Default)]
pub(crate) struct Waiters(Vec<Weak<AtomicWaker>>);

impl Waiters {
    /// Enters one, and forgets those that were dropped.
    pub(crate) fn add(&mut self, waiter: &Waiter) {
        self.0
            .retain(|it| it.strong_count() > 0 && it.as_ptr() != Arc::as_ptr(waiter));
        self.0.push(Arc::downgrade(waiter));
    }

    /// Takes those that were not dropped out of the list.
    pub(crate) fn drain(&mut self) -> impl Iterator<Item = Waiter> {
        self.0.drain(..).filter_map(|it| it.upgrade())
    }

    /// Wakes them. Not under a lock, as wakers are foreign code.
    pub(crate) fn wake(mut self) {
        self.drain().for_each(|waiter| guard(|| waiter.wake()));
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}
