//! [`observe`], which finds out why a service that is polled for readiness is not ready.
//!
//! A consumer knows its service only by the `Service` trait, with middleware around the layer that is not ready.

use std::cell::Cell;

thread_local! {
    static CAUSE: Cell<Option<Cause>> = const { Cell::new(None) };
}

/// Cause for which a layer of this crate is not ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// An intensity layer lets no job through.
    Intensity,
    /// As many abandoned jobs as a sentinel allows still run.
    Abandoned,
}

/// Returns the result of `ask`, and the cause if it polled a layer that is not ready.
pub(crate) fn observe<R>(ask: impl FnOnce() -> R) -> (R, Option<Cause>) {
    CAUSE.set(None);
    let answer = ask();
    (answer, CAUSE.take())
}

/// Notes that a layer is not ready.
pub(crate) fn note(cause: Cause) {
    CAUSE.set(Some(cause));
}
