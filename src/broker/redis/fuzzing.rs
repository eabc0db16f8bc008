//! Properties that hold for any bytes, for the targets in `fuzz`.

use ::redis::{Value, parse_redis_value};

use super::{
    connect::{PORT, Server},
    dead_letter_queue,
    reply::{self, Entry, Past},
    sentinel::Primary,
};

/// A check that no error and no name of a server repeats the `secret` of an address.
pub fn address(text: &str, secret: &str) {
    let shown = match Server::parse(text, PORT) {
        Ok(server) => {
            server.at(text);
            server.place
        }
        Err(error) => format!("{error:#} {error:?}"),
    };
    assert!(!shown.contains(secret), "{shown}");
    if let Err(error) = Primary::parse(text) {
        let shown = format!("{error:#} {error:?}");
        assert!(!shown.contains(secret), "{shown}");
    }
}

/// A check that an entry is read as the same from a range and from a read.
pub fn reply(bytes: &[u8]) {
    let Ok(value) = parse_redis_value(bytes) else {
        return;
    };
    for entries in [
        reply::new_entries(value.clone()),
        reply::counted_entries(value.clone()),
        reply::cursor_and_entries(value.clone()).map(|(_, entries)| entries),
    ] {
        entries.into_iter().flatten().for_each(letter);
    }
    let Ok(entries) = reply::entries(value.clone()) else {
        return;
    };
    let stream = || Value::BulkString(b"jobs".to_vec());
    for read in [
        Value::Map(vec![(stream(), value.clone())]),
        Value::Array(vec![Value::Array(vec![stream(), value])]),
    ] {
        let read = reply::new_entries(read).expect("the entries are those of a range");
        assert_eq!(read.len(), entries.len());
        for (read, entry) in read.iter().zip(&entries) {
            assert_eq!((read.count, read.past), (1, Past::New));
            assert_eq!((&read.id, &read.fields), (&entry.id, &entry.fields));
        }
    }
    entries.into_iter().for_each(letter);
}

fn letter(entry: Entry) {
    let id = entry.id.clone();
    let letter = dead_letter_queue::read(entry).letter;
    assert_eq!(letter.id, Some(id));
}
