//! Properties that hold for any bytes, for the targets in `fuzz`.

use std::time::{Duration, SystemTime};

use async_nats::{
    HeaderMap, Message, header,
    jetstream::{Context, stream::RawMessage},
};

use super::{
    connect::Servers,
    dead_letter::{self, describe},
    dead_letter_queue::{self, OURS},
    fetched::Fetched,
};
use crate::{
    broker::{dead_letter::DELIVERIES, dead_letters::DeadLetter},
    outcome::Outcome,
    settle::Reason,
};

/// A check that no error, and nothing that the client gets to know as a server, repeats the `secret` of an address.
pub fn address(text: &str, secret: &str) {
    let shown = match Servers::new(None, &[text.to_owned()]) {
        Ok(servers) => format!("{:?}", servers.all),
        Err(error) => format!("{error:#} {error:?}"),
    };
    assert!(!shown.contains(secret), "{shown}");
}

/// A check of the copies that are made of a message: each says what it is made to say.
pub fn message(message: Message, context: &Context) {
    let Some(fetched) = Fetched::read(message, context) else {
        return;
    };
    fetched.is_redelivered();
    let origin = fetched.origin();
    let mut headers = dead_letter::own_headers(&fetched);
    let outcome = Outcome::<(), _>::Failed("first\r\nsecond");
    let reason = Reason::of(&outcome, Duration::ZERO);
    describe(&mut headers, &fetched.id, origin, &reason);
    headers.insert(DELIVERIES, fetched.deliveries().to_string());

    let letter = letter(&headers);
    assert_eq!(letter.kind.as_deref(), Some("failed"));
    assert_eq!(letter.message.as_deref(), Some("first  second"));
    assert_eq!(letter.deliveries, Some(fetched.deliveries()));
    assert_eq!(letter.destination.as_deref(), Some(origin));
    assert!(letter.time > Some(SystemTime::UNIX_EPOCH));
    moved_back(&headers);
}

/// A check of a dead letter that anybody has written.
pub fn dead_letter(raw: RawMessage) {
    let taken = dead_letter_queue::read(raw);
    if let Some(message) = taken.key.message {
        moved_back(&message.headers);
    }
}

fn letter(headers: &HeaderMap) -> DeadLetter {
    let mut letter = DeadLetter::new();
    dead_letter_queue::describe(&mut letter, headers);
    letter
}

/// Checks the headers of a letter that is moved back: none instructs the server, and none describes a dead letter.
fn moved_back(letter: &HeaderMap) {
    let headers = dead_letter_queue::own_headers(letter);
    assert!(headers.get(header::NATS_MESSAGE_ID).is_none());
    for (name, _) in headers.iter() {
        let name: &str = name.as_ref();
        assert!(!dead_letter::is_of_nats(name), "{name}");
        assert!(
            !OURS.iter().any(|ours| ours.eq_ignore_ascii_case(name)),
            "{name}"
        );
    }
    assert_eq!(self::letter(&headers).kind, None);
}
