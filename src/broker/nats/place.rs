//! [`Place`] of the prefetch, with the lease of the job that has it.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_nats::jetstream::AckKind;
use tokio::time::Instant;

use super::{channel::Channel, delivery_error::DeliveryError, fetched::Fetched};
use crate::settle::Messaging;

/// One place of the prefetch; freed by the settlement, or when nobody has the delivery any more.
pub(super) struct Place {
    pub(super) channel: Arc<Channel>,
    pub(super) fetched: Fetched,
    /// Time until which the job is certainly ours.
    lease: Mutex<Instant>,
    /// Time that the server waits for a settlement.
    pub(super) wait: Duration,
    answered: AtomicBool,
    freed: AtomicBool,
    /// `true` if the stream stores a schedule that brings the job back.
    scheduled: AtomicBool,
    /// `true` if no stream took the schedule, so that a NAK brings the job back.
    unschedulable: AtomicBool,
}

impl Place {
    pub(super) fn new(channel: Arc<Channel>, fetched: Fetched) -> Self {
        channel.hold();
        let wait = channel.lease(fetched.delivered);
        Self {
            channel,
            lease: Mutex::new(fetched.since + wait),
            wait,
            answered: AtomicBool::new(false),
            freed: AtomicBool::new(false),
            scheduled: AtomicBool::new(false),
            unschedulable: AtomicBool::new(false),
            fetched,
        }
    }

    pub(super) fn description(&self) -> Messaging<'_> {
        let Self {
            channel, fetched, ..
        } = self;
        let mut messaging = Messaging::new("nats", &*channel.stream)
            .traceparent(fetched.header("traceparent"))
            .tracestate(fetched.header("tracestate"));
        messaging.consumer_group = channel.durable.as_deref().map(Into::into);
        match fetched.message_id() {
            Some(id) => messaging.message_id(id),
            None => messaging.message_id(fetched.sequence.to_string()),
        }
    }

    pub(super) fn lease(&self) -> Instant {
        *self.lease.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Restarts the lease, from the time of the request.
    pub(super) fn extend(&self, asked: Instant) {
        *self.lease.lock().unwrap_or_else(PoisonError::into_inner) = asked + self.wait;
    }

    pub(super) fn is_lapsed(&self) -> bool {
        Instant::now() >= self.lease()
    }

    /// Begins the only settlement; `false` if there was one.
    pub(super) fn begin_answer(&self) -> bool {
        !self.answered.swap(true, Ordering::AcqRel)
    }

    pub(super) fn is_answered(&self) -> bool {
        self.answered.load(Ordering::Acquire)
    }

    pub(super) fn free(&self) {
        if !self.freed.swap(true, Ordering::AcqRel) {
            self.channel.free();
        }
    }

    pub(super) fn is_scheduled(&self) -> bool {
        self.scheduled.load(Ordering::Acquire)
    }

    pub(super) fn set_scheduled(&self) {
        self.scheduled.store(true, Ordering::Release);
    }

    pub(super) fn is_unschedulable(&self) -> bool {
        self.unschedulable.load(Ordering::Acquire)
    }

    pub(super) fn set_unschedulable(&self) {
        self.unschedulable.store(true, Ordering::Release);
    }

    pub(super) async fn confirm(
        &self,
        kind: AckKind,
        limit: Duration,
    ) -> Result<(), DeliveryError> {
        let reply = self.fetched.reply.clone();
        self.channel.confirm(reply, kind, limit).await
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.free();
    }
}
