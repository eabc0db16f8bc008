//! Tests against real brokers, on private servers that they start and kill.
#![allow(clippy::unwrap_used)]

mod rabbitmq;
mod server;
