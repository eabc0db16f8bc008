//! [`Properties`] of a job, beside its payload.

use std::sync::Arc;

use tokio::time::Instant;

pub(super) type Headers = Arc<[(String, String)]>;

/// Properties of a job, which it keeps when it comes back and in a dead-letter queue.
#[derive(Clone, Debug)]
pub(super) struct Properties {
    /// The number of the job, unique in this broker.
    pub(super) message_id: u64,
    /// By tokio's clock, which tests may pause.
    pub(super) published: Instant,
    /// `None` if there are none, so that a job without headers needs no allocation.
    pub(super) headers: Option<Headers>,
}

impl Properties {
    /// Replaces the headers with this name by one. Case does not matter.
    pub(super) fn set(&mut self, name: &str, value: String) {
        let headers = self.headers.iter().flat_map(|headers| headers.iter());
        let others = headers.filter(|(key, _)| !key.eq_ignore_ascii_case(name));
        let set = (name.to_owned(), value);
        self.headers = Some(others.cloned().chain([set]).collect());
    }

    /// Removes the headers with this name, and returns the value of the first. Case does not matter.
    pub(super) fn remove(&mut self, name: &str) -> Option<String> {
        let removed = self.header(name)?.to_owned();
        let headers = self.headers.take()?;
        let others = headers.iter();
        let others = others.filter(|(key, _)| !key.eq_ignore_ascii_case(name));
        let others: Headers = others.cloned().collect();
        self.headers = Some(others).filter(|others| !others.is_empty());
        Some(removed)
    }

    /// Returns the first header with this name. Case does not matter.
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        let mut headers = self.headers.iter().flat_map(|headers| headers.iter());
        headers.find_map(|(key, value)| key.eq_ignore_ascii_case(name).then_some(&**value))
    }
}
