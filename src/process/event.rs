//! [`ChildEvent`], an event of a child on its way to its pool.

use tokio_util::bytes::{BufMut, BytesMut};
use tracing::Level;

use super::wire::{Rest, put_optional_text, put_text};
use crate::outcome::guard;

/// Levels by their numbers in a frame.
const LEVELS: [Level; 5] = [
    Level::ERROR,
    Level::WARN,
    Level::INFO,
    Level::DEBUG,
    Level::TRACE,
];

/// Event of a child, as texts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ChildEvent {
    pub(super) level: Level,
    pub(super) target: String,
    pub(super) message: String,
    /// All fields but the message: `name=value`, with spaces between.
    pub(super) fields: Option<String>,
}

impl ChildEvent {
    pub(super) fn put(&self, buffer: &mut BytesMut) {
        // Invariant: `LEVELS` has each of them.
        let level = LEVELS.iter().position(|level| *level == self.level);
        buffer.put_u8(level.unwrap_or_default() as u8);
        put_text(buffer, &self.target);
        put_text(buffer, &self.message);
        put_optional_text(buffer, self.fields.as_deref());
    }

    pub(super) fn take(rest: &mut Rest) -> Option<Self> {
        Some(Self {
            level: *LEVELS.get(usize::from(rest.byte()?))?,
            target: rest.text()?,
            message: rest.text()?,
            fields: rest.optional_text()?,
        })
    }

    /// Emits it as an event of this process.
    pub(super) fn emit(&self, pid: Option<u32>) {
        // The level of an event is part of its static metadata.
        macro_rules! event {
            ($level:ident) => {
                tracing::event!(
                    target: "tower_sentinel::process",
                    Level::$level,
                    process.pid = pid,
                    child.target = self.target,
                    child.fields = self.fields,
                    "{}",
                    self.message
                )
            };
        }
        guard(|| match self.level {
            Level::ERROR => event!(ERROR),
            Level::WARN => event!(WARN),
            Level::INFO => event!(INFO),
            Level::DEBUG => event!(DEBUG),
            Level::TRACE => event!(TRACE),
        });
    }
}
