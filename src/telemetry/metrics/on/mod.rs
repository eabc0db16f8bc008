//! Counters, gauges and histograms of this crate, for the `metrics` facade.
//!
//! A metric has its name from the
//! [messaging conventions of OpenTelemetry](https://opentelemetry.io/docs/specs/semconv/messaging/messaging-metrics/)
//! (status: development), if they have one for it. See [`describe_metrics`](super::describe_metrics).
//!
//! `off.rs` replaces this file if the feature is off.

use std::{
    fmt,
    sync::{Arc, OnceLock},
    time::{Duration, SystemTime},
};

use ::metrics::{Counter, Gauge, Histogram, Label, SharedString, counter, gauge, histogram};
use tokio::time::Instant;

use super::describe::{
    ABANDONED, CONSUMED, INTENSITY_STATE, MOOT, OUTCOMES, PROCESS_DURATION, QUEUE_DURATION,
    RUNNING, SETTLE_DURATION, UNSETTLED, VERDICTS,
};
use crate::{
    outcome::{OutcomeKind, catch, guard},
    telemetry::{consumer_name, messaging::Messaging},
    time::elapsed_since,
};

const OUTCOME: &str = "outcome";
const ERROR_TYPE: &str = "error.type";
const OPERATION: &str = "messaging.operation.name";
const OPERATION_TYPE: &str = "messaging.operation.type";

/// Labels set by the user.
pub(crate) type Labels = Vec<Label>;

pub(crate) fn labels<K, V>(labels: impl IntoIterator<Item = (K, V)>) -> Labels
where
    K: Into<SharedString>,
    V: Into<SharedString>,
{
    let label = |(key, value): (K, V)| Label::new(key, value);
    labels.into_iter().map(label).collect()
}

/// Adds the name of the consumer that calls this, if it has one.
fn of_consumer(labels: &Labels) -> Labels {
    let mut labels = labels.clone();
    let name = consumer_name::current();
    labels.extend(name.map(|name| Label::new(consumer_name::LABEL, name)));
    labels
}

/// Adds the name of the consumer, and the description of the first delivery. A label set by the user stays.
fn of_delivery<'a>(labels: &Labels, describe: impl FnOnce() -> Option<Messaging<'a>>) -> Labels {
    let mut labels = of_consumer(labels);
    // The description is foreign code.
    if let Ok(Some(messaging)) = catch(describe) {
        let Messaging {
            system,
            destination,
            queue,
            consumer_group,
            ..
        } = messaging;
        for (key, value) in [
            ("messaging.system", Some(system.into())),
            (
                "messaging.destination.name",
                Some(queue.unwrap_or(destination)),
            ),
            ("messaging.consumer.group.name", consumer_group),
        ] {
            let is_set = labels.iter().any(|label| label.key() == key);
            if let (Some(value), false) = (value, is_set) {
                labels.push(Label::new(key, value.into_owned()));
            }
        }
    }
    labels
}

fn with<const N: usize>(labels: &Labels, more: [(&'static str, &'static str); N]) -> Labels {
    let mut labels = labels.clone();
    labels.extend(more.map(|(key, value)| Label::from_static_parts(key, value)));
    labels
}

// === of a sentinel ===

/// Metrics of one sentinel.
pub(crate) struct Instruments {
    labels: Labels,
    /// Looked up for the first job, inside the consumer that calls it.
    metrics: OnceLock<Metrics>,
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

    /// Counts a job that is abandoned.
    pub(crate) fn abandon(&self) -> InFlightGauge {
        InFlightGauge::new(self.metrics.get().map(|it| &it.abandoned))
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

/// Guard that adds one to a gauge, if there is one, until it is dropped.
pub(crate) struct InFlightGauge(Option<Gauge>);

impl InFlightGauge {
    fn new(gauge: Option<&Gauge>) -> Self {
        if let Some(gauge) = gauge {
            guard(|| gauge.increment(1.0));
        }
        Self(gauge.cloned())
    }
}

impl Drop for InFlightGauge {
    fn drop(&mut self) {
        if let Some(gauge) = &self.0 {
            guard(|| gauge.decrement(1.0));
        }
    }
}

// === of a settle policy ===

/// Metrics of one policy, cloned with it for each job.
#[derive(Clone)]
pub(crate) struct SettleInstruments(Arc<Settlements>);

struct Settlements {
    labels: Labels,
    names: [&'static str; 5],
    /// Looked up for the first settlement: before its labels are set, a policy has other labels, which must
    /// not be seen.
    verdicts: OnceLock<Verdicts>,
}

struct Verdicts {
    /// Those of all metrics.
    labels: Labels,
    /// In the order of the names.
    settled: [(Counter, Histogram); 5],
}

impl SettleInstruments {
    /// Creates the metrics of a policy, with the `names` of the verdicts by index.
    pub(crate) fn new(labels: Labels, names: [&'static str; 5]) -> Self {
        let verdicts = OnceLock::new();
        Self(Arc::new(Settlements {
            labels,
            names,
            verdicts,
        }))
    }

    /// Begins to measure a settlement with the verdict that has this index.
    pub(crate) fn begin<'a>(
        &self,
        verdict: usize,
        describe: impl FnOnce() -> Option<Messaging<'a>>,
    ) -> Stopwatch {
        let Settlements {
            labels,
            names,
            verdicts,
        } = &*self.0;
        if verdicts.get().is_none() {
            guard(|| {
                verdicts.get_or_init(|| Verdicts::new(of_delivery(labels, describe), names));
            });
        }
        Stopwatch {
            instruments: self.clone(),
            verdict,
            unfinished: None,
            started: Instant::now(),
        }
    }
}

impl Verdicts {
    fn new(labels: Labels, names: &[&'static str; 5]) -> Self {
        let settled = names.map(|name| {
            let verdicts = counter!(VERDICTS, with(&labels, [(OPERATION, name)]));
            (
                verdicts,
                histogram!(SETTLE_DURATION, operation(&labels, name)),
            )
        });
        Self { labels, settled }
    }
}

/// Returns the labels of the duration of a settlement.
fn operation(labels: &Labels, name: &'static str) -> Labels {
    with(labels, [(OPERATION, name), (OPERATION_TYPE, "settle")])
}

/// Stopwatch of one settlement.
pub(crate) struct Stopwatch {
    instruments: SettleInstruments,
    verdict: usize,
    /// Type of the error if it is dropped now.
    unfinished: Option<&'static str>,
    started: Instant,
}

impl Stopwatch {
    /// Sets the type of the error with which the settlement counts if it is dropped without a result.
    pub(crate) fn set_unfinished(&mut self, error_type: &'static str) {
        self.unfinished = Some(error_type);
    }

    /// Counts the settlement.
    pub(crate) fn settled(&mut self) {
        self.unfinished = None;
        if let Some(verdicts) = self.instruments.0.verdicts.get() {
            let (verdicts, duration) = &verdicts.settled[self.verdict];
            guard(|| verdicts.increment(1));
            guard(|| duration.record(self.started.elapsed()));
        }
    }

    /// Measures a settlement that has failed.
    pub(crate) fn failed(&mut self, error_type: &'static str) {
        self.unfinished = None;
        // Rare, so it is looked up each time.
        let Settlements {
            names, verdicts, ..
        } = &*self.instruments.0;
        if let Some(verdicts) = verdicts.get() {
            let elapsed = self.started.elapsed();
            guard(|| {
                let mut labels = operation(&verdicts.labels, names[self.verdict]);
                labels.push(Label::from_static_parts(ERROR_TYPE, error_type));
                histogram!(SETTLE_DURATION, labels).record(elapsed);
            });
        }
    }

    /// Counts a settlement that the broker did not wait for any more.
    pub(crate) fn moot(&self) {
        let Settlements {
            names, verdicts, ..
        } = &*self.instruments.0;
        // Rare, so it is looked up each time.
        if let Some(verdicts) = verdicts.get() {
            let name = names[self.verdict];
            guard(|| {
                counter!(MOOT, with(&verdicts.labels, [(OPERATION, name)])).increment(1);
            });
        }
    }
}

impl Drop for Stopwatch {
    fn drop(&mut self) {
        if let Some(error_type) = self.unfinished {
            self.failed(error_type);
        }
    }
}

impl fmt::Debug for SettleInstruments {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SettleInstruments")
    }
}

// === of an intensity layer ===

/// Metrics of the services of one layer.
#[derive(Default)]
pub(crate) struct IntensityInstruments {
    /// Looked up for the first service, since each setting makes a new layer and the former is not used.
    state: OnceLock<Gauge>,
}

impl IntensityInstruments {
    /// Begins to report the state, with a service that runs.
    pub(crate) fn begin(&self, labels: &Labels) {
        guard(|| {
            self.state.get_or_init(|| {
                let state = gauge!(INTENSITY_STATE, of_consumer(labels));
                state.set(0.0);
                state
            });
        });
    }

    /// Reports the new state of the services.
    pub(crate) fn change(&self, state: f64) {
        if let Some(gauge) = self.state.get() {
            guard(|| gauge.set(state));
        }
    }
}

impl fmt::Debug for IntensityInstruments {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("IntensityInstruments")
    }
}
