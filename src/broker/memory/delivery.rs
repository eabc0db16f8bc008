//! [`Delivery`], a job that was handed out, and [`DeliveryTag`], the handle that settles it.

use std::{
    borrow::Cow,
    fmt,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use super::{
    death::Death,
    entry::Taken,
    error::DeliveryError,
    properties::Properties,
    state::{Address, Declared},
};
use crate::{
    broker::{dead_letter::SUSPECT_OF, envelope::Envelope},
    job::Job,
    outcome::drop_quietly,
    settle::{Capabilities, Lease, Messaging, Reason, Settle, Unsettled, Verdict},
    time::Timer,
    waiters::Waiter,
};

/// A delivered job.
pub struct Delivery<P> {
    payload: P,
    tag: DeliveryTag<P>,
    death: Option<Arc<Death>>,
}

impl<P> Delivery<P> {
    pub(super) fn new(queue: &Arc<Declared<P>>, taken: Taken<P>, address: Address) -> Self {
        let tag = DeliveryTag {
            queue: Arc::clone(queue),
            address,
            properties: taken.properties,
            deliveries: taken.deliveries,
            redelivered: taken.redelivered,
            is_suspect: taken.is_suspect,
        };
        Self {
            payload: taken.payload,
            tag,
            death: taken.death,
        }
    }

    /// Returns the published payload.
    pub fn payload(&self) -> &P {
        &self.payload
    }

    /// Returns the published payload; the job is still to be settled by its tag.
    pub fn into_payload(self) -> P {
        self.payload
    }

    /// Returns the first header with this name. Case does not matter.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.tag.properties.header(name)
    }

    /// Returns the reason and the origin of the reject, if the job comes from a dead-letter queue or from a
    /// queue of suspects.
    pub fn death(&self) -> Option<&Death> {
        self.death.as_deref()
    }
}

impl<P: Send> Envelope for Delivery<P> {
    fn header(&self, name: &str) -> Option<&str> {
        self.tag.properties.header(name)
    }

    fn message_id(&self) -> Option<Cow<'_, str>> {
        Some(self.tag.properties.message_id.to_string().into())
    }

    fn routing_key(&self) -> &str {
        let suspect_of = self.tag.properties.header(SUSPECT_OF);
        suspect_of.unwrap_or(&self.tag.queue.config.name)
    }

    fn deliveries(&self) -> Option<u32> {
        Some(self.tag.deliveries)
    }

    fn redelivered(&self) -> Option<bool> {
        Some(self.tag.redelivered)
    }
}

impl<P> Job for Delivery<P> {
    type Tag = DeliveryTag<P>;

    fn tag(&self) -> DeliveryTag<P> {
        self.tag.clone()
    }

    /// Returns the [`lease`](super::QueueBuilder::lease) of the queue, if it has one.
    fn lease(&self) -> Option<Duration> {
        self.tag.queue.config.lease
    }

    fn messaging(&self) -> Option<Messaging<'_>> {
        Some(self.tag.description())
    }

    fn queued_since(&self) -> Option<SystemTime> {
        match self.tag.redelivered {
            true => None,
            false => self.tag.published(),
        }
    }
}

impl<P: AsRef<[u8]>> AsRef<[u8]> for Delivery<P> {
    fn as_ref(&self) -> &[u8] {
        self.payload.as_ref()
    }
}

impl<P: fmt::Debug> fmt::Debug for Delivery<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delivery")
            .field("payload", &self.payload)
            .field("tag", &self.tag)
            .field("death", &self.death)
            .finish()
    }
}

/// Handle that settles a [`Delivery`].
///
/// It is valid only on the channel of its [`Deliveries`](super::Deliveries), and only once: the first clone
/// that settles wins. An unsettled job is held until its channel is closed or its
/// [lease](super::QueueBuilder::lease) ends.
///
/// | verdict | effect on the job |
/// | --- | --- |
/// | `Ack` | it is removed |
/// | `Retry` | it comes back with a delivery charged: before the jobs that were never delivered, or when the delay is over |
/// | `Release` | the same, with no delivery charged |
/// | `Reject` | it goes to the [dead-letter queue](super::QueueBuilder::dead_letter) with its reason, or is dropped; a suspect that was not run goes to the [queue of the suspects](super::QueueBuilder::suspects) |
/// | `Abandon` | none: it is held as before, and the tag is used up |
pub struct DeliveryTag<P> {
    queue: Arc<Declared<P>>,
    address: Address,
    properties: Properties,
    deliveries: u32,
    redelivered: bool,
    is_suspect: bool,
}

impl<P> DeliveryTag<P> {
    fn description(&self) -> Messaging<'_> {
        Messaging::new("memory", &*self.queue.config.name)
            .message_id(self.properties.message_id.to_string())
            .traceparent(self.properties.header("traceparent"))
            .tracestate(self.properties.header("tracestate"))
    }

    fn published(&self) -> Option<SystemTime> {
        SystemTime::now().checked_sub(self.properties.published.elapsed())
    }
}

impl<P> Clone for DeliveryTag<P> {
    fn clone(&self) -> Self {
        Self {
            queue: Arc::clone(&self.queue),
            properties: self.properties.clone(),
            ..*self
        }
    }
}

impl<P> fmt::Debug for DeliveryTag<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeliveryTag")
            .field("queue", &self.queue.config.name)
            .field("number", &self.address.number)
            .field("deliveries", &self.deliveries)
            .field("redelivered", &self.redelivered)
            .finish()
    }
}

/// # Errors
///
/// [`DeliveryError::Stale`], [`DeliveryError::LeaseLost`] and [`DeliveryError::AlreadySettled`] use the tag
/// up, since it can't settle anything any more. [`DeliveryError::Injected`] uses it up or not, depending on
/// the fault of [`fail_settlements`](super::Queue::fail_settlements). [`DeliveryError::NoLease`] comes from
/// `keep_alive`, if the queue has no lease.
impl<P: Send> Settle for DeliveryTag<P> {
    type Error = DeliveryError;
    type Future = Settlement<P>;

    fn settle(self, verdict: Verdict, reason: Reason) -> Settlement<P> {
        Settlement {
            answer: Some((self, verdict, reason)),
            delay: None,
        }
    }

    /// Restarts the lease of the job.
    ///
    /// Returns [`Lost`](Lease::Lost) if the job was taken back, since its lease ended or its channel is
    /// closed.
    async fn keep_alive(&self) -> Result<Lease, DeliveryError> {
        let step = self.queue.server.lock().keep_alive(self.address);
        step.finish()
    }

    fn deliveries(&self) -> Option<u32> {
        Some(self.deliveries)
    }

    fn redelivered(&self) -> Option<bool> {
        Some(self.redelivered)
    }

    fn is_suspect(&self) -> bool {
        self.is_suspect && self.queue.config.suspects.is_some()
    }

    fn capabilities(&self) -> Capabilities {
        self.queue.capabilities()
    }

    /// Returns `memory` as the system, the queue as the destination, and a number as the message's id.
    ///
    /// A job keeps its number when it comes back, and as a dead letter.
    fn messaging(&self) -> Option<Messaging<'_>> {
        Some(self.description())
    }

    /// Returns the time of the publish, also when the job comes back, and for a dead letter. It is counted
    /// back from now by tokio's clock, so that it follows a paused time.
    fn published_at(&self) -> Option<SystemTime> {
        self.published()
    }
}

/// The future of a [`DeliveryTag`]'s settlement.
///
/// # Cancel safety
///
/// The delivery is settled in the poll that returns `Ready`. If the future is dropped before, it is not
/// settled.
#[must_use = "a delivery is not settled unless this is polled"]
pub struct Settlement<P> {
    /// `None` once settled.
    answer: Option<(DeliveryTag<P>, Verdict, Reason)>,
    /// Created at the first poll if settlements are delayed, with the number under which the waiter is entered.
    delay: Option<(u64, Timer, Waiter)>,
}

// Nothing in it is pinned in place.
impl<P> Unpin for Settlement<P> {}

impl<P> Future for Settlement<P> {
    type Output = Result<(), Unsettled<DeliveryTag<P>, DeliveryError>>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        // Invariant: a future is not polled again once it was ready.
        let (tag, verdict, reason) = this.answer.take().expect("a settlement is made once");
        let mut state = tag.queue.server.lock();
        let delay = state.settle_delay(tag.address.queue);
        if this.delay.is_some() || !delay.is_zero() {
            // A settlement whose channel is closed is refused at once.
            let new = || (state.next_number(), Timer::after(delay), Waiter::default());
            let (number, timer, waiter) = this.delay.get_or_insert_with(new);
            drop(state);
            waiter.register(cx.waker());
            let watching = tag.queue.server.lock().watch(tag.address, *number, waiter);
            let is_open = watching.is_ok();
            if is_open && timer.poll(cx).is_some_and(|polled| polled.is_pending()) {
                this.answer = Some((tag, verdict, reason));
                return Poll::Pending;
            }
            state = tag.queue.server.lock();
            state.unwatch(tag.address, *number);
        }
        let step = state.settle(tag.address, verdict, reason);
        drop(state);
        Poll::Ready(step.finish().map_err(|refusal| match refusal.error {
            DeliveryError::LeaseLost => Unsettled::moot(refusal.error),
            error if refusal.again => Unsettled::again(tag, error),
            error => Unsettled::last(error),
        }))
    }
}

impl<P> Drop for Settlement<P> {
    fn drop(&mut self) {
        if let (Some((tag, ..)), Some((number, ..))) = (&self.answer, &self.delay) {
            tag.queue.server.lock().unwatch(tag.address, *number);
        }
        if let Some(delay) = self.delay.take() {
            // With the waker.
            drop_quietly(delay);
        }
    }
}

impl<P> fmt::Debug for Settlement<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settlement")
            .field("answer", &self.answer)
            .finish_non_exhaustive()
    }
}
