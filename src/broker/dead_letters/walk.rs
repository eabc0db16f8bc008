//! [`Walk`], the settings that a redrive and a purge have in common.

use super::filter::Filter;

/// Settings of a run.
#[derive(Clone, Debug)]
pub(super) struct Walk {
    pub(super) filter: Filter,
    pub(super) batch: usize,
    pub(super) limit: u64,
    pub(super) is_dry: bool,
}

impl Walk {
    pub(super) fn new(filter: Filter) -> Self {
        Self {
            filter,
            batch: 100,
            limit: u64::MAX,
            is_dry: false,
        }
    }

    /// Returns the number of letters to take next, after so many that match; zero at the end.
    pub(super) fn batch(&self, most: usize, done: u64) -> usize {
        let left = self.limit.saturating_sub(done);
        let left = usize::try_from(left).unwrap_or(usize::MAX);
        self.batch.min(most).min(left)
    }
}
