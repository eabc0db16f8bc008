//! Brokers: what a [`Consumer`](crate::Subscription) reads jobs from and a tag is settled with.

#[cfg(feature = "redis")]
pub mod redis;
