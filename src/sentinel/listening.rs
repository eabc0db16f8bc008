//! [`observe`]: whether the sentinel that is asked for readiness listens to a shutdown token.
//!
//! A consumer knows its service by the trait alone, with middleware around the sentinel.

use std::cell::Cell;

thread_local! {
    /// None while nobody asks.
    static SEEN: Cell<Option<Seen>> = const { Cell::new(None) };
}

#[derive(Clone, Copy)]
enum Seen {
    NoSentinel,
    Deaf,
    Listening,
}

/// Returns besides whether a sentinel that `ask` asked listens to a token; `None` if it asked none.
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

/// Notes that a sentinel is asked.
pub(super) fn note(listens: bool) {
    match (SEEN.get(), listens) {
        (None | Some(Seen::Listening), _) => {}
        (Some(_), true) => SEEN.set(Some(Seen::Listening)),
        (Some(_), false) => SEEN.set(Some(Seen::Deaf)),
    }
}
