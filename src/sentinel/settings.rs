//! Settings of a sentinel.

use std::{fmt, sync::Arc, time::Duration};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{
    cancel::Limit,
    job::TimeLimit,
    outcome::guard,
    sentinel::{
        cause::Ladder,
        lease::{DEFAULT_TIMEOUT, Outliving, default_timeout},
        roll_call::RunningJob,
    },
    telemetry::metrics::Labels,
    time::deadline,
};

/// Fate of a job whose caller drops the response future.
///
/// Either way the job still has exactly one outcome, and the policy is called with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum OnDrop {
    /// The job is stopped, and is [`Cancelled`](crate::Outcome::Cancelled) with
    /// [`CancelReason::CallerDropped`](crate::outcome::CancelReason::CallerDropped) unless it
    /// returns while it is being stopped.
    #[default]
    Abort,
    /// The job goes on under its time limit, in the background.
    Detach,
}

#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// `Inherit` if none is set.
    pub(crate) timeout: TimeLimit,
    pub(crate) ladder: Ladder,
    /// Shared by all clones of a layer.
    pub(crate) outliving: Arc<Outliving>,
    pub(crate) settle_timeout: Duration,
    pub(crate) on_drop: OnDrop,
    pub(crate) shutdown: Option<CancellationToken>,
    /// `true` if the caller polls its calls once `shutdown` is cancelled. Then no job waits for the token
    /// itself, which would cost five locks of the token and an allocation.
    pub(crate) is_told_by_polls: bool,
    pub(crate) max_abandoned: Option<usize>,
    pub(crate) on_stuck: OnStuck,
    pub(crate) labels: Labels,
}

impl Settings {
    /// Returns the limit of a job that is called at `started`, and notes whether it may outlive its `lease`.
    pub(crate) fn limit(&self, started: Instant, own: TimeLimit, lease: Option<Duration>) -> Limit {
        let limit = match own {
            TimeLimit::Inherit => self.timeout,
            own => own,
        };
        let is_default = limit == TimeLimit::Inherit;
        let limit = match limit {
            TimeLimit::Inherit => Some(default_timeout(lease)),
            TimeLimit::Never => None,
            TimeLimit::After(limit) => Some(limit),
        };
        if let Some(lease) = lease {
            self.outliving.note(limit, self.ladder.grace, lease);
        }
        let due = limit.and_then(|limit| deadline(started, limit));
        let kept_alive = match is_default && lease.is_some() {
            true => deadline(started, DEFAULT_TIMEOUT),
            false => due,
        };
        Limit { due, kept_alive }
    }

    /// Returns `true` once `shutdown` is cancelled, if the caller announces that by a poll.
    pub(crate) fn is_shut_down(&self) -> bool {
        let shutdown = self.shutdown.as_ref();
        self.is_told_by_polls && shutdown.is_some_and(CancellationToken::is_cancelled)
    }
}

/// Callback for a job that still runs after all steps that stop a job.
#[derive(Clone, Default)]
pub(crate) struct OnStuck(pub(crate) Option<Arc<dyn Fn(&RunningJob) + Send + Sync>>);

impl OnStuck {
    /// Reports the job, in its span.
    pub(crate) fn tell(&self, job: &RunningJob) {
        guard(|| {
            tracing::error!(
                task.id = %job.id,
                messaging.message.id = job.message_id.as_deref(),
                elapsed = ?job.since.elapsed(),
                blocking = job.is_blocking,
                "job stuck: it still runs after it was told to stop and aborted"
            );
        });
        if let Some(on_stuck) = &self.0 {
            guard(|| on_stuck(job));
        }
    }
}

impl fmt::Debug for OnStuck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("OnStuck").field(&self.0.is_some()).finish()
    }
}
