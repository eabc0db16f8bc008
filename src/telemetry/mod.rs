//! Spans, names and metrics that a worker is watched by.

pub(crate) mod consumer_name;
pub(crate) mod metrics;
mod span;

#[cfg(feature = "metrics")]
pub use self::metrics::describe_metrics;
pub(crate) use self::span::GuardedSpan;
