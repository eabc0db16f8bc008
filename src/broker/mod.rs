//! Brokers: what a [`Consumer`](crate::Subscription) reads jobs from and a tag is settled with.

#[cfg(feature = "redis")]
pub mod redis;
//! Brokers whose deliveries are jobs, and whose tags can settle them.

pub mod memory;
