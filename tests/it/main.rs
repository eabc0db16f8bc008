//! Tests by behaviour; the guarantees G1 to G7 of DESIGN.md each have a test named after them.
#![allow(clippy::unwrap_used)]

mod auto_traits;
mod cancellation;
mod decision;
mod decode;
mod drops;
mod gate;
mod keep_alive;
mod layer_order;
mod panics;
mod policy;
mod process;
mod product;
mod readiness;
mod runtimes;
mod seed;
mod settle;
mod spans;
mod stacking;
mod support;
mod timeouts;
