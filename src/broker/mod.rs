//! Brokers whose deliveries are jobs, and whose tags can settle them.

pub mod memory;
#[cfg(feature = "nats")]
pub mod nats;
