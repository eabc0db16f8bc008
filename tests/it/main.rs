//! Tests by behaviour; the guarantees G1 to G7 of DESIGN.md each have a test named after them.
#![allow(clippy::unwrap_used)]

mod arrival;
mod auto_traits;
mod cancellation;
mod consumer;
mod decision;
mod decode;
mod drops;
mod endpoints;
mod ends;
mod foreign;
mod gate;
mod gone;
#[cfg(feature = "metrics")]
mod instruments;
mod intensity;
mod keep_alive;
mod layer_order;
mod ledger;
mod log;
mod memory;
mod moot;
mod named;
mod otlp;
mod outage;
mod panic_hook;
mod panics;
mod policy;
mod process;
mod product;
mod readiness;
mod readme;
mod rebound;
mod reconnecting;
mod runtimes;
mod seed;
mod settle;
mod spans;
mod stacking;
mod subscriptions;
mod support;
mod tasks;
mod telemetry;
mod timeouts;
mod tower_http;
mod why;
