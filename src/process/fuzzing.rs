//! Properties that hold for any bytes, for the targets in `fuzz`.

use tokio_util::bytes::Bytes;

use super::{frame::Frame, limits::Limits};

/// A check that a frame is written as it is read, and that a part of it is no frame.
pub fn frame(bytes: &[u8]) {
    let Some(frame) = Frame::decode(Bytes::copy_from_slice(bytes)) else {
        return;
    };
    let written = frame.encode();
    assert_eq!(Frame::decode(written.clone()).as_ref(), Some(&frame));
    // The bytes of a job and of an answer have no length of their own.
    if !matches!(frame, Frame::Job { .. } | Frame::Answer { .. }) {
        let end = bytes.iter().map(|&byte| usize::from(byte)).sum::<usize>() % written.len();
        assert_eq!(Frame::decode(written.slice(..end)), None);
    }
}

/// A check that limits are read as they are written.
pub fn limits(text: &str) {
    if let Some(limits) = Limits::parse(text) {
        assert_eq!(Limits::parse(&limits.to_string()), Some(limits));
    }
}
