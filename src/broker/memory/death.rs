//! [`DeadLetter`], and the [`Death`] of its job.

use std::{sync::Arc, time::SystemTime};

use crate::settle::Reason;

/// A job in a dead-letter queue.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct DeadLetter<P> {
    /// The payload of the job.
    pub payload: P,
    /// The reason and the origin of the dead letter.
    pub death: Arc<Death>,
}

/// Reason and origin of a dead letter, like the `x-death` header of RabbitMQ.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Death {
    /// The queue that rejected the job.
    pub queue: Arc<str>,
    /// The reason for the rejection.
    pub reason: Reason,
    /// The number of deliveries in that queue, without those that were released.
    pub deliveries: u32,
    /// The time of the rejection, by the clock of the system, also where time is paused.
    pub time: SystemTime,
    pub(super) number: u64,
}
