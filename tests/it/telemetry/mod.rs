//! Traces, logs and metrics of jobs and consumers.

mod consumer_name;
#[cfg(feature = "metrics")]
mod metrics;
mod otlp;
mod spans;
mod why;
