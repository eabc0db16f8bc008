//! Tests by behaviour; the guarantees G1 to G7 of DESIGN.md each have a test named after them.
#![allow(clippy::unwrap_used)]

mod auto_traits;
mod broker_memory;
#[cfg(feature = "conformance")]
mod conformance;
mod consumer;
mod layers;
mod readme;
mod sentinel;
mod settle;
mod support;
mod telemetry;
