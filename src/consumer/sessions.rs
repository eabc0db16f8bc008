//! [`Sessions`] of a consumer: one after another, with pauses between them.

use std::{
    fmt,
    future::poll_fn,
    panic::resume_unwind,
    pin::pin,
    sync::{Arc, Mutex},
    task::Poll,
    time::Duration,
};

use tokio::{
    task::JoinHandle,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tower_service::Service;

use super::{
    Classify, EndCause, Summary,
    connect::Connect,
    in_flight::Call,
    options::Options,
    signals::{Asked, Signals},
    subscription::Subscription,
    supervised::MakeServices,
    tasks::{Ended, Ending, Rest, consume, end_last},
};
use crate::{
    backoff::{Delays, full_jitter},
    outcome::{catch, drop_quietly, guard},
    telemetry::{consumer_name::carried, metrics::ConsumerInstruments},
};

/// Schedule of the attempts, and their number.
#[derive(Clone, Copy, Debug)]
pub(super) struct Retry {
    pub(super) pauses: Delays,
    pub(super) longest: Duration,
    pub(super) random: fn() -> f64,
    pub(super) max_attempts: Option<u32>,
}

/// Sessions of a consumer, and the sum of their summaries.
pub(super) struct Sessions<K, M, C> {
    pub(super) connect: K,
    pub(super) make_services: M,
    pub(super) classify: Arc<Mutex<C>>,
    pub(super) options: Options,
    pub(super) connect_timeout: Duration,
    pub(super) tasks: Option<usize>,
    pub(super) total: Summary,
    /// The session that drains beside the present one.
    pub(super) beside: Option<Beside>,
}

/// Session whose channel is gone or stalled, and that still drains.
pub(super) struct Beside {
    /// Cuts its drain short.
    stop: CancellationToken,
    task: JoinHandle<Summary>,
}

/// Cause for which a session ended, or could not begin.
struct Failure<T, E, X> {
    cause: EndCause<T, E, X>,
    answered: u64,
    lasted: Duration,
}

impl<T, E, X> From<EndCause<T, E, X>> for Failure<T, E, X> {
    fn from(cause: EndCause<T, E, X>) -> Self {
        Self {
            cause,
            answered: 0,
            lasted: Duration::ZERO,
        }
    }
}

impl<K, M, C> Sessions<K, M, C> {
    /// Runs one session after another, and returns the cause to give up; `None` if the end was requested.
    pub(super) async fn run<B, S>(
        &mut self,
        retry: Retry,
        signals: &mut Signals,
    ) -> Option<EndCause<B::Error, S::Error, K::Error>>
    where
        K: Connect<Subscription = B, Error: fmt::Display>,
        M: MakeServices<Service = S>,
        B: Subscription<Job: Send, Error: fmt::Display + Send + 'static> + Send + 'static,
        S: Service<B::Job, Response: Send + 'static> + Send + 'static,
        S::Error: fmt::Display + Send + 'static,
        S::Future: Send + 'static,
        C: Classify<S::Error> + Send + 'static,
    {
        // The failures in a row, and the number of the next pause.
        let (mut failures, mut step) = (0_u32, 0_u32);
        let instruments = ConsumerInstruments::begin();
        self.note(1, None);
        loop {
            let attempt = failures.saturating_add(1);
            guard(|| tracing::info!(attempt, "connecting"));
            let Failure {
                cause,
                answered,
                lasted,
            } = self.next(attempt, signals, &instruments).await?;
            let worked = answered > 0 || lasted > retry.longest;
            (failures, step) = match worked {
                true => (0, 1),
                false => (failures.saturating_add(1), step.saturating_add(1)),
            };
            if !cause.is_transient() || retry.max_attempts.is_some_and(|max| failures >= max) {
                let attempts = failures;
                guard(|| {
                    tracing::error!(attempts, cause = cause.print(), "not reconnecting");
                });
                return Some(cause);
            }
            let ceiling = retry.pauses.nth(step);
            let pause = full_jitter(ceiling, catch(retry.random).unwrap_or(1.0));
            guard(|| {
                tracing::warn!(
                    attempts = failures,
                    ?pause,
                    cause = cause.print(),
                    "reconnecting after a pause"
                );
            });
            self.note(failures.saturating_add(1), Some(&cause));
            drop_quietly(cause);
            signals.unless_asked(sleep(pause)).await?;
            instruments.reconnects();
        }
    }

    /// Tells the consumer's handles of the next attempt.
    fn note(&self, attempt: u32, error: Option<&dyn fmt::Display>) {
        if let Some(watched) = self.options.watched.get() {
            let error = error.and_then(|error| catch(|| format!("{error:#}").into()).ok());
            watched.connect(attempt, error);
        }
    }

    /// Runs one session, and returns the cause of its end or failed start; `None` if the end was requested.
    async fn next<B, S>(
        &mut self,
        attempt: u32,
        signals: &mut Signals,
        instruments: &ConsumerInstruments,
    ) -> Option<Failure<B::Error, S::Error, K::Error>>
    where
        K: Connect<Subscription = B>,
        M: MakeServices<Service = S>,
        B: Subscription<Job: Send, Error: fmt::Display + Send + 'static> + Send + 'static,
        S: Service<B::Job, Response: Send + 'static> + Send + 'static,
        S::Error: fmt::Display + Send + 'static,
        S::Future: Send + 'static,
        C: Classify<S::Error> + Send + 'static,
    {
        // Before the connection, so that a failure here leaves no connection to close.
        let shutdown = match self.make_services.shutdown() {
            Some(parent) => parent.child_token(),
            None => CancellationToken::new(),
        };
        let make_services = || self.make_services.make_services(self.tasks, &shutdown);
        let services = match catch(make_services) {
            Ok(services) => services,
            Err(panic) => return Some(EndCause::MakeServicePanicked(panic).into()),
        };
        let subscription = match self.subscribe(attempt, signals).await {
            Some(Ok(subscription)) => subscription,
            unconnected => {
                // Owners of the token or of the services may wait for their end.
                guard(|| shutdown.cancel());
                services.into_iter().for_each(drop_quietly);
                return unconnected.and_then(Result::err).map(Failure::from);
            }
        };
        guard(|| tracing::info!("connected"));
        let connected = instruments.connected();
        let gone = CancellationToken::new();
        self.options.shutdown = Some(shutdown);
        self.options.gone = gone.clone();
        let subscription = Box::pin(subscription);
        let stop = signals.stop_token();
        let Self {
            classify, options, ..
        } = self;
        let consuming = consume(
            subscription,
            services,
            classify,
            options.clone(),
            signals,
            stop.clone(),
        );
        let Ending {
            cause,
            answered,
            lasted,
            mut rest,
        } = consuming.await;
        if let Some(watched) = self.options.watched.get() {
            watched.drain();
        }
        // A session whose end was requested is the last one, so it is waited for.
        let is_last = cause.is_none();
        let is_stalled = matches!(cause, Some(EndCause::Stalled(_)));
        let ended = async {
            if is_last {
                return Some(end_last(&mut rest, &gone, &stop).await);
            }
            if is_stalled {
                return None;
            }
            let mut gone = pin!(gone.cancelled());
            poll_fn(|cx| match rest.as_mut().poll(cx) {
                Poll::Ready(ended) => Poll::Ready(Some(ended)),
                Poll::Pending => gone.as_mut().poll(cx).map(|()| None),
            })
            .await
        };
        let ended = {
            let _connected = connected;
            signals.attend(ended).await
        };
        let (answered, other) = match ended {
            Some(Ended { cause, summary }) => {
                let answered = summary.answered;
                self.total.add(summary);
                (answered, cause)
            }
            None => {
                self.drain_beside(rest, stop, signals).await;
                (answered, None)
            }
        };
        let Some(cause) = cause else {
            drop_quietly(other);
            return None;
        };
        let cause = cause.or_graver(other);
        // A request that comes while an error drains is also a requested end.
        match signals.asked() {
            Asked::Drain | Asked::Stop if cause.is_transient() => None,
            _ => Some(Failure {
                cause: cause.widen(),
                answered,
                lasted,
            }),
        }
    }

    /// Lets a session drain while the next ones run, and stops the one that drained before it.
    async fn drain_beside<T, E>(
        &mut self,
        rest: Rest<T, E>,
        stop: CancellationToken,
        signals: &mut Signals,
    ) where
        T: Send + 'static,
        E: Send + 'static,
    {
        guard(|| tracing::info!("session draining beside the next one"));
        let rest = async move {
            let ended = rest.await;
            // If the service can't be used as configured, the next session finds that out, too.
            drop_quietly(ended.cause);
            ended.summary
        };
        let task = tokio::spawn(carried(rest));
        if let Some(older) = &self.beside {
            older.stop.cancel();
        }
        signals.attend(self.join_beside()).await;
        self.beside = Some(Beside { stop, task });
    }

    /// Waits for the session that drains beside the present one.
    pub(super) async fn join_beside(&mut self) {
        let Some(beside) = self.beside.take() else {
            return;
        };
        match beside.task.await {
            Ok(summary) => self.total.add(summary),
            Err(error) => {
                if let Ok(payload) = error.try_into_panic() {
                    // Panics of user code are caught where it is called.
                    resume_unwind(payload);
                }
            }
        }
    }

    /// Connects, unless the end is requested first.
    async fn subscribe<T, E>(
        &mut self,
        attempt: u32,
        signals: &mut Signals,
    ) -> Option<Result<K::Subscription, EndCause<T, E, K::Error>>>
    where
        K: Connect,
    {
        let connecting = match catch(|| self.connect.connect(attempt)) {
            Ok(connecting) => connecting,
            Err(panic) => return Some(Err(EndCause::ConnectPanicked(panic))),
        };
        let limit = self.connect_timeout;
        let connecting = timeout(limit, Call::new(connecting));
        Some(match signals.unless_asked(connecting).await? {
            Ok(Ok(Ok(subscription))) => Ok(subscription),
            Ok(Ok(Err(error))) => Err(EndCause::Connect(error)),
            Ok(Err(panic)) => Err(EndCause::ConnectPanicked(panic)),
            Err(_elapsed) => Err(EndCause::ConnectTimedOut(limit)),
        })
    }
}
