//! [`observe`], which finds out whether a sentinel that is polled for readiness has a shutdown token.
//!
//! A consumer knows its service only by the `Service` trait, with middleware around the sentinel.

use std::cell::Cell;

thread_local! {
    /// `None` while nobody observes.
    static SEEN: Cell<Option<Seen>> = const { Cell::new(None) };
}

#[derive(Clone, Copy)]
enum Seen {
    NoSentinel,
    Deaf,
    Listening,
}

/// Returns the result of `ask`, and whether the sentinel that it polled has a token; `None` if it polled
/// none.
pub(crate) fn observe<R>(ask: impl FnOnce() -> R) -> (R, Option<bool>) {
    SEEN.set(Some(Seen::NoSentinel));
    let answer = ask();
    let listens = match SEEN.take() {
        None | Some(Seen::NoSentinel) => None,
        Some(Seen::Deaf) => Some(false),
        Some(Seen::Listening) => Some(true),
    };
    (answer, listens)
}

/// Notes that a sentinel is polled for readiness.
pub(super) fn note(listens: bool) {
    match (SEEN.get(), listens) {
        (None | Some(Seen::Listening), _) => {}
        (Some(_), true) => SEEN.set(Some(Seen::Listening)),
        (Some(_), false) => SEEN.set(Some(Seen::Deaf)),
    }
}
