//! Tests against real brokers, on private servers that they start and kill.
#![allow(clippy::unwrap_used)]

mod nats;
mod server;
