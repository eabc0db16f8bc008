//! [`Priority`] of a worker among those that share a priority group.

use async_nats::jetstream::consumer::pull::BatchConfig;

/// Priority that each request carries.
#[derive(Clone, Debug, Default)]
pub(super) struct Priority {
    pub(super) group: Option<String>,
    pub(super) min_pending: Option<usize>,
    pub(super) min_ack_pending: Option<usize>,
    /// Rank from 0, which is served first, to 9.
    pub(super) rank: Option<usize>,
}

impl Priority {
    /// Returns whether the worker helps only if others don't keep up.
    pub(super) fn overflows(&self) -> bool {
        self.min_pending.is_some() || self.min_ack_pending.is_some()
    }

    /// Returns a request of this worker, to be completed.
    pub(super) fn request(&self) -> BatchConfig {
        BatchConfig {
            min_pending: self.min_pending,
            min_ack_pending: self.min_ack_pending,
            group: self.group.clone(),
            priority: self.rank,
            ..BatchConfig::default()
        }
    }
}
