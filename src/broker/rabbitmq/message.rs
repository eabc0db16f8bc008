//! [`Message`], a delivery that its job and its tag share, and the [`Link`] to its channel.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    acks::{Acks, Place},
    delivery_error::DeliveryError,
    delivery_limit::DeliveryLimit,
    headers::{self, Counted},
    kind::QueueKind,
    publisher::Publisher,
};
use crate::settle::Messaging;

/// State that the deliveries of one channel share.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) publisher: Arc<Publisher>,
    pub(super) reading: Reading,
    /// Cancelled when the channel is closed or given up.
    pub(super) is_over: CancellationToken,
    /// Set when the server has cancelled the consumer.
    pub(super) is_cancelled: AtomicBool,
    pub(super) acks: Arc<Acks>,
}

/// Known properties of the queue and its server.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reading {
    pub(super) delivery_limit: DeliveryLimit,
    /// `true` if the queue delays rejected jobs.
    pub(super) delayed_retry: bool,
    /// Time after which the server gives a delivery to others.
    pub(super) consumer_timeout: Option<Duration>,
    /// `true` if the server counts no `basic.nack` and takes overdue jobs back by itself, as from 4.3 on.
    pub(super) free_release: bool,
}

#[derive(Debug)]
pub(super) struct Message {
    pub(super) delivery: lapin::message::Delivery,
    pub(super) counted: Counted,
    pub(super) link: Arc<Link>,
    pub(super) place: Place,
    received: Instant,
    is_settled: AtomicBool,
}

impl Message {
    pub(super) fn new(
        delivery: lapin::message::Delivery,
        received: Instant,
        link: &Arc<Link>,
    ) -> Self {
        Self {
            counted: Counted::read(&delivery.properties),
            place: link.acks.enter(delivery.delivery_tag),
            delivery,
            link: Arc::clone(link),
            received,
            is_settled: AtomicBool::new(false),
        }
    }

    /// Uses the tag up.
    pub(super) fn claim(&self) -> Result<(), DeliveryError> {
        if self.is_settled.swap(true, Ordering::AcqRel) {
            return Err(DeliveryError::AlreadySettled);
        }
        self.check()?;
        match self.is_overdue() {
            true => Err(DeliveryError::Lost),
            false => Ok(()),
        }
    }

    /// Checks that the channel on which it can be settled still lives.
    pub(super) fn check(&self) -> Result<(), DeliveryError> {
        if self.link.is_over.is_cancelled() || self.delivery.acker.poisoned() {
            return Err(DeliveryError::Stale);
        }
        Ok(())
    }

    /// Checks that the server has not taken the job back: a republished job would be a copy then.
    pub(super) fn check_held(&self) -> Result<(), DeliveryError> {
        if self.link.is_cancelled.load(Ordering::Acquire) || self.is_overdue() {
            return Err(DeliveryError::Lost);
        }
        Ok(())
    }

    pub(super) fn description(&self) -> Messaging<'_> {
        headers::messaging(&self.delivery, self.link.publisher.queue())
    }

    fn is_overdue(&self) -> bool {
        let limit = self.link.reading.consumer_timeout;
        limit.is_some_and(|limit| self.received.elapsed() >= limit)
    }

    /// Returns whether the server takes a lost job back by itself, or has done so.
    pub(super) fn is_taken_back(&self) -> bool {
        self.link.is_cancelled.load(Ordering::Acquire) || self.release_is_free()
    }

    /// Returns whether the queue itself does not count a release.
    pub(super) fn release_is_free(&self) -> bool {
        let Link {
            publisher, reading, ..
        } = &*self.link;
        let is_free = reading.free_release || self.counted.has_acquired;
        is_free || publisher.kind() == QueueKind::Classic
    }

    /// Returns whether one more requeue that counts brings the job near the limit of its queue.
    pub(super) fn is_near_limit(&self) -> bool {
        let failed = self.counted.by_queue.unwrap_or(0);
        let limit = self.link.reading.delivery_limit;
        self.link.publisher.kind() == QueueKind::Quorum && limit.is_near(failed)
    }

    /// Returns whether the queue drops or dead-letters the job after some more releases, which it counts.
    pub(super) fn is_let_go_of(&self) -> bool {
        !self.release_is_free() && self.is_near_limit()
    }

    /// Returns whether the job is to be given back in another way than by a requeue, which would look like the
    /// end of its worker.
    pub(super) fn is_watched(&self) -> bool {
        self.link.publisher.suspects().is_some()
    }

    /// Returns whether the queue itself tells a released job from one whose worker is gone.
    pub(super) fn release_is_told(&self) -> bool {
        self.link.publisher.kind() == QueueKind::Quorum && self.release_is_free()
    }

    /// Returns whether the queue has requeued the job, and not by a release that can be told from the end of
    /// its worker.
    pub(super) fn is_requeued(&self) -> bool {
        match self.release_is_told() {
            true => self.counted.by_queue.unwrap_or(0) > 0,
            false => self.delivery.redelivered,
        }
    }

    pub(super) fn is_redelivered(&self) -> bool {
        self.delivery.redelivered || self.counted.before.is_some()
    }

    pub(super) fn deliveries(&self) -> Option<u32> {
        let counted = self.counted;
        let by_queue = match self.link.publisher.kind() {
            QueueKind::Classic => counted.by_queue.unwrap_or(0),
            QueueKind::Quorum => match counted.by_queue {
                Some(count) => count,
                // From 4.3 on a delivery that did not fail leaves no count.
                None if !self.delivery.redelivered || counted.has_acquired => 0,
                None => return None,
            },
        };
        let before = counted.before.unwrap_or(0);
        Some(before.saturating_add(by_queue).saturating_add(1))
    }
}
