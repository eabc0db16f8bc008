//! [`Remains`] of a job: its value, its error or the payload of its panic, and when and where that is
//! dropped.

use tokio::runtime::Handle;

use crate::outcome::{Outcome, Quiet, drop_quietly, guard};

/// An outcome that is kept until its delivery is settled.
///
/// A destructor in it may block, which must not delay the settlement, or panic, which must not prevent it.
pub(crate) struct Remains<O> {
    // `None` if it has no destructor, and once dropped.
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
            outcome: Some(outcome),
            elsewhere,
        }
    }

    #[inline]
    pub(crate) fn outcome(&self) -> &Outcome<T, E> {
        // Invariant: an outcome is not asked for once it is forgotten.
        self.outcome.as_ref().expect("an outcome is kept")
    }

    /// Forgets an outcome that has no destructor.
    #[inline]
    pub(crate) fn skim(&mut self) {
        if !self.outcome().has_destructor() {
            self.outcome = None;
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
            Some(elsewhere) => guard(|| (elsewhere.drop_on)(elsewhere, outcome)),
            None => drop_quietly(outcome),
        }
    }
}

/// The jobs' own runtime, where a destructor does not delay any supervision.
pub(crate) struct Elsewhere<O> {
    runtime: Handle,
    // Its box takes the outcome there, so that the task needs no other one and has no type parameters.
    outcome: Option<Quiet<O>>,
    // A function pointer, since the bounds of a spawn hold only where this is created.
    drop_on: fn(Box<Self>, O),
}

impl<O: Send + 'static> Elsewhere<O> {
    pub(crate) fn new(runtime: Handle) -> Self {
        Self {
            runtime,
            outcome: None,
            drop_on: Self::drop_on,
        }
    }

    fn drop_on(mut self: Box<Self>, outcome: O) {
        self.outcome = Some(Quiet::new(outcome));
        let runtime = self.runtime.clone();
        drop_on(&runtime, self);
    }
}

fn drop_on(runtime: &Handle, remains: Box<dyn Send>) {
    // If the runtime has ended, they are dropped here.
    drop(runtime.spawn(async move { drop(remains) }));
}
