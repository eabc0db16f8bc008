//! [`State`] of a consumer, as its handles see it.

use std::sync::Arc;

use tokio::time::Instant;

/// State of a consumer.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum State {
    /// It is not awaited yet.
    Idle,
    /// It has no subscription, and tries to make one, or pauses before it tries again.
    Connecting {
        /// Number of the attempt, from 1 on.
        attempt: u32,
        /// Time of the start, or of the end of the last session.
        since: Instant,
        /// Cause of the end of the last session, or of the last failed attempt.
        error: Option<Arc<str>>,
    },
    /// It takes jobs.
    Consuming(Progress),
    /// It takes no job before another one is settled: all places are taken.
    Saturated(Progress),
    /// It has a subscription and takes no jobs.
    Paused {
        /// Who paused it.
        by: Pauser,
        /// Its counts.
        progress: Progress,
    },
    /// It takes no more jobs from this subscription, and lets those that run end.
    Draining(Progress),
    /// Its future has ended, or was dropped.
    Ended,
}

/// Reason for a pause.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Pauser {
    /// [`Watch::pause`](crate::consumer::Watch::pause).
    Operator,
    /// The service is not ready, though no job runs.
    Service,
    /// An [`IntensityLayer`](crate::IntensityLayer) of the service, since most jobs have failed.
    Intensity,
    /// The sentinel, since as many jobs as its [`max_abandoned`](crate::SentinelLayer::max_abandoned) are stuck.
    StuckJobs,
}

/// Counts of a consumer, of all its sessions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// Number of jobs that were taken and have not ended.
    pub running: usize,
    /// Number of jobs that may be taken beside them; `None` if the consumer does not limit them, as without its [own
    /// sentinel](crate::Consumer::sentinel).
    pub free: Option<usize>,
    /// Number of jobs that were taken since the start.
    pub called: u64,
    /// Number of jobs that have ended since the start.
    pub ended: u64,
    /// Time at which a job was last taken.
    pub last_delivery: Option<Instant>,
    /// Time at which a job last ended: it was settled, or its settlement failed.
    pub last_settled: Option<Instant>,
    /// Number of times that the [watchdog](crate::Consumer::watchdog) found the consumer stalled.
    pub stalls: u64,
}
