//! [`Walk`], the settings that a redrive and a purge have in common.

use super::{
    filter::Filter,
    pass::{Pass, Taken},
};

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

    /// Takes the next letters, at most so many, after so many that match; `None` at the end.
    pub(super) async fn next<P: Pass>(
        &self,
        pass: &mut P,
        most: usize,
        done: u64,
    ) -> Result<Option<Vec<Taken<P::Key>>>, P::Error> {
        let left = self.limit.saturating_sub(done);
        let left = usize::try_from(left).unwrap_or(usize::MAX);
        let taken = match self.batch.min(most).min(left) {
            0 => return Ok(None),
            batch => pass.next(batch).await?,
        };
        Ok((!taken.is_empty()).then_some(taken))
    }
}
