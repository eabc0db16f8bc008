//! [`Settlement`], the future that settles a delivery, in one step or two.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use lapin::options::{BasicNackOptions, BasicRejectOptions};

use tokio::time::{sleep, timeout};

use super::{
    delivery::DeliveryTag, delivery_error::DeliveryError, headers, kind::QueueKind,
    message::Message, republished,
};
use crate::{
    broker::settlement,
    outcome::guard,
    settle::{
        Capabilities, Lease, Messaging, Reason, Settle, Unsettled, Verdict, policy::TRY_TIMEOUT,
    },
};

/// Time that a job is kept that can't be republished, before it is given back.
const PAUSE: Duration = Duration::from_secs(1);

/// # Errors
///
/// Each uses the tag up, and the channel has to be given up after it. Exceptions are those that are
/// [misconfigured](crate::settle::Unsettled::misconfigured) or [moot](crate::settle::Unsettled::moot), see
/// [Jobs that can't be republished](crate::_guide::rabbitmq#jobs-that-cant-be-republished). A job that is
/// [lost](DeliveryError::Lost) to a server that takes it back by itself is moot, too.
///
/// If the runtime on which lapin connected has ended, lapin may never report the result of an ack: a
/// [`SettlePolicy`](crate::SettlePolicy) gives up after its time limit.
impl Settle for DeliveryTag {
    type Error = DeliveryError;
    type Future = Settlement;

    fn settle(self, verdict: Verdict, reason: Reason) -> Settlement {
        Settlement::new(settle(self, verdict, reason))
    }

    /// Fails: RabbitMQ has no keep-alive.
    async fn keep_alive(&self) -> Result<Lease, DeliveryError> {
        Err(DeliveryError::NoKeepAlive)
    }

    fn deliveries(&self) -> Option<u32> {
        self.message.deliveries()
    }

    fn redelivered(&self) -> Option<bool> {
        Some(self.message.is_redelivered())
    }

    /// Returns whether the queue has requeued the job by itself, if [suspects](super::Queue::suspects) are set.
    fn is_suspect(&self) -> bool {
        self.message.is_watched() && self.message.is_requeued()
    }

    fn capabilities(&self) -> Capabilities {
        let link = &self.message.link;
        let mut capabilities = Capabilities::none().delay().free_delayed_release();
        if link.publisher.dead_letter().is_some() {
            capabilities = capabilities.dead_letter();
        }
        if self.message.release_is_free() || self.message.is_watched() {
            capabilities = capabilities.free_release();
        }
        capabilities
    }

    /// Returns the destination as `{exchange}:{routing key}:{queue}`, as in the [conventions for
    /// RabbitMQ](https://opentelemetry.io/docs/specs/semconv/messaging/rabbitmq/): empty parts are left out,
    /// and so is a routing key that is the queue's name. They are those of the first publish, also for a
    /// republished job. Metrics have the queue alone.
    fn messaging(&self) -> Option<Messaging<'_>> {
        Some(self.message.description())
    }

    /// Returns the header `timestamp_in_ms`, or else the property `timestamp`, which has whole seconds.
    ///
    /// The publisher sets them, or the server by its [message
    /// interceptor](https://www.rabbitmq.com/docs/message-interceptors). A job that is republished keeps them,
    /// unless the interceptor overwrites them.
    fn published_at(&self) -> Option<SystemTime> {
        headers::published_at(&self.message.delivery.properties)
    }
}

/// Future of a [`DeliveryTag`]'s settlement.
///
/// # Cancel safety
///
/// Not cancel safe: the tag is used up at the first poll. If it is dropped after that, the job may
/// have been republished and not acked.
pub type Settlement = settlement::Settlement<DeliveryTag, DeliveryError>;

/// Time that a settlement waits for the server to take a republished job.
///
/// A try to settle that takes longer would cost the other jobs their channel.
const LIMIT: Duration = Duration::from_secs(4);
const _: () = assert!(LIMIT.as_millis() < TRY_TIMEOUT.as_millis());

type Failed = Unsettled<DeliveryTag, DeliveryError>;

async fn settle(tag: DeliveryTag, verdict: Verdict, reason: Reason) -> Result<(), Failed> {
    let message = tag.message;
    let answered = match message.claim() {
        Ok(()) => in_time(&message, verdict, &reason).await,
        Err(error) => Err(error),
    };
    let answered = match answered {
        Err(error) if error.passes() && message.is_let_go_of() => {
            let answering = answer(Arc::clone(&message), verdict, reason.clone());
            keep(Arc::clone(&message), verdict, reason, Box::pin(answering));
            Err(error)
        }
        Err(error) if error.gives_back() => Err(give_back(&message, error).await),
        answered => answered,
    };
    answered.map_err(|error| failed(&message, error))
}

/// Settles a job, or keeps it if that takes too long.
async fn in_time(
    message: &Arc<Message>,
    verdict: Verdict,
    reason: &Reason,
) -> Result<(), DeliveryError> {
    let answering = answer(Arc::clone(message), verdict, reason.clone());
    if let Verdict::Ack = verdict {
        // It waits for no server.
        return answering.await;
    }
    let mut answering = Box::pin(answering);
    match timeout(LIMIT, &mut answering).await {
        Ok(answered) => answered,
        Err(_) => {
            keep(Arc::clone(message), verdict, reason.clone(), answering);
            Err(DeliveryError::NotYetConfirmed)
        }
    }
}

/// Returns the failure with its reach.
///
/// A lost job is moot if the server takes it back, or has done so. A server that does not know a queue's
/// consumer timeout still waits for a settlement.
fn failed(message: &Message, error: DeliveryError) -> Failed {
    match error {
        DeliveryError::Lost if message.is_taken_back() => Unsettled::moot(error),
        error => error.unsettled(),
    }
}

async fn answer(
    message: Arc<Message>,
    verdict: Verdict,
    reason: Reason,
) -> Result<(), DeliveryError> {
    let message = &*message;
    let publisher = &message.link.publisher;
    let frame_max = publisher.frame_max();
    let payload = &message.delivery.data;
    let acker = &message.delivery.acker;
    // Until the original is acked.
    let mut _moving = None;
    match verdict {
        Verdict::Ack => {}
        Verdict::Retry { .. } => match Way::new(message, verdict.delay()) {
            Way::Reject => {
                let options = BasicRejectOptions { requeue: true };
                return otherwise(message, acker.reject(options).await);
            }
            Way::EndOfQueue => republish(message, charged(message)).await?,
            Way::RetryQueue(delay) => delayed(message, delay, charged(message)).await?,
        },
        Verdict::Release { .. } => {
            // The next delivery raises the count again.
            let deliveries = charged(message).saturating_sub(1);
            match verdict.delay() {
                Some(delay) => delayed(message, delay, deliveries).await?,
                None if message.is_let_go_of() => republish(message, deliveries).await?,
                None if message.is_watched() && !message.release_is_told() => {
                    republish(message, deliveries).await?;
                }
                None => return release(message).await,
            }
        }
        Verdict::Reject => {
            let suspects = publisher.suspects().filter(|_| reason.is_suspect());
            let target = match suspects {
                Some((target, moves)) => {
                    _moving = Some(moves.begin());
                    Some(target)
                }
                None => publisher.dead_letter(),
            };
            let Some(target) = target else {
                let options = BasicRejectOptions { requeue: false };
                return otherwise(message, acker.reject(options).await);
            };
            message.check_held()?;
            let rejected = republished::Rejected {
                message: &message.delivery,
                queue: publisher.queue(),
                deliveries: message.deliveries(),
                is_suspect: suspects.is_some(),
            };
            let properties = rejected.properties(&reason, frame_max)?;
            publisher.reject(target, payload, properties).await?;
        }
        Verdict::Abandon => return Ok(()),
    }
    sent(message.link.acks.ack(message.place, acker.clone()).await)
}

/// Way by which a job is retried.
enum Way {
    /// By `basic.reject`, after the queue's own delay if it has one.
    Reject,
    /// At once, to the end of its queue.
    EndOfQueue,
    /// By a queue that keeps it for this time.
    RetryQueue(Duration),
}

impl Way {
    fn new(message: &Message, delay: Option<Duration>) -> Self {
        let link = &message.link;
        let is_quorum = link.publisher.kind() == QueueKind::Quorum;
        let may_reject = is_quorum && !message.is_near_limit() && !message.is_watched();
        match delay {
            // A queue with its own delay delays exactly the rejected jobs.
            Some(_) if link.reading.delayed_retry && may_reject => Way::Reject,
            Some(delay) => Way::RetryQueue(delay),
            None if !link.reading.delayed_retry && may_reject => Way::Reject,
            None => Way::EndOfQueue,
        }
    }
}

/// Publishes a job to the end of its queue, with `deliveries` made so far.
async fn republish(message: &Message, deliveries: u32) -> Result<(), DeliveryError> {
    message.check_held()?;
    let publisher = &message.link.publisher;
    let frame_max = publisher.frame_max();
    let properties = republished::for_retry(&message.delivery, deliveries, true, frame_max)?;
    publisher.retry(&message.delivery.data, properties).await
}

/// Publishes a job to the queue that keeps it for `delay`, with `deliveries` made so far.
async fn delayed(message: &Message, delay: Duration, deliveries: u32) -> Result<(), DeliveryError> {
    message.check_held()?;
    let publisher = &message.link.publisher;
    let frame_max = publisher.frame_max();
    let properties = republished::for_retry(&message.delivery, deliveries, false, frame_max)?;
    let is_held = || message.check().and_then(|()| message.check_held());
    let payload = &message.delivery.data;
    publisher.delay(delay, payload, properties, is_held).await
}

async fn release(message: &Message) -> Result<(), DeliveryError> {
    let options = BasicNackOptions {
        requeue: true,
        multiple: false,
    };
    otherwise(message, message.delivery.acker.nack(options).await)
}

/// Goes on to settle a job in a task. Until it is settled it keeps its place, unless the channel ends.
fn keep(
    message: Arc<Message>,
    verdict: Verdict,
    reason: Reason,
    answering: Pin<Box<impl Future<Output = Result<(), DeliveryError>> + Send + 'static>>,
) {
    let kept = Arc::clone(&message);
    let settling = async move {
        let mut answered = answering.await;
        loop {
            match answered {
                // It has waited already.
                Err(DeliveryError::Blocked) if message.is_let_go_of() => {}
                Err(DeliveryError::NotConfirmed) if message.is_let_go_of() => sleep(PAUSE).await,
                Err(error) => return Err(give_back(&message, error).await),
                Ok(()) => return Ok(()),
            }
            answered = match message.check() {
                Ok(()) => answer(Arc::clone(&message), verdict, reason.clone()).await,
                Err(stale) => Err(stale),
            };
        }
    };
    tokio::spawn(async move {
        let settled = kept.link.is_over.run_until_cancelled(settling).await;
        if let Some(Err(error)) = settled {
            guard(|| {
                tracing::warn!(error = format_args!("{error:#}"), "kept job not settled");
            });
        }
    });
}

/// Gives back a job that can't be republished, so that it does not keep its place.
///
/// Returns `error`, or the error of the attempt to give it back.
async fn give_back(message: &Message, error: DeliveryError) -> DeliveryError {
    if let DeliveryError::NoRoom { .. } | DeliveryError::NotConfirmed = error {
        // The job would come back at once, and fail again.
        sleep(PAUSE).await;
    }
    let given_back = match message.check() {
        Ok(()) => release(message).await,
        Err(stale) => Err(stale),
    };
    given_back.err().unwrap_or(error)
}

/// Returns the number of deliveries that a retry carries on; if it is unknown, the known part of it.
fn charged(message: &Message) -> u32 {
    let known = message.counted.before.unwrap_or(0).saturating_add(1);
    message.deliveries().unwrap_or(known)
}

/// Notes that the delivery was settled in another way than by an ack.
fn otherwise(message: &Message, result: lapin::Result<bool>) -> Result<(), DeliveryError> {
    if let Ok(true) = result {
        message.link.acks.strike_out(message.place);
    }
    sent(result)
}

/// Returns the result of a send; lapin's `Ok(false)` means that nothing was sent.
fn sent(result: lapin::Result<bool>) -> Result<(), DeliveryError> {
    match result {
        Ok(true) => Ok(()),
        Ok(false) => Err(DeliveryError::NotSent),
        Err(error) => Err(DeliveryError::Client(error)),
    }
}
