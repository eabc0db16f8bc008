//! Spans, names and metrics for watching a worker.

pub(crate) mod consumer_name;
pub(crate) mod messaging;
pub(crate) mod metrics;
mod span;

#[cfg(feature = "metrics")]
pub use self::metrics::{DURATION_BUCKETS, describe_metrics};
pub(crate) use self::span::GuardedSpan;
