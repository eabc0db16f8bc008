//! [`Liveness`]: whether JetStream still gives signs of life.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use async_nats::jetstream::{consumer::PullConsumer, context::ConsumerInfoError};
use tokio::time::{Instant, Sleep, sleep};

use super::SubscriptionError;

/// How often the connection is looked at.
const TICK: Duration = Duration::from_millis(250);

/// When the server was heard last, and the question whether the consumer still exists.
pub(super) struct Liveness {
    consumer: Arc<PullConsumer>,
    reconnect_limit: Duration,
    check: Option<Pin<Box<dyn Future<Output = Result<(), ConsumerInfoError>> + Send>>>,
    tick: Pin<Box<Sleep>>,
    /// When the server gave its last sign of life.
    heard: Instant,
}

impl Liveness {
    pub(super) fn new(consumer: Arc<PullConsumer>, reconnect_limit: Duration) -> Self {
        Self {
            consumer,
            reconnect_limit,
            check: None,
            tick: Box::pin(sleep(TICK)),
            heard: Instant::now(),
        }
    }

    /// Returns when the server gave its last sign of life.
    pub(super) fn heard(&self) -> Instant {
        self.heard
    }

    /// Notes a sign of life.
    pub(super) fn hear(&mut self) {
        self.heard = Instant::now();
    }

    /// Waits until the connection is to be looked at; an error if the silence lasts for too long.
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

    /// Asks for the state of the consumer, unless it is being asked for.
    pub(super) fn check(&mut self) {
        if self.check.is_none() {
            let consumer = Arc::clone(&self.consumer);
            self.check = Some(Box::pin(
                async move { consumer.get_info().await.map(|_| ()) },
            ));
        }
    }

    /// Waits for the answer; an error if it is that there is no consumer.
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
            Ok(()) => self.hear(),
            Err(error) => match SubscriptionError::deleted(&error) {
                Some(deleted) => return Poll::Ready(Err(deleted)),
                None => tracing::debug!(%error, "jetstream does not answer"),
            },
        }
        Poll::Ready(Ok(()))
    }

    /// Asks nothing any more.
    pub(super) fn close(&mut self) {
        self.check = None;
    }
}
