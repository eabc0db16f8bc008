//! Settlements that fail on demand.

use std::time::Duration;

/// Kind of failure of a settlement; see [`Queue::fail_settlements`](super::Queue::fail_settlements).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SettleFault {
    /// The tag comes back and may be settled again.
    Again,
    /// The tag is used up, like RabbitMQ's acker: only the end of its channel frees the job.
    Last,
}

/// Faults to inject: how many settlements fail in each way, and the delay of all.
#[derive(Debug, Default)]
pub(super) struct Faults {
    pub(super) again: u32,
    pub(super) last: u32,
    pub(super) delay: Duration,
}

impl Faults {
    pub(super) fn next(&mut self) -> Option<SettleFault> {
        for (left, fault) in [
            (&mut self.again, SettleFault::Again),
            (&mut self.last, SettleFault::Last),
        ] {
            if *left > 0 {
                *left -= 1;
                return Some(fault);
            }
        }
        None
    }
}
