//! Counters, gauges and histograms of this crate, for the `metrics` facade.
//!
//! A metric has its name from the
//! [messaging conventions of OpenTelemetry](https://opentelemetry.io/docs/specs/semconv/messaging/messaging-metrics/)
//! (status: development), if they have one for it. See [`describe_metrics`].
//!
//! `off.rs` replaces this file if the feature is off.

use std::{
    fmt,
    sync::{Arc, OnceLock},
    time::Duration,
};

use ::metrics::{
    Counter, Gauge, Histogram, Label, SharedString, Unit, counter, describe_counter,
    describe_gauge, describe_histogram, gauge, histogram,
};
use tokio::time::Instant;

use crate::{
    outcome::{OutcomeKind, guard},
    telemetry::consumer_name,
};

const PROCESS_DURATION: &str = "messaging.process.duration";
const CONSUMED: &str = "messaging.client.consumed.messages";
const OUTCOMES: &str = "tower_sentinel.outcomes";
const RUNNING: &str = "tower_sentinel.running";
const UNSETTLED: &str = "tower_sentinel.unsettled";
const ABANDONED: &str = "tower_sentinel.abandoned";
const VERDICTS: &str = "tower_sentinel.verdicts";
const MOOT: &str = "tower_sentinel.moot";
const SETTLE_DURATION: &str = "messaging.client.operation.duration";
const INTENSITY_STATE: &str = "tower_sentinel.intensity.state";

const OUTCOME: &str = "outcome";
const VERDICT: &str = "messaging.operation.name";

/// Describes the metrics of this crate and their units to the recorder.
///
/// Call it once, after the recorder is installed. The metrics are recorded without it too.
///
/// | metric | kind | labels | meaning |
/// | --- | --- | --- | --- |
/// | `messaging.process.duration` | histogram, seconds | `outcome` | time from the sentinel's `call` to the outcome |
/// | `messaging.client.consumed.messages` | counter | | jobs that were called, one for each delivery |
/// | `tower_sentinel.outcomes` | counter | `outcome` | jobs by their [`OutcomeKind`] |
/// | `tower_sentinel.running` | gauge | | jobs without an outcome |
/// | `tower_sentinel.unsettled` | gauge | | jobs with an outcome whose policy has not returned yet |
/// | `tower_sentinel.abandoned` | gauge | | jobs that still run after their outcome |
/// | `tower_sentinel.verdicts` | counter | `messaging.operation.name` | deliveries settled by a [`SettlePolicy`](crate::SettlePolicy), by their verdict, such as `ack` |
/// | `tower_sentinel.moot` | counter | `messaging.operation.name` | settlements that came too late: the broker did not wait for them any more |
/// | `messaging.client.operation.duration` | histogram, seconds | `messaging.operation.name` | time of a settlement, all tries included |
/// | `tower_sentinel.intensity.state` | gauge | | the [`IntensityState`](crate::intensity::IntensityState) of an [`IntensityLayer`](crate::IntensityLayer): 0 running, 1 probing, 2 paused |
///
/// Further labels are those of [`SentinelLayer::metric_labels`](crate::SentinelLayer::metric_labels),
/// [`SettlePolicy::metric_labels`](crate::SettlePolicy::metric_labels) and
/// [`IntensityLayer::metric_labels`](crate::IntensityLayer::metric_labels), and `consumer.name` in a
/// [`Consumer`](crate::Consumer::name) that has a name. The metric of an
/// [`IntensityLayer`](crate::IntensityLayer) has that label only if the consumer makes its services.
///
/// Metrics are looked up once: for the first job of a sentinel, the first settlement of a policy and the
/// first service of an intensity layer. So install the recorder before. Without a recorder, nothing is
/// recorded.
///
/// ```
/// use metrics::NoopRecorder; // stands for an exporter's
///
/// metrics::set_global_recorder(NoopRecorder)?;
/// tower_sentinel::telemetry::describe_metrics();
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn describe_metrics() {
    describe_histogram!(
        PROCESS_DURATION,
        Unit::Seconds,
        "time from the call of a job to its outcome"
    );
    describe_counter!(CONSUMED, Unit::Count, "jobs that were called");
    describe_counter!(OUTCOMES, Unit::Count, "jobs by outcome");
    describe_gauge!(RUNNING, Unit::Count, "jobs without an outcome");
    describe_gauge!(
        UNSETTLED,
        Unit::Count,
        "jobs with an outcome that are not settled yet"
    );
    describe_gauge!(
        ABANDONED,
        Unit::Count,
        "jobs that still run after their outcome"
    );
    describe_counter!(VERDICTS, Unit::Count, "settled deliveries by verdict");
    describe_counter!(
        MOOT,
        Unit::Count,
        "settlements that the broker did not wait for any more"
    );
    describe_histogram!(
        SETTLE_DURATION,
        Unit::Seconds,
        "time that a settlement took, all tries included"
    );
    describe_gauge!(
        INTENSITY_STATE,
        Unit::Count,
        "whether jobs are let through: 0 running, 1 probing, 2 paused"
    );
}

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

fn with(labels: &Labels, key: &'static str, value: &'static str) -> Labels {
    let mut labels = labels.clone();
    labels.push(Label::from_static_parts(key, value));
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

    /// Returns the metrics, or `None` if the recorder panics.
    fn metrics(&self) -> Option<&Metrics> {
        let mut metrics = self.metrics.get();
        if metrics.is_none() {
            let new = || Metrics::new(&of_consumer(&self.labels));
            guard(|| metrics = Some(self.metrics.get_or_init(new)));
        }
        metrics
    }

    /// Counts a job that begins.
    pub(crate) fn begin(&self) -> InFlightGauge {
        let metrics = self.metrics();
        if let Some(metrics) = metrics {
            guard(|| metrics.consumed.increment(1));
        }
        InFlightGauge::new(metrics.map(|it| &it.running))
    }

    /// Counts the outcome of a job, which is unsettled from now on.
    pub(crate) fn conclude(&self, kind: OutcomeKind, elapsed: Duration) -> InFlightGauge {
        let metrics = self.metrics();
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
        InFlightGauge::new(self.metrics().map(|it| &it.abandoned))
    }
}

impl Metrics {
    fn new(labels: &Labels) -> Self {
        let kinds = [
            OutcomeKind::Completed,
            OutcomeKind::Failed,
            OutcomeKind::Panicked,
            OutcomeKind::TimedOut,
            OutcomeKind::Cancelled,
        ];
        Self {
            consumed: counter!(CONSUMED, labels.clone()),
            running: gauge!(RUNNING, labels.clone()),
            unsettled: gauge!(UNSETTLED, labels.clone()),
            abandoned: gauge!(ABANDONED, labels.clone()),
            outcomes: kinds.map(|kind| {
                let labels = with(labels, OUTCOME, kind.as_str());
                let outcomes = counter!(OUTCOMES, labels.clone());
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
    /// In the order of the names. Looked up for the first settlement: before its labels are set, a policy
    /// has other labels, which must not be seen.
    verdicts: OnceLock<[(Counter, Histogram); 5]>,
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

    /// Begins to measure a settlement.
    pub(crate) fn begin(&self) -> Stopwatch {
        Stopwatch {
            instruments: self.clone(),
            started: Instant::now(),
        }
    }

    fn of(&self, verdict: usize) -> &(Counter, Histogram) {
        let Settlements {
            labels,
            names,
            verdicts,
        } = &*self.0;
        let verdicts = verdicts.get_or_init(|| {
            let labels = &of_consumer(labels);
            names.map(|name| {
                let labels = with(labels, VERDICT, name);
                let verdicts = counter!(VERDICTS, labels.clone());
                (verdicts, histogram!(SETTLE_DURATION, labels))
            })
        });
        &verdicts[verdict]
    }
}

/// Stopwatch of one settlement.
pub(crate) struct Stopwatch {
    instruments: SettleInstruments,
    started: Instant,
}

impl Stopwatch {
    /// Counts a settlement with the verdict that has this index.
    pub(crate) fn settled(&self, verdict: usize) {
        guard(|| {
            let (verdicts, duration) = self.instruments.of(verdict);
            guard(|| verdicts.increment(1));
            duration.record(self.started.elapsed());
        });
    }

    /// Counts a settlement with that verdict that the broker did not wait for any more.
    pub(crate) fn moot(&self, verdict: usize) {
        let Settlements { labels, names, .. } = &*self.instruments.0;
        // Rare, so it is looked up each time.
        let labels = &of_consumer(labels);
        guard(|| counter!(MOOT, with(labels, VERDICT, names[verdict])).increment(1));
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
