//! Names of deliveries, and the server's replies about them.

use ::redis::{ErrorKind, FromRedisValue, ParsingError, RedisError, Value};
use tokio::time::Instant;

/// An entry with its number of deliveries, if that was requested.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) id: String,
    pub(super) count: i64,
    pub(super) past: Past,
    pub(super) fields: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Past of an entry that is delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Past {
    /// It was never given to anybody before.
    New,
    /// It was given back.
    GivenBack,
    /// Its last delivery was not settled, or was given back by `XNACK`.
    Claimed,
}

// Not the client's `StreamReadReply`: it requires UTF-8 in the names of fields, and one entry with another
// name would end the subscription, again and again.

/// Reads the reply of `XREADGROUP` for one stream. Each entry is new, except those that `CLAIM` brought.
pub(super) fn new_entries(reply: Value) -> Result<Vec<Entry>, RedisError> {
    let entries = match reply {
        Value::Nil => return Ok(Vec::new()),
        Value::Map(mut streams) if streams.len() == 1 => streams.swap_remove(0).1,
        Value::Array(mut streams) if streams.len() == 1 => {
            let [_, entries] = parts(streams.swap_remove(0))?;
            entries
        }
        _ => return Err(malformed()),
    };
    let read = |entry| {
        let mut parts = array(entry)?;
        // Idle time and number of earlier deliveries; both are 0 if it is new.
        let earlier = match parts.len() {
            4 => {
                let earlier = parts.split_off(2);
                <(i64, i64)>::from_redis_value(Value::Array(earlier))?
            }
            _ => (0, 0),
        };
        let [id, fields] = self::parts(Value::Array(parts))?;
        let entry = self::entry(id, earlier.1.wrapping_add(1), fields)?;
        Ok(match earlier {
            (0, 0) => Entry {
                past: Past::New,
                ..entry
            },
            _ => entry,
        })
    };
    array(entries)?.into_iter().map(read).collect()
}

/// Reads the entries of a range, which have no count.
pub(super) fn entries(entries: Value) -> Result<Vec<Entry>, RedisError> {
    let read = |entry| {
        let [id, fields] = parts(entry)?;
        self::entry(id, 0, fields)
    };
    array(entries)?.into_iter().map(read).collect()
}

/// Reads the entries of our scripts: id, count, fields.
pub(super) fn counted_entries(entries: Value) -> Result<Vec<Entry>, RedisError> {
    let read = |entry| {
        let [id, count, fields] = parts(entry)?;
        self::entry(id, i64::from_redis_value(count)?, fields)
    };
    array(entries)?.into_iter().map(read).collect()
}

/// Reads a cursor and entries.
pub(super) fn cursor_and_entries(reply: Value) -> Result<(String, Vec<Entry>), RedisError> {
    let [cursor, entries] = parts(reply)?;
    Ok((String::from_redis_value(cursor)?, counted_entries(entries)?))
}

fn entry(id: Value, count: i64, fields: Value) -> Result<Entry, RedisError> {
    let mut flat = array(fields)?.into_iter();
    let mut fields = Vec::with_capacity(flat.len() / 2);
    while let (Some(name), Some(value)) = (flat.next(), flat.next()) {
        fields.push((bytes(name)?, bytes(value)?));
    }
    let id = String::from_redis_value(id)?;
    Ok(Entry {
        id,
        count,
        past: Past::Claimed,
        fields,
    })
}

fn parts<const N: usize>(value: Value) -> Result<[Value; N], RedisError> {
    array(value)?.try_into().map_err(|_| malformed())
}

fn array(value: Value) -> Result<Vec<Value>, RedisError> {
    match value {
        Value::Array(values) => Ok(values),
        _ => Err(malformed()),
    }
}

fn bytes(value: Value) -> Result<Vec<u8>, RedisError> {
    match value {
        Value::BulkString(bytes) => Ok(bytes),
        _ => Err(malformed()),
    }
}

fn malformed() -> RedisError {
    (ErrorKind::UnexpectedReturnType, "not an entry of a stream").into()
}

/// Identity of a delivery: its entry and its count.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DeliveryId {
    pub(super) entry: String,
    /// The server's count, which may be larger than a real number of deliveries.
    pub(super) count: i64,
    /// Time of the request to the server, which is before the delivery.
    pub(super) asked_at: Instant,
}

impl DeliveryId {
    pub(super) fn deliveries(&self) -> u32 {
        // The count of an entry that somebody gave up for good is so large that the next one wraps around.
        u32::try_from(self.count).unwrap_or(u32::MAX)
    }
}

/// Result of a script: whether the entry was found in the expected state.
#[derive(Clone, Copy)]
pub(super) enum Reply {
    Settled,
    Lost,
    SomeLost { lost: usize, of: usize },
    Gone,
    NotReplicated { confirmed: usize, wanted: usize },
}

impl From<&str> for Reply {
    fn from(reply: &str) -> Self {
        match reply {
            "settled" => Reply::Settled,
            "gone" => Reply::Gone,
            _ => Reply::Lost,
        }
    }
}

impl FromRedisValue for Reply {
    fn from_redis_value(value: Value) -> Result<Self, ParsingError> {
        Ok(Reply::from(&*String::from_redis_value(value)?))
    }
}
