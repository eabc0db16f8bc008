//! Addresses of servers. The input is one, in which each `$` stands for a part of the password.

#![no_main]

use libfuzzer_sys::fuzz_target;
use tower_sentinel::broker::{nats, rabbitmq, redis};

/// No scheme, host or message has it.
const SECRET: &str = "zq7";

fuzz_target!(|text: &str| {
    // The password lies between the scheme and the last `@`.
    let (start, end) = (text.find("://").map_or(0, |at| at + 3), text.rfind('@'));
    let Some(credentials) = end.and_then(|end| text.get(start..end)) else {
        return;
    };
    // The path of a socket has no password, and is shown.
    if text.contains("unix:") || text.to_ascii_lowercase().contains(SECRET) {
        return;
    }
    let (before, after) = (&text[..start], &text[start + credentials.len()..]);
    let text = format!("{before}{}{after}", credentials.replace('$', SECRET));
    nats::fuzzing::address(&text, SECRET);
    rabbitmq::fuzzing::address(&text, SECRET);
    redis::fuzzing::address(&text, SECRET);
});
