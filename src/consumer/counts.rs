//! [`Counts`] of a consumer, by the readiness of its tasks.

use tokio::time::Instant;

use super::state::Progress;

/// Counts of a consumer.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) progress: Progress,
    /// Number of the present session. Another one may drain beside it.
    pub(super) session: u64,
    pub(super) tasks: usize,
    /// Number of those that have joined.
    pub(super) joined: usize,
    pub(super) limit: Option<usize>,
    /// Number of running jobs of the present session.
    pub(super) here: usize,
    /// Number of its tasks of each [`Readiness`].
    pub(super) tasks_by: [usize; 5],
    /// Number of changes of that since the start.
    pub(super) turns: u64,
}

/// Readiness of a task for a job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Readiness {
    #[default]
    Ready,
    /// All of its places are taken, or an operator pauses it.
    Full,
    /// Its service is not ready.
    Unready,
    /// An intensity layer pauses its service.
    Throttled,
    /// Its sentinel waits for abandoned jobs.
    Exhausted,
}

/// Part of the state that decides whether a consumer waits for its broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct View {
    pub(super) standing: Standing,
    /// Number of running jobs of the present session.
    pub(super) running: usize,
    pub(super) free: Option<usize>,
    pub(super) last_delivery: Option<Instant>,
    pub(super) turn: Turn,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// A task waits for the next job.
    Takes,
    /// No job runs, and the service of each task is not ready, of its own.
    Unready,
    /// It is busy or paused.
    Other,
}

/// Counts that are equal at two times if no job was taken, and no task has changed its readiness, between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Turn {
    pub(super) called: u64,
    pub(super) changes: u64,
}

impl Counts {
    pub(super) fn number_of(&self, readiness: Readiness) -> usize {
        self.tasks_by[readiness as usize]
    }

    /// Returns whether each task waits for abandoned jobs.
    pub(super) fn is_exhausted(&self) -> bool {
        self.number_of(Readiness::Exhausted) == self.tasks
    }

    /// Returns the number of tasks with room for a job and a service that is not ready.
    pub(super) fn unready(&self) -> usize {
        [
            Readiness::Unready,
            Readiness::Throttled,
            Readiness::Exhausted,
        ]
        .map(|readiness| self.number_of(readiness))
        .iter()
        .sum()
    }
}
