//! Counters, gauges and histograms of this crate, for the `metrics` facade.
//!
//! A metric has its name from the
//! [messaging conventions of OpenTelemetry](https://opentelemetry.io/docs/specs/semconv/messaging/messaging-metrics/)
//! (status: development), if they have one for it. See [`describe_metrics`].
//!
//! `off.rs` replaces this folder if the feature is off.

mod consumer;
mod describe;
mod in_flight;
mod intensity;
mod labels;
mod sentinel;
mod settle;

pub use self::describe::{DURATION_BUCKETS, describe_metrics};
pub(crate) use self::{
    consumer::{ConsumerInstruments, count_stall},
    in_flight::InFlightGauge,
    intensity::IntensityInstruments,
    labels::{Labels, labels},
    sentinel::{Instruments, MeasuredBy},
    settle::{SettleInstruments, Stopwatch},
};
