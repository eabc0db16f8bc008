//! [`Frame`]s between a pool and its children.

use std::time::Duration;

use tokio::net::UnixStream;
use tokio_util::{
    bytes::{BufMut, Bytes, BytesMut},
    codec::{Framed, LengthDelimitedCodec},
};

/// Frames on a socket, each behind its length.
pub(super) type Frames = Framed<UnixStream, LengthDelimitedCodec>;

/// Length of the largest frame.
pub(super) const LARGEST: usize = u32::MAX as usize;

const READY: u8 = 0;
const JOB: u8 = 1;
const STARTED: u8 = 2;
const ANSWER: u8 = 3;
const PANIC: u8 = 4;
const CANCEL: u8 = 5;

/// Milliseconds that stand for no limit.
const UNLIMITED: u64 = u64::MAX;

/// Message between a pool and a child.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Frame {
    /// The child waits for jobs.
    Ready,
    /// A job, and the time that it has.
    Job {
        time_left: Option<Duration>,
        bytes: Bytes,
    },
    /// The job before it is to stop. A signal could not say which job it means.
    Cancel,
    /// The child has the job, and starts it.
    Started,
    /// The encoded result of the handler.
    Answer(Bytes),
    /// The handler has panicked.
    Panic {
        message: String,
        location: Option<String>,
    },
}

impl Frame {
    pub(super) fn encode(&self) -> Bytes {
        let mut buffer = BytesMut::new();
        match self {
            Frame::Ready => buffer.put_u8(READY),
            Frame::Started => buffer.put_u8(STARTED),
            Frame::Cancel => buffer.put_u8(CANCEL),
            Frame::Job { time_left, bytes } => {
                let millis = time_left.map_or(UNLIMITED, |left| {
                    u64::try_from(left.as_millis()).unwrap_or(UNLIMITED)
                });
                buffer.reserve(9 + bytes.len());
                buffer.put_u8(JOB);
                buffer.put_u64(millis);
                buffer.put_slice(bytes);
            }
            Frame::Answer(bytes) => {
                buffer.reserve(1 + bytes.len());
                buffer.put_u8(ANSWER);
                buffer.put_slice(bytes);
            }
            Frame::Panic { message, location } => {
                let location = location.as_deref().unwrap_or_default();
                let length = u32::try_from(location.len()).unwrap_or(0);
                buffer.put_u8(PANIC);
                buffer.put_u32(length);
                buffer.put_slice(&location.as_bytes()[..length as usize]);
                buffer.put_slice(message.as_bytes());
            }
        }
        buffer.freeze()
    }

    /// Returns `None` for bytes that are no frame.
    pub(super) fn decode(mut bytes: Bytes) -> Option<Self> {
        if bytes.is_empty() {
            return None;
        }
        let kind = bytes.split_to(1)[0];
        match kind {
            READY if bytes.is_empty() => Some(Frame::Ready),
            STARTED if bytes.is_empty() => Some(Frame::Started),
            CANCEL if bytes.is_empty() => Some(Frame::Cancel),
            JOB => {
                let millis = u64::from_be_bytes(split(&mut bytes, 8)?.as_ref().try_into().ok()?);
                let time_left = (millis != UNLIMITED).then(|| Duration::from_millis(millis));
                Some(Frame::Job { time_left, bytes })
            }
            ANSWER => Some(Frame::Answer(bytes)),
            PANIC => {
                let length = u32::from_be_bytes(split(&mut bytes, 4)?.as_ref().try_into().ok()?);
                let location = split(&mut bytes, length as usize)?;
                let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
                Some(Frame::Panic {
                    message: text(&bytes),
                    location: (!location.is_empty()).then(|| text(&location)),
                })
            }
            _ => None,
        }
    }
}

fn split(bytes: &mut Bytes, at: usize) -> Option<Bytes> {
    (bytes.len() >= at).then(|| bytes.split_to(at))
}

/// Returns the frames of a socket.
pub(super) fn frames(socket: UnixStream) -> Frames {
    let codec = LengthDelimitedCodec::builder()
        .max_frame_length(LARGEST)
        .new_codec();
    Framed::new(socket, codec)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_frame_is_read_as_it_was_written() {
        let bytes = Bytes::from_static(b"\x00\xff job");
        for frame in [
            Frame::Ready,
            Frame::Started,
            Frame::Cancel,
            Frame::Job {
                time_left: None,
                bytes: bytes.clone(),
            },
            Frame::Job {
                time_left: Some(Duration::from_millis(1_500)),
                bytes: Bytes::new(),
            },
            Frame::Answer(bytes),
            Frame::Panic {
                message: "an \u{e4} \0".to_owned(),
                location: Some("src/main.rs:1:2".to_owned()),
            },
            Frame::Panic {
                message: String::new(),
                location: None,
            },
        ] {
            assert_eq!(Frame::decode(frame.encode()), Some(frame));
        }
    }

    #[test]
    fn other_bytes_are_no_frame() {
        for bytes in [
            &b""[..],
            b"\x00\x00",
            b"\x01\x00\x00",
            b"\x02\x00",
            b"\x04\x00\x00\x00\x09short",
            b"\x05\x00",
            b"\x06",
            b"\xff",
        ] {
            assert_eq!(Frame::decode(Bytes::from_static(bytes)), None, "{bytes:?}");
        }
    }
}
