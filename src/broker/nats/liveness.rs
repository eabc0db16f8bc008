//! [`Liveness`] of JetStream, and the reason if it delivers nothing.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use async_nats::jetstream::{
    consumer::{Info, PullConsumer},
    context::ConsumerInfoError,
};
use tokio::time::{Instant, Sleep, sleep};

use super::SubscriptionError;
use crate::outcome::guard;

/// Interval between two checks of the connection.
const TICK: Duration = Duration::from_millis(250);

/// Time of the server's last sign of life, and the request that asks whether the consumer still exists.
pub(super) struct Liveness {
    consumer: Arc<PullConsumer>,
    reconnect_limit: Duration,
    check: Option<Pin<Box<dyn Future<Output = Result<Info, ConsumerInfoError>> + Send>>>,
    tick: Pin<Box<Sleep>>,
    /// Time of the server's last sign of life.
    heard: Instant,
    /// Time of the last delivery, or of the last request for the reason that there is none.
    eventful: Instant,
    idleness: Option<Idleness>,
}

/// Reason why a live consumer delivers nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Idleness {
    Paused,
    /// The unacked messages have reached the consumer's limit.
    Full,
}

/// Returns the consumer's limit of unacked messages, if they have reached it.
pub(super) fn unacked_limit(info: &Info) -> Option<usize> {
    let limit = usize::try_from(info.config.max_ack_pending).ok()?;
    (limit > 0 && info.num_ack_pending >= limit).then_some(limit)
}

impl Liveness {
    pub(super) fn new(consumer: Arc<PullConsumer>, reconnect_limit: Duration) -> Self {
        Self {
            consumer,
            reconnect_limit,
            check: None,
            tick: Box::pin(sleep(TICK)),
            heard: Instant::now(),
            eventful: Instant::now(),
            idleness: None,
        }
    }

    /// Logs why the consumer delivers nothing, each time that the reason changes.
    pub(super) fn observe(&mut self, info: &Info) {
        let limit = unacked_limit(info).filter(|_| info.num_pending > 0);
        let idleness = match (info.paused, limit) {
            (true, _) => Some(Idleness::Paused),
            (false, Some(_)) => Some(Idleness::Full),
            (false, None) => None,
        };
        let before = std::mem::replace(&mut self.idleness, idleness);
        if before == idleness {
            return;
        }
        let (stream, consumer) = (&info.stream_name, &info.name);
        match idleness {
            Some(Idleness::Paused) => guard(|| {
                tracing::warn!(
                    stream,
                    consumer,
                    remaining = ?info.pause_remaining,
                    "consumer paused: it delivers nothing until it is resumed"
                );
            }),
            Some(Idleness::Full) => guard(|| {
                tracing::warn!(
                    stream,
                    consumer,
                    unacked = info.num_ack_pending,
                    max_ack_pending = limit,
                    waiting = info.num_pending,
                    "consumer stalled: it delivers nothing while `max_ack_pending` jobs are unacked or delayed"
                );
            }),
            None => guard(|| tracing::info!(stream, consumer, "consumer delivers again")),
        }
    }

    /// Notes a delivery.
    pub(super) fn deliver(&mut self) {
        self.eventful = Instant::now();
        if self.idleness.take().is_some() {
            let info = self.consumer.cached_info();
            let (stream, consumer) = (&info.stream_name, &info.name);
            guard(|| tracing::info!(stream, consumer, "consumer delivers again"));
        }
    }

    /// Requests the reason if the consumer has delivered nothing for longer than `patience`.
    pub(super) fn check_if_idle(&mut self, patience: Duration) {
        if self.eventful.elapsed() > patience {
            self.eventful = Instant::now();
            self.check();
        }
    }

    /// Returns the time of the server's last sign of life.
    pub(super) fn heard(&self) -> Instant {
        self.heard
    }

    /// Notes a sign of life.
    pub(super) fn hear(&mut self) {
        self.heard = Instant::now();
    }

    /// Waits until the next check of the connection is due; an error if the silence lasts too long.
    pub(super) fn poll_tick(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), SubscriptionError>> {
        ready!(self.tick.as_mut().poll(cx));
        let now = Instant::now();
        self.tick.as_mut().reset(now + TICK);
        let silence = now - self.heard;
        if silence > self.reconnect_limit {
            return Poll::Ready(Err(SubscriptionError::Unreachable { silence }));
        }
        Poll::Ready(Ok(()))
    }

    /// Requests the state of the consumer, unless such a request is open.
    pub(super) fn check(&mut self) {
        if self.check.is_none() {
            let consumer = Arc::clone(&self.consumer);
            self.check = Some(Box::pin(async move { consumer.get_info().await }));
        }
    }

    /// Waits for the response; an error if there is no consumer.
    pub(super) fn poll_check(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), SubscriptionError>> {
        let Some(check) = &mut self.check else {
            return Poll::Pending;
        };
        let result = ready!(check.as_mut().poll(cx));
        self.check = None;
        match result {
            Ok(info) => {
                self.hear();
                self.observe(&info);
            }
            Err(error) => match SubscriptionError::deleted(&error) {
                Some(deleted) => return Poll::Ready(Err(deleted)),
                None => guard(|| tracing::debug!(%error, "jetstream does not respond")),
            },
        }
        Poll::Ready(Ok(()))
    }

    /// Stops the requests.
    pub(super) fn close(&mut self) {
        self.check = None;
    }
}
