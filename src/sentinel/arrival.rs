//! [`LimitedDeliveries`]: looks at the count of a delivery before its job runs.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use crate::{
    job::TimeLimit,
    outcome::{CancelReason, guard},
    sentinel::hooks::{Tagging, sealed},
    settle::Settle,
};

/// The [`Tagging`] of [`SentinelLayer::delivery_limit`](crate::SentinelLayer::delivery_limit).
#[derive(Clone, Debug)]
pub struct LimitedDeliveries<G> {
    tagging: G,
    limit: u32,
    /// Whether it was said that the broker does not count; shared by all clones.
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

    fn refusal(&self, tag: &G::Tag) -> Option<CancelReason> {
        let Some(deliveries) = tag.deliveries() else {
            if !self.told.swap(true, Ordering::Relaxed) {
                guard(|| {
                    tracing::warn!(
                        limit = self.limit,
                        "broker does not tell how often a job was delivered: it runs without a delivery limit"
                    );
                });
            }
            return None;
        };
        (deliveries > self.limit).then_some(CancelReason::DeliveryLimit)
    }
}
