//! Time limits of jobs that have a lease.

use std::{
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use crate::outcome::{OutcomeKind, guard};

/// Time limit of a job, unless another is set.
pub(crate) const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);

/// Returns the default time limit of a job with `lease`. A third is left to stop the job and to settle it.
pub(crate) fn default_timeout(lease: Option<Duration>) -> Duration {
    lease.map_or(DEFAULT_TIMEOUT, |lease| DEFAULT_TIMEOUT.min(lease / 3 * 2))
}

/// First job of a layer that may outlive its lease. There is one warning, and not before a job has shown that
/// nothing keeps it alive.
#[derive(Debug, Default)]
pub(crate) struct Outliving {
    first: OnceLock<Times>,
    told: AtomicBool,
}

#[derive(Debug)]
struct Times {
    limit: Option<Duration>,
    grace: Duration,
    lease: Duration,
}

impl Outliving {
    /// Notes a job that may run until the end of its `lease`.
    pub(crate) fn note(&self, limit: Option<Duration>, grace: Duration, lease: Duration) {
        if limit.is_none_or(|limit| limit.saturating_add(grace) >= lease) {
            self.first.get_or_init(|| Times {
                limit,
                grace,
                lease,
            });
        }
    }

    /// Warns, unless the job, which has ended with `outcome`, was kept alive.
    #[inline]
    pub(crate) fn tell(&self, outcome: OutcomeKind, is_kept_alive: impl FnOnce() -> bool) {
        let Some(times) = self.first.get() else {
            return;
        };
        // With another outcome, the job may have ended before its keep-alive could begin.
        let is_telling = matches!(outcome, OutcomeKind::Completed | OutcomeKind::TimedOut);
        if !is_telling || self.told.load(Ordering::Relaxed) || is_kept_alive() {
            return;
        }
        if !self.told.swap(true, Ordering::Relaxed) {
            times.tell();
        }
    }
}

impl Times {
    #[cold]
    fn tell(&self) {
        let Self {
            limit,
            grace,
            lease,
        } = self;
        let limit = limit.map(tracing::field::debug);
        guard(|| {
            tracing::warn!(
                limit,
                ?grace,
                ?lease,
                "a job may be settled after its lease, and then runs again: \
                 set a shorter time limit, or add a keep-alive"
            );
        });
    }
}
