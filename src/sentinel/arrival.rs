//! [`LimitedDeliveries`]: a check of the earlier deliveries before a job runs.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use crate::{
    job::TimeLimit,
    outcome::{CancelReason, guard},
    sentinel::hooks::{Tagging, sealed},
    settle::Settle,
    telemetry::messaging::Messaging,
};

/// The [`Tagging`] of [`SentinelLayer::delivery_limit`](crate::SentinelLayer::delivery_limit).
#[derive(Clone, Debug)]
pub struct LimitedDeliveries<G> {
    tagging: G,
    limit: u32,
    /// `true` once the warning of a broker that does not count is out; shared by all clones.
    told: Arc<AtomicBool>,
}

impl<G> LimitedDeliveries<G> {
    pub(crate) fn new(tagging: G, limit: u32) -> Self {
        Self {
            tagging,
            limit,
            told: Arc::default(),
        }
    }
}

impl<J, G: Tagging<J>> sealed::Tagging<J> for LimitedDeliveries<G> {}

impl<J, G> Tagging<J> for LimitedDeliveries<G>
where
    G: Tagging<J, Tag: Settle>,
{
    type Tag = G::Tag;

    fn tag(&self, job: &J) -> G::Tag {
        self.tagging.tag(job)
    }

    fn time_limit(&self, job: &J) -> TimeLimit {
        self.tagging.time_limit(job)
    }

    fn lease(&self, job: &J) -> Option<Duration> {
        self.tagging.lease(job)
    }

    fn messaging<'a>(&self, job: &'a J) -> Option<Messaging<'a>> {
        self.tagging.messaging(job)
    }

    fn queued_since(&self, job: &J) -> Option<SystemTime> {
        self.tagging.queued_since(job)
    }

    fn refusal(&self, tag: &G::Tag) -> Option<CancelReason> {
        if tag.is_suspect() {
            return Some(CancelReason::Suspect);
        }
        let Some(deliveries) = tag.deliveries() else {
            if !self.told.swap(true, Ordering::Relaxed) {
                guard(|| {
                    tracing::warn!(
                        limit = self.limit,
                        "job running without a delivery limit: the broker does not count deliveries"
                    );
                });
            }
            return None;
        };
        (deliveries > self.limit).then_some(CancelReason::DeliveryLimit)
    }
}
