//! Brokers whose deliveries are jobs, and whose tags can settle them.

#[cfg(feature = "nats")]
pub mod nats;
pub mod memory;
