//! What a job leaves behind, a value, an error or the payload of a panic: when it is dropped, and where.

use tokio::runtime::Handle;

use crate::outcome::{Outcome, Quiet, drop_quietly, guard};

/// An outcome that is kept until its delivery is settled.
///
/// A destructor in it may block, which is not to delay the settlement, or panic, which is not to
/// cost it.
pub(crate) struct Remains<O> {
    // `None` if it has no destructor, and once it is dropped.
    outcome: Option<O>,
    elsewhere: Option<Box<Elsewhere<O>>>,
}

impl<T, E> Remains<Outcome<T, E>> {
    #[inline]
    pub(crate) fn new(
        outcome: Outcome<T, E>,
        elsewhere: Option<Box<Elsewhere<Outcome<T, E>>>>,
    ) -> Self {
        Self {
            outcome: outcome.has_destructor().then_some(outcome),
            elsewhere,
        }
    }
}

impl<O> Drop for Remains<O> {
    #[inline]
    fn drop(&mut self) {
        let Some(outcome) = self.outcome.take() else {
            return;
        };
        match self.elsewhere.take() {
            Some(elsewhere) => guard(|| (elsewhere.drop_on)(&elsewhere.runtime, outcome)),
            None => drop_quietly(outcome),
        }
    }
}

/// The runtime that jobs have of their own, where a destructor delays no supervision.
pub(crate) struct Elsewhere<O> {
    runtime: Handle,
    // The bounds of a spawn hold where this is made.
    drop_on: fn(&Handle, O),
}

impl<O: Send + 'static> Elsewhere<O> {
    pub(crate) fn new(runtime: Handle) -> Self {
        Self {
            runtime,
            drop_on: |runtime, outcome| {
                let outcome = Quiet::new(outcome);
                // A runtime that has ended drops it here.
                drop(runtime.spawn(async move { drop(outcome) }));
            },
        }
    }
}
