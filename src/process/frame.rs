//! [`Frame`]s between a pool and its children.

use std::time::Duration;

use tokio::net::UnixStream;
use tokio_util::{
    bytes::{BufMut, Bytes, BytesMut},
    codec::{Framed, LengthDelimitedCodec},
};

use super::{
    event::ChildEvent,
    head::Head,
    wire::{Rest, put_optional_text, put_text},
};

/// Frames on a socket, each behind its length.
pub(super) type Frames = Framed<UnixStream, LengthDelimitedCodec>;

/// Length of the largest frame.
pub(super) const LARGEST: usize = u32::MAX as usize;

const READY: u8 = 0;
const JOB: u8 = 1;
const CANCEL: u8 = 2;
const ANSWER: u8 = 3;
const PANIC: u8 = 4;
const EVENT: u8 = 5;

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
        head: Head,
        bytes: Bytes,
    },
    /// The job before it is to stop. A signal could not say which job it means.
    Cancel,
    /// An event of the child, at any time.
    Event(ChildEvent),
    /// The encoded result of the handler, for the job of this number in the child. A second answer is none of the next job.
    Answer { job: u64, bytes: Bytes },
    /// The handler has panicked.
    Panic {
        job: u64,
        message: String,
        location: Option<String>,
    },
}

impl Frame {
    pub(super) fn encode(&self) -> Bytes {
        let mut buffer = BytesMut::new();
        match self {
            Frame::Ready => buffer.put_u8(READY),
            Frame::Cancel => buffer.put_u8(CANCEL),
            Frame::Job {
                time_left,
                head,
                bytes,
            } => {
                return job(*time_left, head, bytes);
            }
            Frame::Event(event) => {
                buffer.put_u8(EVENT);
                event.put(&mut buffer);
            }
            Frame::Answer { job, bytes } => {
                buffer.reserve(9 + bytes.len());
                buffer.put_u8(ANSWER);
                buffer.put_u64(*job);
                buffer.put_slice(bytes);
            }
            Frame::Panic {
                job,
                message,
                location,
            } => {
                buffer.put_u8(PANIC);
                buffer.put_u64(*job);
                put_text(&mut buffer, message);
                put_optional_text(&mut buffer, location.as_deref());
            }
        }
        buffer.freeze()
    }

    /// Returns `None` for bytes that are no frame.
    pub(super) fn decode(bytes: Bytes) -> Option<Self> {
        let mut rest = Rest(bytes);
        match rest.byte()? {
            READY => rest.end(Frame::Ready),
            CANCEL => rest.end(Frame::Cancel),
            JOB => {
                let millis = rest.u64()?;
                Some(Frame::Job {
                    time_left: (millis != UNLIMITED).then(|| Duration::from_millis(millis)),
                    head: Head::take(&mut rest)?,
                    bytes: rest.0,
                })
            }
            EVENT => {
                let event = ChildEvent::take(&mut rest)?;
                rest.end(Frame::Event(event))
            }
            ANSWER => {
                let job = rest.u64()?;
                let bytes = rest.0;
                Some(Frame::Answer { job, bytes })
            }
            PANIC => {
                let (job, message) = (rest.u64()?, rest.text()?);
                let location = rest.optional_text()?;
                rest.end(Frame::Panic {
                    job,
                    message,
                    location,
                })
            }
            _ => None,
        }
    }
}

/// Encodes a [`Frame::Job`] whose bytes are borrowed.
pub(super) fn job(time_left: Option<Duration>, head: &Head, bytes: &[u8]) -> Bytes {
    let millis = time_left.map_or(UNLIMITED, |left| {
        u64::try_from(left.as_millis()).unwrap_or(UNLIMITED)
    });
    let mut buffer = BytesMut::with_capacity(64 + bytes.len());
    buffer.put_u8(JOB);
    buffer.put_u64(millis);
    head.put(&mut buffer);
    buffer.put_slice(bytes);
    buffer.freeze()
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
    use tracing::Level;

    use super::*;

    #[test]
    fn each_frame_is_read_as_it_was_written() {
        let bytes = Bytes::from_static(b"\x00\xff job");
        for frame in [
            Frame::Ready,
            Frame::Cancel,
            Frame::Job {
                time_left: None,
                head: Head::default(),
                bytes: bytes.clone(),
            },
            Frame::Job {
                time_left: Some(Duration::from_millis(1_500)),
                head: Head {
                    headers: vec![("a".to_owned(), "\u{e4}".to_owned()), Default::default()],
                    message_id: Some(String::new()),
                    routing_key: Some("orders".to_owned()),
                    deliveries: Some(u32::MAX),
                    redelivered: Some(true),
                },
                bytes: Bytes::new(),
            },
            Frame::Job {
                time_left: Some(Duration::ZERO),
                head: Head {
                    redelivered: Some(false),
                    ..Head::default()
                },
                bytes: Bytes::new(),
            },
            Frame::Answer { job: 7, bytes },
            Frame::Event(ChildEvent {
                level: Level::ERROR,
                target: "app::jobs".to_owned(),
                message: String::new(),
                fields: None,
            }),
            Frame::Event(ChildEvent {
                level: Level::TRACE,
                target: String::new(),
                message: "\u{e4}".to_owned(),
                fields: Some("a=1".to_owned()),
            }),
            Frame::Panic {
                job: 1,
                message: "an \u{e4} \0".to_owned(),
                location: Some("src/main.rs:1:2".to_owned()),
            },
            Frame::Panic {
                job: 1,
                message: String::new(),
                location: None,
            },
        ] {
            let bytes = frame.encode();
            // All but the payload of a job is needed to its last byte.
            if !matches!(&frame, Frame::Job { bytes, .. } if !bytes.is_empty())
                && !matches!(frame, Frame::Answer { .. })
            {
                for end in 0..bytes.len() {
                    assert_eq!(Frame::decode(bytes.slice(..end)), None);
                }
            }
            assert_eq!(Frame::decode(bytes), Some(frame));
        }
    }

    #[test]
    fn other_bytes_are_no_frame() {
        for bytes in [
            &b""[..],
            b"\x00\x00",
            b"\x01\x00\x00",
            b"\x02\x00",
            b"\x03\x00",
            b"\x04\0\0\0\0\0\0\0\x01\0\0\0\x09short",
            b"\x05",
            b"\x05\x05\0\0\0\0\0\0\0\0\0",
            b"\x06",
            b"\xff",
        ] {
            assert_eq!(Frame::decode(Bytes::from_static(bytes)), None, "{bytes:?}");
        }
    }
}
