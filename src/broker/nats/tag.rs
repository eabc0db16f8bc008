//! [`DeliveryTag`], the handle that settles a delivery.

use std::{
    fmt,
    future::ready,
    sync::Arc,
    time::{Duration, SystemTime},
};

use async_nats::jetstream::AckKind;
use tokio::time::Instant;

use super::{
    dead_letter,
    delivery_error::DeliveryError,
    place::Place,
    schedule::{self, Scheduled},
};
use crate::{
    broker::settlement,
    settle::{Capabilities, Lease, Messaging, Reason, Settle, Unsettled, Verdict},
};

/// Failed settlement, with the way to go on.
enum Failure {
    Again(DeliveryError),
    Moot(DeliveryError),
}

// === impl DeliveryTag ===

/// Handle that settles a [`Delivery`](super::Delivery).
///
/// The [module's documentation](super#verdicts) shows the effect of each verdict.
///
/// A delivery takes one place of the [prefetch](super::Deliveries::prefetch) until it is settled, or until it
/// and all of its tags are dropped.
pub struct DeliveryTag {
    place: Arc<Place>,
    /// `true` if it came back from a settlement that may be tried again.
    is_second_try: bool,
}

impl DeliveryTag {
    pub(super) fn new(place: Arc<Place>) -> Self {
        Self {
            place,
            is_second_try: false,
        }
    }

    /// Returns the sequence number of the message in its stream.
    pub fn stream_sequence(&self) -> u64 {
        self.place.fetched.sequence
    }

    async fn answer(
        self,
        verdict: Verdict,
        reason: Reason,
    ) -> Result<(), Unsettled<Self, DeliveryError>> {
        let result = match verdict {
            Verdict::Abandon => Ok(()),
            Verdict::Ack => self.finish(AckKind::Ack).await.map_err(Failure::Again),
            Verdict::Reject => self.reject(&reason).await.map_err(Failure::Again),
            Verdict::Retry { .. } => self.come_back(verdict.delay(), true).await,
            Verdict::Release { .. } => self.come_back(verdict.delay(), false).await,
        };
        match result {
            Ok(()) => {
                self.place.free();
                Ok(())
            }
            Err(Failure::Again(error)) => {
                let again = Self {
                    place: Arc::clone(&self.place),
                    is_second_try: true,
                };
                Err(Unsettled::again(again, error))
            }
            Err(Failure::Moot(error)) => Err(Unsettled::moot(error)),
        }
    }

    async fn finish(&self, kind: AckKind) -> Result<(), DeliveryError> {
        let limit = self.place.channel.confirm_timeout;
        self.place.confirm(kind, limit).await
    }

    async fn reject(&self, reason: &Reason) -> Result<(), DeliveryError> {
        let Place {
            channel, fetched, ..
        } = &*self.place;
        let suspects = channel.suspects.as_ref().filter(|_| reason.is_suspect());
        if let Some(subject) = suspects {
            dead_letter::publish_suspect(channel, subject, fetched, reason).await?;
        } else if let Some(subject) = &channel.dead_letter {
            dead_letter::publish(channel, subject, fetched, reason).await?;
        }
        self.finish(AckKind::Term).await
    }

    /// Brings the job back by a schedule, if it is delayed and there are schedules, or else by a NAK. Only a
    /// schedule can leave the delivery out of the count.
    async fn come_back(&self, after: Option<Duration>, is_charged: bool) -> Result<(), Failure> {
        let place = &self.place;
        let channel = &place.channel;
        let (Some(delay), Some(prefix)) = (after, &channel.schedules) else {
            return self.give_back(after).await;
        };
        if place.is_unschedulable() {
            return self.give_back(after).await;
        }
        if !place.is_scheduled() {
            if place.is_lapsed() {
                return Err(Failure::Moot(DeliveryError::LeaseLost));
            }
            // A second publish replaces the first.
            let deliveries = place
                .fetched
                .deliveries()
                .saturating_sub(u32::from(!is_charged));
            let scheduling = schedule::publish(channel, prefix, &place.fetched, deliveries, delay);
            match scheduling.await.map_err(Failure::Again)? {
                Scheduled::Kept => place.set_scheduled(),
                Scheduled::Refused => return self.give_back(after).await,
                // The time of this try is over.
                Scheduled::Absent(error) => {
                    place.set_unschedulable();
                    return Err(Failure::Again(DeliveryError::Schedule(error)));
                }
            }
        }
        self.finish(AckKind::Ack).await.map_err(Failure::Again)
    }

    async fn give_back(&self, after: Option<Duration>) -> Result<(), Failure> {
        let place = &self.place;
        // While there is no connection, the client would keep a NAK and send it when the connection is back,
        // perhaps after the ack wait.
        let left = place.channel.connected().await.map_err(Failure::Again)?;
        if place.is_lapsed() {
            return Err(Failure::Moot(DeliveryError::LeaseLost));
        }
        place.channel.warn_of_last_delivery(&place.fetched);
        let confirming = place.confirm(AckKind::Nak(after), left);
        confirming.await.map_err(|error| match error {
            // A NAK concerns the delivery: one that has arrived must not be followed by another, which would
            // take the job from the worker that has it next. Either way the job comes back, at the latest after
            // the ack wait.
            DeliveryError::Unconfirmed { .. } | DeliveryError::Request(_) => Failure::Moot(error),
            error => Failure::Again(error),
        })?;
        if let Some(after) = after {
            place.channel.note_delay(after);
        }
        Ok(())
    }

    fn refusal(&self) -> Option<DeliveryError> {
        if self.place.channel.is_given_up() {
            return Some(DeliveryError::Stale);
        }
        if self.is_second_try {
            return None;
        }
        (!self.place.begin_answer()).then_some(DeliveryError::AlreadySettled)
    }
}

impl Settle for DeliveryTag {
    type Error = DeliveryError;
    type Future = Settlement;

    fn settle(self, verdict: Verdict, reason: Reason) -> Settlement {
        match self.refusal() {
            Some(error) => Settlement::new(ready(Err(Unsettled::last(error)))),
            None => Settlement::new(self.answer(verdict, reason)),
        }
    }

    /// Extends the ack wait by its whole length, with a confirmed `+WPI`.
    ///
    /// Returns [`Lease::Lost`] once the ack wait has passed, by the clock of this process, or the tag was
    /// settled, or its subscription closed. The server does not report it: it confirms a `+WPI` in the same
    /// words if another worker has the job by now.
    async fn keep_alive(&self) -> Result<Lease, DeliveryError> {
        let place = &self.place;
        if place.channel.is_given_up() || place.is_answered() {
            return Ok(Lease::Lost);
        }
        let sent = Instant::now();
        if sent >= place.lease() {
            return Ok(Lease::Lost);
        }
        self.finish(AckKind::Progress).await?;
        // It was confirmed in time, so it arrived in time.
        if place.is_lapsed() {
            return Ok(Lease::Lost);
        }
        place.extend(sent);
        Ok(Lease::Held)
    }

    fn deliveries(&self) -> Option<u32> {
        Some(self.place.fetched.deliveries())
    }

    fn redelivered(&self) -> Option<bool> {
        Some(self.place.fetched.is_redelivered())
    }

    /// Returns whether the server has delivered the message before, if [suspects](super::Pull::suspects) are set.
    fn is_suspect(&self) -> bool {
        let Place {
            channel, fetched, ..
        } = &*self.place;
        channel.suspects.is_some() && fetched.delivered > 1
    }

    fn capabilities(&self) -> Capabilities {
        let channel = &self.place.channel;
        let mut capabilities = Capabilities::none().delay().keep_alive();
        if channel.schedules.is_some() {
            capabilities = capabilities.free_delayed_release();
        }
        if channel.dead_letter.is_some() {
            capabilities = capabilities.dead_letter();
        }
        capabilities
    }

    /// Returns the stream as the destination, since subjects often have ids in them and the destination is in
    /// the names of spans. The message's id is its `Nats-Msg-Id`, or else its sequence number in the stream. The
    /// group is the consumer, if it is durable: the server draws the name of another one.
    fn messaging(&self) -> Option<Messaging<'_>> {
        Some(self.place.description())
    }

    /// Returns the time at which the stream stored the message, by the server's clock. It stays the same when
    /// the message comes back, also by a [schedule](super::Pull::schedules).
    fn published_at(&self) -> Option<SystemTime> {
        Some(self.place.fetched.published)
    }
}

/// A clone settles the same delivery; all but the first settlement are refused.
impl Clone for DeliveryTag {
    fn clone(&self) -> Self {
        Self {
            place: Arc::clone(&self.place),
            is_second_try: false,
        }
    }
}

impl fmt::Debug for DeliveryTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeliveryTag")
            .field("stream_sequence", &self.stream_sequence())
            .field("deliveries", &self.place.fetched.deliveries())
            .finish_non_exhaustive()
    }
}

/// Future of a [`DeliveryTag`]'s settlement.
///
/// # Cancel safety
///
/// Not cancel safe: if it is dropped, the server may or may not have received the settlement.
pub type Settlement = settlement::Settlement<DeliveryTag, DeliveryError>;
