//! Metrics of this crate for the `metrics` facade, or empty stand-ins if the feature is off.

#[cfg(feature = "metrics")]
mod describe;
#[cfg(not(feature = "metrics"))]
mod off;
#[cfg(feature = "metrics")]
mod on;

#[cfg(feature = "metrics")]
pub use self::describe::describe_metrics;
#[cfg(not(feature = "metrics"))]
pub(crate) use self::off::{
    InFlightGauge, Instruments, IntensityInstruments, Labels, SettleInstruments, Stopwatch,
};
#[cfg(feature = "metrics")]
pub(crate) use self::on::{
    InFlightGauge, Instruments, IntensityInstruments, Labels, SettleInstruments, Stopwatch, labels,
};
