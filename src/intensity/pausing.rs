//! [`observe`], which finds out whether an intensity layer pauses a service that is polled for readiness.
//!
//! A consumer knows its service only by the `Service` trait, with middleware around the layer.

use std::cell::Cell;

thread_local! {
    static IS_PAUSED: Cell<bool> = const { Cell::new(false) };
}

/// Returns the result of `ask`, and whether it polled an intensity layer in a pause.
pub(crate) fn observe<R>(ask: impl FnOnce() -> R) -> (R, bool) {
    IS_PAUSED.set(false);
    let answer = ask();
    (answer, IS_PAUSED.take())
}

/// Notes that a layer lets no job through.
pub(super) fn note() {
    IS_PAUSED.set(true);
}
