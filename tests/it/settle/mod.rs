//! Settling: decisions, and their effects at the broker.

mod decision;
mod moot;
mod remains;
mod settling;
