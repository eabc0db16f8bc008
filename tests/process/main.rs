//! Jobs in processes of their own, and each way in which they can end.
//!
//! The children are this test binary again: they run the ignored test `child`.
#![allow(clippy::unwrap_used)]

mod child;
mod crossing;
mod ends;
mod figures;
mod limits;
mod orphans;
mod pool;
mod product;
mod sandbox;
mod socket;
mod stops;
mod telemetry;
mod tree;
