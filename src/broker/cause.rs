//! Causes of errors, in the text of those that are printed with `{:#}`.

use std::{error::Error, fmt};

/// Writes the cause of `error` behind its own message, if it is asked for by `{:#}`.
///
/// A client's error prints the causes of its own.
pub(super) fn write_cause(f: &mut fmt::Formatter<'_>, error: &dyn Error) -> fmt::Result {
    match error.source() {
        Some(cause) if f.alternate() => write!(f, ": {cause}"),
        _ => Ok(()),
    }
}
