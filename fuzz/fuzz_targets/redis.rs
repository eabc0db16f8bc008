//! Replies with entries of a stream.

#![no_main]

use libfuzzer_sys::fuzz_target;
use tower_sentinel::broker::redis::fuzzing::reply;

fuzz_target!(|bytes: &[u8]| reply(bytes));
