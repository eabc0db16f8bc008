//! [`Head`] of a job, and [`Crossing`], which makes it.

use std::sync::Arc;

use tokio_util::bytes::{BufMut, BytesMut};

use super::wire::{Rest, put_optional_text, put_text};
use crate::broker::Envelope;

/// The part of a job that crosses beside its bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Head {
    pub(super) headers: Vec<(String, String)>,
    pub(super) message_id: Option<String>,
    pub(super) routing_key: Option<String>,
    pub(super) deliveries: Option<u32>,
    pub(super) redelivered: Option<bool>,
}

impl Head {
    /// Returns the first header called `name`. Case does not matter.
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        let mut headers = self.headers.iter();
        let (_, value) = headers.find(|(other, _)| other.eq_ignore_ascii_case(name))?;
        Some(value)
    }

    /// Adds headers, in place of those with the same names.
    pub(super) fn replace(&mut self, headers: Vec<(String, String)>) {
        for (name, value) in headers {
            self.headers
                .retain(|(other, _)| !other.eq_ignore_ascii_case(&name));
            self.headers.push((name, value));
        }
    }

    pub(super) fn put(&self, buffer: &mut BytesMut) {
        buffer.put_u32(u32::try_from(self.headers.len()).unwrap_or(u32::MAX));
        for (name, value) in self.headers.iter().take(u32::MAX as usize) {
            put_text(buffer, name);
            put_text(buffer, value);
        }
        put_optional_text(buffer, self.message_id.as_deref());
        put_optional_text(buffer, self.routing_key.as_deref());
        // No number of deliveries is 0.
        buffer.put_u32(self.deliveries.unwrap_or(0));
        buffer.put_u8(match self.redelivered {
            None => 0,
            Some(false) => 1,
            Some(true) => 2,
        });
    }

    pub(super) fn take(rest: &mut Rest) -> Option<Self> {
        let number = rest.u32()?;
        let mut headers = Vec::new();
        for _ in 0..number {
            headers.push((rest.text()?, rest.text()?));
        }
        Some(Self {
            headers,
            message_id: rest.optional_text()?,
            routing_key: rest.optional_text()?,
            deliveries: Some(rest.u32()?).filter(|&number| number > 0),
            redelivered: match rest.byte()? {
                0 => None,
                1 => Some(false),
                2 => Some(true),
                _ => return None,
            },
        })
    }
}

// === Crossing ===

/// Choice of what crosses of a job beside its bytes.
///
/// Implemented for [`BytesOnly`] and [`WithHeaders`]. The name appears in error messages; it is not meant to be
/// implemented.
#[diagnostic::on_unimplemented(
    message = "a `ProcessPool` with headers can't take a `{J}`",
    label = "this pool takes the jobs of a broker",
    note = "`ProcessPool::headers` reads an `Envelope`, which the deliveries of all brokers are"
)]
pub trait Crossing<J> {
    /// Returns what crosses beside the bytes.
    fn head(&self, job: &J) -> Head;
}

/// The default [`Crossing`]: the bytes alone.
#[derive(Clone, Copy, Debug)]
pub struct BytesOnly;

impl<J> Crossing<J> for BytesOnly {
    fn head(&self, _: &J) -> Head {
        Head::default()
    }
}

/// The [`Crossing`] of [`ProcessPool::headers`](crate::process::ProcessPool::headers).
#[derive(Clone, Debug)]
pub struct WithHeaders {
    pub(super) names: Arc<[String]>,
}

impl<J: Envelope> Crossing<J> for WithHeaders {
    fn head(&self, job: &J) -> Head {
        let names = self.names.iter();
        let headers = names.filter_map(|name| Some((name.clone(), job.header(name)?.to_owned())));
        Head {
            headers: headers.collect(),
            message_id: job.message_id().map(Into::into),
            routing_key: Some(job.routing_key().to_owned()),
            deliveries: job.deliveries(),
            redelivered: job.redelivered(),
        }
    }
}
