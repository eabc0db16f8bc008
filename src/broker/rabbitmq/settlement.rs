//! [`Settlement`]: one answer, in one step or two.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use lapin::options::{BasicNackOptions, BasicRejectOptions};

use super::{DeliveryError, DeliveryTag, QueueKind, delivery::Message, headers};
use crate::{Reason, Unsettled, Verdict};

/// The future of a [`DeliveryTag`]'s settlement.
///
/// # Cancel safety
///
/// Not cancel safe: the tag is used up at the first poll. If it is dropped after that, the job may
/// have been republished and not acked.
#[must_use = "a delivery is not settled unless this is polled"]
pub struct Settlement {
    answer: Pin<Box<dyn Future<Output = Result<(), DeliveryError>> + Send>>,
}

impl Settlement {
    pub(super) fn new(tag: DeliveryTag, verdict: Verdict, reason: Reason) -> Self {
        let answer = Box::pin(async move {
            tag.message.claim()?;
            answer(&tag.message, verdict, &reason).await
        });
        Self { answer }
    }
}

impl Future for Settlement {
    type Output = Result<(), Unsettled<DeliveryTag, DeliveryError>>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.answer.as_mut().poll(cx).map_err(Unsettled::last)
    }
}

impl fmt::Debug for Settlement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settlement").finish_non_exhaustive()
    }
}

async fn answer(message: &Message, verdict: Verdict, reason: &Reason) -> Result<(), DeliveryError> {
    let publisher = &message.link.publisher;
    let payload = &message.delivery.data;
    let acker = &message.delivery.acker;
    match verdict {
        Verdict::Ack => {}
        Verdict::Retry { after } => match after.filter(|delay| *delay > Duration::ZERO) {
            Some(delay) => {
                let properties = headers::for_retry(&message.delivery, charged(message), false);
                let queue = publisher.retry_queue(delay).await?;
                // The wait for a new queue may outlast the channel, and then the job is back already.
                message.check()?;
                publisher.retry(queue, payload, properties).await?;
            }
            None if publisher.kind() == QueueKind::Classic => {
                let properties = headers::for_retry(&message.delivery, charged(message), true);
                let queue = publisher.queue().into();
                publisher.retry(queue, payload, properties).await?;
            }
            None => {
                let options = BasicRejectOptions { requeue: true };
                return otherwise(message, acker.reject(options).await);
            }
        },
        Verdict::Release => {
            let options = BasicNackOptions {
                requeue: true,
                multiple: false,
            };
            return otherwise(message, acker.nack(options).await);
        }
        Verdict::Reject => match publisher.dead_letter() {
            Some(target) => {
                let deliveries = message.deliveries();
                let properties = headers::for_dead_letter(&message.delivery, deliveries, reason);
                publisher.bury(target, payload, properties).await?;
            }
            None => {
                let options = BasicRejectOptions { requeue: false };
                return otherwise(message, acker.reject(options).await);
            }
        },
        Verdict::Abandon => return Ok(()),
    }
    sent(message.link.acks.ack(message.place, acker.clone()).await)
}

/// Returns how many deliveries a retry carries on; of an unknown number, those that are known.
fn charged(message: &Message) -> u32 {
    let known = message.counted.before.saturating_add(1);
    message.deliveries().unwrap_or(known)
}

/// Notes that the delivery was answered, and not by an ack.
fn otherwise(message: &Message, result: lapin::Result<bool>) -> Result<(), DeliveryError> {
    if let Ok(true) = result {
        message.link.acks.strike_out(message.place);
    }
    sent(result)
}

/// lapin's `Ok(false)` means that nothing was sent.
fn sent(result: lapin::Result<bool>) -> Result<(), DeliveryError> {
    match result {
        Ok(true) => Ok(()),
        Ok(false) => Err(DeliveryError::NotSent),
        Err(error) => Err(DeliveryError::Client(error)),
    }
}
