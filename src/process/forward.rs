//! [`Forward`], a subscriber that sends the events of a child to its pool.

use std::{
    fmt::{self, Debug, Write},
    sync::Arc,
};

use tracing::{
    Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
    level_filters::LevelFilter,
    span::{Attributes, Id, Record},
};

use super::{event::ChildEvent, frame::Frame, sender::Sender};
use crate::outcome::guard;

/// Number of bytes of the message of an event, and of its fields.
const LONGEST: usize = 8 << 10;

/// Subscriber that sends each event, and keeps no span.
pub(super) struct Forward {
    pub(super) level: Level,
    pub(super) sender: Arc<Sender>,
}

impl Subscriber for Forward {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() <= self.level
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.level.into())
    }

    fn event(&self, event: &Event<'_>) {
        let (mut message, mut fields) = (Text::default(), Text::default());
        // A `Debug` of the user.
        guard(|| {
            event.record(&mut Texts {
                message: &mut message,
                fields: &mut fields,
            });
        });
        let metadata = event.metadata();
        let event = ChildEvent {
            level: *metadata.level(),
            target: metadata.target().to_owned(),
            message: message.0,
            fields: (!fields.0.is_empty()).then_some(fields.0),
        };
        // It fails when the parent is gone. Then this process ends.
        self.sender.send(&Frame::Event(event)).ok();
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        // Not reached: spans are not enabled.
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// Text that ends at `LONGEST` bytes.
#[derive(Default)]
struct Text(String);

impl Write for Text {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut end = text.len().min(LONGEST - self.0.len());
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        self.0.push_str(&text[..end]);
        match end == text.len() {
            true => Ok(()),
            false => Err(fmt::Error),
        }
    }
}

struct Texts<'a> {
    message: &'a mut Text,
    fields: &'a mut Text,
}

impl Visit for Texts<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        // An error says that the text is full.
        let _full = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => {
                let space = if self.fields.0.is_empty() { "" } else { " " };
                write!(self.fields, "{space}{name}={value:?}")
            }
        };
    }
}
