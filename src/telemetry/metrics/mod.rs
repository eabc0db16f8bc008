//! Metrics of this crate for the `metrics` facade, or empty stand-ins if the feature is off.

#[cfg(not(feature = "metrics"))]
mod off;
#[cfg(feature = "metrics")]
mod on;

#[cfg(not(feature = "metrics"))]
pub(crate) use self::off::{
    ConsumerInstruments, InFlightGauge, Instruments, IntensityInstruments, Labels, MeasuredBy,
    SettleInstruments, Stopwatch, count_stall,
};
#[cfg(feature = "metrics")]
pub(crate) use self::on::{
    ConsumerInstruments, InFlightGauge, Instruments, IntensityInstruments, Labels, MeasuredBy,
    SettleInstruments, Stopwatch, count_stall, labels,
};
#[cfg(feature = "metrics")]
pub use self::on::{DURATION_BUCKETS, describe_metrics};

/// Error of a settlement that is dropped without a result.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Unfinished {
    Dropped,
    Panicked,
}
