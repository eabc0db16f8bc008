//! [`Instruments`] of a sentinel.

use std::{
    sync::{Arc, OnceLock},
    time::{Duration, SystemTime},
};

use ::metrics::{Counter, Gauge, Histogram, Label, counter, gauge, histogram};

use super::{
    describe::{
        ABANDONED, CONSUMED, OUTCOMES, PROCESS_DURATION, QUEUE_DURATION, RUNNING, UNSETTLED,
    },
    in_flight::InFlightGauge,
    labels::{ERROR_TYPE, Labels, OPERATION, of_delivery, with},
    settle::SettleInstruments,
};
use crate::{
    outcome::{OutcomeKind, guard},
    telemetry::messaging::Messaging,
    time::elapsed_since,
};

const OUTCOME: &str = "outcome";

/// Metrics of one sentinel.
pub(crate) struct Instruments {
    labels: Labels,
    /// Looked up for the first job, inside the consumer that calls it.
    metrics: OnceLock<Metrics>,
    /// The sentinel's policy, and its metrics for this sentinel.
    policy: OnceLock<(SettleInstruments, SettleInstruments)>,
}

struct Metrics {
    consumed: Counter,
    queued: Histogram,
    running: Gauge,
    unsettled: Gauge,
    abandoned: Gauge,
    /// By [`OutcomeKind`].
    outcomes: [(Counter, Histogram); 5],
}

impl Instruments {
    /// The bound on abandoned jobs if none is set: they are counted anyway.
    pub(crate) const UNBOUNDED: Option<usize> = Some(usize::MAX);

    pub(crate) fn new(labels: &Labels) -> Self {
        Self {
            labels: labels.clone(),
            metrics: OnceLock::new(),
            policy: OnceLock::new(),
        }
    }

    /// Counts a job that begins, whose errors have the type `error_type`.
    pub(crate) fn begin<'a>(
        &self,
        error_type: &'static str,
        describe: impl FnOnce() -> Option<Messaging<'a>>,
    ) -> InFlightGauge {
        let mut metrics = self.metrics.get();
        if metrics.is_none() {
            let new = || Metrics::new(&of_delivery(&self.labels, describe), error_type);
            // It stays `None` if the recorder panics.
            guard(|| metrics = Some(self.metrics.get_or_init(new)));
        }
        if let Some(metrics) = metrics {
            guard(|| metrics.consumed.increment(1));
        }
        InFlightGauge::new(metrics.map(|it| &it.running))
    }

    /// Measures how long a job has waited in its queue, if that is known.
    pub(crate) fn waited(&self, since: impl FnOnce() -> Option<SystemTime>) {
        if let Some(metrics) = self.metrics.get() {
            guard(|| {
                if let Some(since) = since() {
                    metrics.queued.record(elapsed_since(since));
                }
            });
        }
    }

    /// Counts the outcome of a job, which is unsettled from now on.
    pub(crate) fn conclude(&self, kind: OutcomeKind, elapsed: Duration) -> InFlightGauge {
        let metrics = self.metrics.get();
        if let Some(metrics) = metrics {
            // In the order of the enum, as in `new`.
            let (outcomes, duration) = &metrics.outcomes[kind as usize];
            guard(|| outcomes.increment(1));
            guard(|| duration.record(elapsed));
        }
        InFlightGauge::new(metrics.map(|it| &it.unsettled))
    }

    /// Returns the metrics for the report of a job.
    pub(crate) fn measured(self: &Arc<Self>) -> MeasuredBy {
        MeasuredBy(Some(Arc::clone(self)))
    }

    /// Counts a job that is abandoned.
    pub(crate) fn abandon(&self) -> InFlightGauge {
        InFlightGauge::new(self.metrics.get().map(|it| &it.abandoned))
    }
}

/// Metrics of the sentinel that reports a job; `None` if a policy is called without one.
#[derive(Default)]
pub(crate) struct MeasuredBy(Option<Arc<Instruments>>);

impl MeasuredBy {
    /// Returns the metrics of `policy` for this sentinel, so that sentinels which share a policy have their own
    /// labels. If the sentinel has several policies, that is the first one; the others have theirs.
    pub(crate) fn of_policy(&self, policy: &SettleInstruments) -> SettleInstruments {
        let Some(sentinel) = &self.0 else {
            return policy.clone();
        };
        let (first, own) = sentinel
            .policy
            .get_or_init(|| (policy.clone(), policy.anew()));
        match first.is(policy) {
            true => own.clone(),
            false => policy.clone(),
        }
    }
}

impl Metrics {
    fn new(labels: &Labels, error_type: &'static str) -> Self {
        // As on the span of the job. A cancelled job has not failed.
        let kinds = [
            (OutcomeKind::Completed, None),
            (OutcomeKind::Failed, Some(error_type)),
            (OutcomeKind::Panicked, Some("panic")),
            (OutcomeKind::TimedOut, Some("timeout")),
            (OutcomeKind::Cancelled, None),
        ];
        Self {
            consumed: counter!(CONSUMED, with(labels, [(OPERATION, "consume")])),
            queued: histogram!(QUEUE_DURATION, labels.clone()),
            running: gauge!(RUNNING, labels.clone()),
            unsettled: gauge!(UNSETTLED, labels.clone()),
            abandoned: gauge!(ABANDONED, labels.clone()),
            outcomes: kinds.map(|(kind, error_type)| {
                let labels = with(labels, [(OUTCOME, kind.as_str())]);
                let outcomes = counter!(OUTCOMES, labels.clone());
                let mut labels = with(&labels, [(OPERATION, "process")]);
                labels.extend(error_type.map(|it| Label::from_static_parts(ERROR_TYPE, it)));
                (outcomes, histogram!(PROCESS_DURATION, labels))
            }),
        }
    }
}
