//! Names of the metrics, and their descriptions for the recorder.

use ::metrics::{Unit, describe_counter, describe_gauge, describe_histogram};

pub(super) const PROCESS_DURATION: &str = "messaging.process.duration";
pub(super) const CONSUMED: &str = "messaging.client.consumed.messages";
pub(super) const QUEUE_DURATION: &str = "tower_sentinel.queue.duration";
pub(super) const OUTCOMES: &str = "tower_sentinel.outcomes";
pub(super) const RUNNING: &str = "tower_sentinel.running";
pub(super) const UNSETTLED: &str = "tower_sentinel.unsettled";
pub(super) const ABANDONED: &str = "tower_sentinel.abandoned";
pub(super) const VERDICTS: &str = "tower_sentinel.verdicts";
pub(super) const MOOT: &str = "tower_sentinel.moot";
pub(super) const SETTLE_DURATION: &str = "messaging.client.operation.duration";
pub(super) const CONNECTED: &str = "tower_sentinel.connected";
pub(super) const RECONNECTS: &str = "tower_sentinel.reconnects";
pub(super) const STALLED: &str = "tower_sentinel.consumer.stalled";
pub(super) const INTENSITY_STATE: &str = "tower_sentinel.intensity.state";

/// Bounds of the buckets that OpenTelemetry's conventions advise for durations, in seconds: from 5 ms to 10 s.
///
/// The facade can't pass them on, so give them to the exporter. Without them, `metrics-exporter-prometheus` makes
/// summaries, whose quantiles can't be added up over several workers. The example `dashboard` sets them so:
///
/// ```ignore
/// use metrics_exporter_prometheus::{Matcher, PrometheusBuilder};
/// use tower_sentinel::telemetry::DURATION_BUCKETS;
///
/// PrometheusBuilder::new()
///     .set_buckets_for_metric(Matcher::Suffix("duration".to_owned()), &DURATION_BUCKETS)?
///     .install_recorder()?;
/// ```
///
/// Jobs that run for minutes, or wait for hours, need more of them:
///
/// ```
/// use tower_sentinel::telemetry::DURATION_BUCKETS;
///
/// let buckets = [&DURATION_BUCKETS[..], &[60.0, 600.0, 3600.0]].concat();
/// assert_eq!((buckets[0], buckets[13], buckets[16]), (0.005, 10.0, 3600.0));
/// ```
pub const DURATION_BUCKETS: [f64; 14] = [
    0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
];

/// Describes the metrics of this crate and their units to the recorder.
///
/// Call it once, after the recorder is installed. The metrics are recorded without it too.
///
/// | metric | kind | labels | meaning |
/// | --- | --- | --- | --- |
/// | `messaging.process.duration` | histogram, seconds | `outcome`, `messaging.operation.name` = `process`, `error.type` | time from the sentinel's `call` to the outcome |
/// | `messaging.client.consumed.messages` | counter | `messaging.operation.name` = `consume` | jobs that were called, one for each delivery |
/// | `tower_sentinel.queue.duration` | histogram, seconds | | time from the publish of a job to the sentinel's `call`, of jobs delivered for the first time; from [`Job::queued_since`](crate::Job::queued_since), and 0 if the clocks disagree |
/// | `tower_sentinel.outcomes` | counter | `outcome` | jobs by their [`OutcomeKind`](crate::outcome::OutcomeKind) |
/// | `tower_sentinel.running` | gauge | | jobs without an outcome |
/// | `tower_sentinel.unsettled` | gauge | | jobs with an outcome whose policy has not returned yet |
/// | `tower_sentinel.abandoned` | gauge | | jobs that still run after their outcome |
/// | `tower_sentinel.verdicts` | counter | `messaging.operation.name` | deliveries settled by a [`SettlePolicy`](crate::SettlePolicy), by their verdict, such as `ack` |
/// | `tower_sentinel.moot` | counter | `messaging.operation.name` | settlements that came too late: the broker did not wait for them any more |
/// | `messaging.client.operation.duration` | histogram, seconds | `messaging.operation.name`, `messaging.operation.type` = `settle`, `error.type` | time of a settlement, all tries included, also of one that failed |
/// | `tower_sentinel.connected` | gauge | | 1 while a [`Consumer`](crate::Consumer) has a subscription, until it is closed or gone |
/// | `tower_sentinel.reconnects` | counter | | attempts of a [`Consumer::reconnecting`](crate::Consumer::reconnecting) to connect, without its first |
/// | `tower_sentinel.consumer.stalled` | counter | `reason` | findings of a [watchdog](crate::Consumer::watchdog), by their [`StallKind`](crate::consumer::StallKind) |
/// | `tower_sentinel.intensity.state` | gauge | | the [`IntensityState`](crate::intensity::IntensityState) of an [`IntensityLayer`](crate::IntensityLayer): 0 running, 1 probing, 2 paused |
///
/// Give the bounds of the histograms' buckets to the exporter: [`DURATION_BUCKETS`].
///
/// # Labels
///
/// Names and labels follow the [messaging conventions of
/// OpenTelemetry](https://opentelemetry.io/docs/specs/semconv/messaging/messaging-metrics/) (status:
/// development), whose metrics begin with `messaging.`. Of their attributes, those of the server's address are
/// missing: a delivery does not know it.
///
/// | label | metrics | value |
/// | --- | --- | --- |
/// | `messaging.system`, `messaging.destination.name`, `messaging.consumer.group.name` | those of a sentinel and of a policy | the description of the first delivery, from [`Job::messaging`](crate::Job::messaging) and [`Settle::messaging`](crate::settle::Settle::messaging) |
/// | `consumer.name` | all | the name of the [`Consumer`](crate::Consumer::name), if it has one |
/// | `error.type` of a job | `messaging.process.duration` | for a job that failed the type of its error, otherwise `panic` or `timeout`; none for a job that completed or was cancelled |
/// | `error.type` of a settlement | `messaging.client.operation.duration` | the type of the last error, `timeout`, `panic`, or `dropped` for a settlement that was dropped, as at the [`settle_timeout`](crate::SentinelLayer::settle_timeout); none if it worked |
/// | your own | all | [`SentinelLayer::metric_labels`](crate::SentinelLayer::metric_labels), [`SettlePolicy::metric_labels`](crate::SettlePolicy::metric_labels), [`IntensityLayer::metric_labels`](crate::IntensityLayer::metric_labels); they replace a description of the same name |
///
/// A type is the name that [`std::any::type_name`] returns, as in the spans.
///
/// Metrics are looked up once, and no job pays for it: for the first job of a sentinel, the first settlement of
/// a policy and the first service of an intensity layer. So install the recorder before; without one, nothing
/// is recorded. And give each queue its own sentinel, as a [`Consumer`](crate::Consumer::sentinel) does: clones of
/// one have the labels of the first job of all. A policy may be shared. An [`IntensityLayer`](crate::IntensityLayer) has `consumer.name` only
/// if the consumer makes its services.
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
    describe_histogram!(
        QUEUE_DURATION,
        Unit::Seconds,
        "time that jobs waited for their first delivery"
    );
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
    describe_gauge!(CONNECTED, Unit::Count, "consumers that have a subscription");
    describe_counter!(
        RECONNECTS,
        Unit::Count,
        "attempts of consumers to connect again"
    );
    describe_counter!(STALLED, Unit::Count, "findings of the watchdogs");
    describe_gauge!(
        INTENSITY_STATE,
        Unit::Count,
        "whether jobs are let through: 0 running, 1 probing, 2 paused"
    );
}
