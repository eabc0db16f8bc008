//! [`Waiters`], the clones of a service that wait for the same event.

use std::sync::{Arc, Weak};

use futures_util::task::AtomicWaker;

use crate::outcome::guard;

/// Waker of a clone of a service that waits: one for each clone, and none for a clone that is dropped.
///
/// It is registered before the lock is taken under which its owner looks for the event: no event is missed
/// then, and no foreign waker is cloned or dropped under the lock.
pub(crate) type Waiter = Arc<AtomicWaker>;

/// Clones of a service that wait; each is entered once.
#[derive(Debug, Default)]
pub(crate) struct Waiters(Vec<Weak<AtomicWaker>>);

impl Waiters {
    /// Enters a clone, and forgets those that were dropped.
    pub(crate) fn add(&mut self, waiter: &Waiter) {
        self.0
            .retain(|it| it.strong_count() > 0 && it.as_ptr() != Arc::as_ptr(waiter));
        self.0.push(Arc::downgrade(waiter));
    }

    /// Wakes them. Not under a lock, as wakers are foreign code.
    pub(crate) fn wake(self) {
        let waiting = self.0.iter().filter_map(Weak::upgrade);
        waiting.for_each(|waiter| guard(|| waiter.wake()));
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}
