//! [`DeadLetter`], and the [`Death`] of its job.

use std::sync::Arc;

use crate::settle::Reason;

/// What lies in a dead-letter queue.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct DeadLetter<P> {
    /// The job.
    pub payload: P,
    /// How it came here.
    pub death: Arc<Death>,
}

/// How a job came into a dead-letter queue: AMQP's `x-death` header.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Death {
    /// The queue that it was in.
    pub queue: Arc<str>,
    /// The outcome that it was rejected for.
    pub reason: Reason,
    /// How often it was delivered there, without what was given back for free.
    pub deliveries: u32,
    pub(super) number: u64,
}
