//! Messages with the subject for their acks and their headers, and stored ones as JSON.
//!
//! The first line of a message is that subject, each other line a header.

#![no_main]

use std::{str::FromStr, sync::OnceLock};

use libfuzzer_sys::fuzz_target;
use tokio::runtime::Builder;
use tower_sentinel::broker::nats::{
    async_nats::{
        ConnectOptions, HeaderMap, HeaderName, HeaderValue, Message, Subject,
        jetstream::{self, Context},
    },
    fuzzing::{dead_letter, message},
};

/// A client that needs no server, as nothing drives its runtime any more.
fn context() -> &'static Context {
    static CONTEXT: OnceLock<Context> = OnceLock::new();
    CONTEXT.get_or_init(|| {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        let options = ConnectOptions::new().retry_on_initial_connect();
        let context = runtime.block_on(async {
            let client = options.connect("127.0.0.1:1").await.unwrap();
            // Spawns a task of its own.
            jetstream::new(client)
        });
        std::mem::forget(runtime);
        context
    })
}

fuzz_target!(|text: &str| {
    if text.starts_with('{') {
        if let Ok(raw) = serde_json::from_str(text) {
            dead_letter(raw);
        }
        return;
    }
    let mut lines = text.split('\n');
    // A subject has no space, and ends at any line break.
    let reply = lines.next().filter(|it| !it.contains(char::is_whitespace));
    let reply = reply.map(Subject::from);
    let mut headers = HeaderMap::new();
    for line in lines {
        let Some((name, value)) = line.split_once(':') else {
            return;
        };
        let (Ok(name), Ok(value)) = (HeaderName::from_str(name), HeaderValue::from_str(value))
        else {
            return;
        };
        headers.append(name, value);
    }
    let received = Message {
        subject: Subject::from("jobs.orders"),
        reply,
        payload: Default::default(),
        headers: Some(headers),
        status: None,
        description: None,
        length: 0,
    };
    message(received, context());
});
