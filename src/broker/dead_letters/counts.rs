//! [`Tally`] of a run, and [`Interrupted`] ones.

use std::{error::Error, fmt};

/// Numbers of dead letters in a [`Redrive`](super::Redrive) or a [`Purge`](super::Purge), so far or at its end.
///
/// In a dry run the letters that would be moved or deleted count as such.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Tally {
    /// Those that were there when the run began.
    pub total: u64,
    /// Those that were looked at.
    pub seen: u64,
    /// Those that were moved back.
    pub moved: u64,
    /// Those that were deleted by a purge.
    pub deleted: u64,
    /// Those that do not match the filter.
    pub skipped: u64,
    /// Those that match, and were moved back too often before ([`max_redrives`](super::Redrive::max_redrives)).
    pub refused: u64,
    /// Those that match, and whose destination is not known or does not exist.
    pub unroutable: u64,
    /// Those that somebody else took meanwhile.
    pub gone: u64,
}

impl Tally {
    /// Returns the number of letters that were there at the beginning and still are, as far as this run knows.
    pub fn left(&self) -> u64 {
        self.total
            .saturating_sub(self.moved + self.deleted + self.gone)
    }
}

/// Error of a run that did not come to its end, with its numbers so far.
///
/// No letter is lost by it: the run may be repeated.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Interrupted<E> {
    /// The numbers so far. Letters of which it is not known whether they were moved are not counted.
    pub tally: Tally,
    /// The broker's error.
    pub error: E,
}

impl<E> fmt::Display for Interrupted<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Tally {
            total,
            seen,
            moved,
            deleted,
            ..
        } = self.tally;
        write!(
            f,
            "the run ended early: {seen} of {total} dead letters seen, {moved} moved, {deleted} deleted"
        )
    }
}

impl<E: Error + 'static> Error for Interrupted<E> {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&self.error)
    }
}
