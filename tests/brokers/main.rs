//! Tests against brokers: one list of scenarios for all of them, and tests of one broker only.
//!
//! Real brokers run on private servers that the tests start and kill.
#![allow(clippy::unwrap_used)]

mod addresses;
mod child;
mod conformance;
mod dead_letters;
mod errors;
mod examples;
mod gates;
mod killed_consumer;
mod killed_redrive;
#[path = "../it/support/log.rs"]
mod log;
mod memory;
mod nats;
mod poison;
mod port;
mod proxy;
mod rabbitmq;
mod redis;
mod suspects;
mod watchdog;
mod zombie;
