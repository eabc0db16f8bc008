//! Settling: decisions, and their effects at the broker.

#[cfg(feature = "process")]
mod crash;
mod decision;
mod inherited;
mod moot;
mod remains;
mod settling;
