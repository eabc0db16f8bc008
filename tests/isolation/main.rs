//! The table of the guide's page "How much isolation?", cell by cell.
//!
//! Each test starts this binary again as a worker, which runs one bad job and some good ones, and compares what happens
//! with what its cell says.
#![allow(clippy::unwrap_used)]

mod ends;
mod leftovers;
mod panic_abort;
mod stops;
mod table;
mod worker;
