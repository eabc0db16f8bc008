//! Properties of messages, and the copies that are made of them.

#![no_main]

use libfuzzer_sys::fuzz_target;
use tower_sentinel::broker::rabbitmq::fuzzing::message;

/// The client's parser calls itself for each table in a table, without a limit: some thousands of them overflow the
/// stack, before any code of this crate.
const LONGEST: usize = 8_192;

fuzz_target!(|bytes: &[u8]| {
    if bytes.len() <= LONGEST {
        message(bytes);
    }
});
