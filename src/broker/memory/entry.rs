//! [`Entry`], a job in its queue.

use std::sync::Arc;

use tokio::time::Instant;

use super::{death::Death, properties::Properties};

/// A job in its queue, in any state.
#[derive(Debug)]
pub(super) struct Entry<P> {
    pub(super) payload: P,
    pub(super) properties: Properties,
    /// Number of charged attempts.
    pub(super) attempts: u32,
    pub(super) redelivered: bool,
    /// `true` if its last delivery ended without a settlement.
    pub(super) is_suspect: bool,
    pub(super) death: Option<Arc<Death>>,
    /// `Some` while a consumer has it.
    pub(super) held: Option<Held>,
}

/// Name of a job for as long as it stays in its queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mark {
    pub(super) key: usize,
    message_id: u64,
    death: Option<u64>,
}

impl<P> Entry<P> {
    pub(super) fn mark(&self, key: usize) -> Mark {
        Mark {
            key,
            message_id: self.properties.message_id,
            death: self.death.as_ref().map(|death| death.number),
        }
    }
}

/// Holder of a job.
#[derive(Clone, Copy, Debug)]
pub(super) struct Held {
    pub(super) channel: usize,
    /// The number of the delivery, unique in this broker.
    pub(super) number: u64,
    /// End of its lease.
    pub(super) until: Option<Instant>,
    /// `true` once its consumer has settled it with `Abandon`.
    pub(super) abandoned: bool,
}

/// A job that is handed to a consumer.
#[derive(Debug)]
pub(super) struct Taken<P> {
    pub(super) payload: P,
    pub(super) properties: Properties,
    pub(super) key: usize,
    pub(super) deliveries: u32,
    pub(super) redelivered: bool,
    pub(super) is_suspect: bool,
    pub(super) death: Option<Arc<Death>>,
}
