//! Settling: decisions, and what becomes of them at the broker.

mod decision;
mod moot;
mod remains;
mod settling;
