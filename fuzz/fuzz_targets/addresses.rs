//! Addresses of servers. The input is one, in which each `$` stands for a part of the password.

#![no_main]

use libfuzzer_sys::fuzz_target;
use tower_sentinel::broker::{nats, rabbitmq, redis};

/// No scheme, host or message has it.
const SECRET: &str = "zq7";

/// Returns a text as a parser may read it, which removes line breaks and tabs.
fn plain(text: &str) -> String {
    let text = text.to_ascii_lowercase();
    text.replace(['\t', '\r', '\n'], "")
}

/// Returns whether a text that is shown may be the secret by chance. A parser decodes what is percent-encoded, and maps
/// other letters to those of ASCII.
fn may_be_secret(text: &str) -> bool {
    let text = plain(text);
    text.contains(SECRET) || text.replace("%2f", "").contains('%') || !text.is_ascii()
}

fuzz_target!(|text: &str| {
    // The password lies between the scheme and the last `@`.
    let (start, end) = (text.find("://").map_or(0, |at| at + 3), text.rfind('@'));
    let Some(credentials) = end.and_then(|end| text.get(start..end)) else {
        return;
    };
    let (before, after) = (&text[..start], &text[start + credentials.len()..]);
    // The path of a socket has no password, and is shown.
    let may_be_shown =
        credentials.contains(SECRET) || [before, after].into_iter().any(may_be_secret);
    if plain(text).contains("unix:") || may_be_shown {
        return;
    }
    let text = format!("{before}{}{after}", credentials.replace('$', SECRET));
    nats::fuzzing::address(&text, SECRET);
    rabbitmq::fuzzing::address(&text, SECRET);
    redis::fuzzing::address(&text, SECRET);
});
