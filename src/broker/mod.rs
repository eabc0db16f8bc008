//! Brokers whose deliveries are jobs, and whose tags can settle them.

#[cfg(feature = "rabbitmq")]
pub mod rabbitmq;
