//! Properties of messages, and the copies that are made of them.

#![no_main]

use libfuzzer_sys::fuzz_target;
use tower_sentinel::broker::rabbitmq::fuzzing::message;

fuzz_target!(|bytes: &[u8]| message(bytes));
