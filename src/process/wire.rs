//! Texts and numbers within a frame.

use tokio_util::bytes::{BufMut, Bytes, BytesMut};

/// Adds a text behind its length.
pub(super) fn put_text(buffer: &mut BytesMut, text: &str) {
    let length = u32::try_from(text.len()).unwrap_or(u32::MAX);
    buffer.put_u32(length);
    buffer.put_slice(&text.as_bytes()[..length as usize]);
}

/// Adds a flag, and a text if there is one.
pub(super) fn put_optional_text(buffer: &mut BytesMut, text: Option<&str>) {
    buffer.put_u8(u8::from(text.is_some()));
    if let Some(text) = text {
        put_text(buffer, text);
    }
}

/// The part of a frame that is not read yet. Each method returns `None` for what is not there.
pub(super) struct Rest(pub(super) Bytes);

impl Rest {
    fn split(&mut self, length: usize) -> Option<Bytes> {
        (self.0.len() >= length).then(|| self.0.split_to(length))
    }

    pub(super) fn byte(&mut self) -> Option<u8> {
        Some(self.split(1)?[0])
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        Some(u32::from_be_bytes(self.split(4)?.as_ref().try_into().ok()?))
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        Some(u64::from_be_bytes(self.split(8)?.as_ref().try_into().ok()?))
    }

    pub(super) fn text(&mut self) -> Option<String> {
        let length = self.u32()?;
        let bytes = self.split(length as usize)?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }

    pub(super) fn optional_text(&mut self) -> Option<Option<String>> {
        match self.byte()? {
            0 => Some(None),
            1 => Some(Some(self.text()?)),
            _ => None,
        }
    }

    /// Returns `value` if nothing is left.
    pub(super) fn end<T>(self, value: T) -> Option<T> {
        self.0.is_empty().then_some(value)
    }
}
