//! Causes of errors, for errors that are printed with `{:#}`.

use std::{error::Error, fmt};

/// Writes the cause of `error` behind its own message, if the format is `{:#}`.
///
/// The error of a client prints its causes itself.
pub(super) fn write_cause(f: &mut fmt::Formatter<'_>, error: &dyn Error) -> fmt::Result {
    match error.source() {
        Some(cause) if f.alternate() => write!(f, ": {cause}"),
        _ => Ok(()),
    }
}
