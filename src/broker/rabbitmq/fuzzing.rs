//! Properties that hold for any bytes, for the targets in `fuzz`.

use std::time::Duration;

use lapin::{
    BasicProperties, ConnectionProperties,
    message::Delivery,
    protocol::basic::{gen_properties, parse_properties},
    tcp::OwnedTLSConfig,
};

use super::{
    connect::endpoints,
    death,
    error::ConnectError,
    headers::{self, Counted, header},
    republished::{self, Rejected},
};
use crate::{
    broker::{address, dead_letter::SUSPECT_OF},
    outcome::Outcome,
    settle::Reason,
};

/// Room for all headers that are added, the longest message included.
const ROOM: usize = 8_192;

/// A check that no error and no name of a server repeats the `secret` of an address.
pub fn address(text: &str, secret: &str) {
    let properties = ConnectionProperties::default();
    let shown = match endpoints(&properties, &OwnedTLSConfig::default(), &[text.to_owned()]) {
        Ok(rotation) => {
            let uri = &rotation.round().next().expect("it has one address").uri;
            address::place(&uri.authority.host, uri.authority.port)
        }
        Err(reason) => {
            let error = ConnectError::InvalidAddress { reason };
            format!("{error} {error:?}")
        }
    };
    assert!(!shown.contains(secret), "{shown}");
}

/// A check of the copies that are made of a message with properties as the server sends them: each fits into its frame,
/// and says what it is made to say.
pub fn message(bytes: &[u8]) {
    let Some((&[high, low, number], properties)) = bytes.split_first_chunk() else {
        return;
    };
    let Some(message) = read(properties) else {
        return;
    };
    headers::messaging(&message, "jobs");
    headers::published_at(&message.properties);
    Counted::read(&message.properties);
    death::describe(&message);
    republished::for_return(&message);

    let number = u32::from(number);
    let all = (properties.len() + ROOM) as u32;
    for frame_max in [u32::from(u16::from_be_bytes([high, low])), all] {
        retry(&message, number, frame_max);
        redrive(&message, number, frame_max);
        for is_suspect in [false, true] {
            reject(&message, number, is_suspect, frame_max, frame_max == all);
        }
    }
}

fn retry(message: &Delivery, deliveries: u32, frame_max: u32) {
    let copy = republished::for_retry(message, deliveries, true, frame_max);
    let Ok(copy) = copy else { return };
    let copy = sent(&copy, frame_max);
    assert_eq!(Counted::read(&copy.properties).before, Some(deliveries));
    assert_eq!(header(&copy, SUSPECT_OF), header(message, SUSPECT_OF));
}

fn redrive(message: &Delivery, times: u32, frame_max: u32) {
    if let Ok(copy) = republished::for_redrive(message, times, frame_max) {
        let copy = sent(&copy, frame_max);
        assert_eq!(death::describe(&copy).redriven, times);
        assert_eq!(Counted::read(&copy.properties).before, None);
    }
}

fn reject(message: &Delivery, deliveries: u32, is_suspect: bool, frame_max: u32, has_room: bool) {
    let rejected = Rejected {
        message,
        queue: "jobs",
        deliveries: Some(deliveries),
        is_suspect,
    };
    let outcome = Outcome::<(), _>::Failed("\u{e4}".repeat(3_000));
    let reason = Reason::of(&outcome, Duration::ZERO);
    let Ok(copy) = rejected.properties(&reason, frame_max) else {
        assert!(!has_room);
        return;
    };
    let copy = sent(&copy, frame_max);
    if has_room {
        let letter = death::describe(&copy);
        let suspect_of = header(message, SUSPECT_OF).filter(|_| !is_suspect);
        assert_eq!(letter.kind.as_deref(), Some("failed"));
        assert_eq!(letter.deliveries, Some(deliveries));
        assert_eq!(letter.destination.as_deref(), suspect_of.or(Some("jobs")));
        assert_eq!(letter.message.map(|it| it.len()), Some(4_096));
        assert!(!is_suspect || header(&copy, SUSPECT_OF) == Some("jobs"));
    }
}

/// Returns the message that the server delivers for these properties, which take no more than a frame.
fn sent(properties: &BasicProperties, frame_max: u32) -> Delivery {
    let written = gen_properties(properties)(Vec::new().into());
    let written = written.expect("properties are written").write;
    assert!(written.len() < frame_max as usize);
    read(&written).expect("what is written can be read")
}

fn read(properties: &[u8]) -> Option<Delivery> {
    let (_, properties) = parse_properties(properties).ok()?;
    let mut message = Delivery::mock(1, "work".into(), "orders".into(), false, Vec::new());
    message.properties = properties;
    Some(message)
}
