//! [`Detail`] of an error, without its type.

use std::{fmt, time::Duration};

use super::Panic;

/// What an error prints after its first words.
///
/// It has no type parameters, so that the printing is compiled once, and not for each handler.
pub(crate) enum Detail<'a> {
    None,
    Error(&'a dyn fmt::Display),
    Panic(&'a Panic),
    Limit(Duration),
}

impl Detail<'_> {
    /// Prints `what` has happened, and the detail.
    pub(crate) fn print_after(self, what: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(what)?;
        match self {
            Detail::None => Ok(()),
            Detail::Error(error) => write!(f, ": {error:#}"),
            Detail::Panic(panic) => write!(f, ": {}", panic.message()),
            Detail::Limit(limit) => write!(f, " {limit:?}"),
        }
    }
}
