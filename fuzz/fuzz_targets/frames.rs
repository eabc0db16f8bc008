//! Frames between a pool and its children, and the limits of a child.

#![no_main]

use libfuzzer_sys::fuzz_target;
use tower_sentinel::process::fuzzing::{frame, limits};

fuzz_target!(|bytes: &[u8]| {
    frame(bytes);
    if let Ok(text) = std::str::from_utf8(bytes) {
        limits(text);
    }
});
