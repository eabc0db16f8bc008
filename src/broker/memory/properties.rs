//! [`Properties`]: what a job bears beside its payload.

use std::sync::Arc;

pub(super) type Headers = Arc<[(String, String)]>;

/// The properties of a job; it keeps them wherever it goes, also into a dead-letter queue.
#[derive(Clone, Debug)]
pub(super) struct Properties {
    /// The number of the job: of no other, in this broker.
    pub(super) message_id: u64,
    /// `None` if there are none, so that a job without headers is no allocation.
    pub(super) headers: Option<Headers>,
}

impl Properties {
    /// Returns the first header of this name, in whichever case.
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        let mut headers = self.headers.iter().flat_map(|headers| headers.iter());
        headers.find_map(|(key, value)| key.eq_ignore_ascii_case(name).then_some(&**value))
    }
}
