//! Counts of a group and its consumer, for a probe.

use std::sync::Arc;

use ::redis::RedisError;

use super::{error::DeliveryError, link::Link, scripts};
use crate::consumer::{Probe, ProbeError};

impl Link {
    /// Counts over the connection that settles; `received` entries wait here.
    pub(super) async fn probe(self: Arc<Self>, received: usize) -> Result<Probe, ProbeError> {
        if self.is_stale() {
            return Err(ProbeError::new(self.loss()));
        }
        let mut script = scripts::COUNTS.prepare_invoke();
        script
            .key(&self.keys.stream)
            .key(&self.keys.delayed)
            .arg(&self.group)
            .arg(&self.consumer);
        let counted: Result<(u64, u64, u64, u64), RedisError> = self.invoke(&script).await;
        let counted = counted.map_err(|error| ProbeError::new(DeliveryError::of(error)));
        let (new, due, pending, pending_for_all) = counted?;
        Ok(Probe::new()
            .waiting(new + due + received as u64)
            .unsettled(pending)
            .leases()
            .detail("due", due)
            .detail("pending for all consumers", pending_for_all))
    }
}
