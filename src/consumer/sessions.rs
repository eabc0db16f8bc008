//! [`Sessions`] of a consumer: one after another, with pauses between them.

use std::{
    fmt, future::poll_fn, panic::resume_unwind, pin::pin, sync::Arc, task::Poll, time::Duration,
};

use tokio::{
    task::JoinHandle,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    EndCause, Summary,
    consuming::Run,
    erased::Cause,
    options::Options,
    signals::{Asked, Signals},
    source::Source,
    tasks::{Ended, Ending, Rest, consume, end_last},
    work::Wired,
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

/// Settings of a consumer that has several sessions.
pub(super) struct Settings {
    pub(super) options: Options,
    pub(super) signals: Signals,
    pub(super) retry: Retry,
    pub(super) connect_timeout: Duration,
    pub(super) tasks: Option<usize>,
    pub(super) name: Option<Arc<str>>,
}

impl Default for Settings {
    fn default() -> Self {
        let (min, max) = (Duration::from_millis(500), Duration::from_secs(30));
        Self {
            options: Options::default(),
            signals: Signals::default(),
            retry: Retry {
                pauses: Delays::new(min..=max),
                longest: max,
                random: fastrand::f64,
                max_attempts: None,
            },
            connect_timeout: Duration::from_secs(30),
            tasks: None,
            name: None,
        }
    }
}

/// Sessions of a consumer, and the sum of their summaries.
pub(super) struct Sessions {
    source: Box<dyn Source>,
    options: Options,
    connect_timeout: Duration,
    tasks: Option<usize>,
    total: Summary,
    /// The session that drains beside the present one.
    beside: Option<Beside>,
}

/// Session whose channel is gone or stalled, and that still drains.
struct Beside {
    /// Cuts its drain short.
    stop: CancellationToken,
    task: JoinHandle<Summary>,
}

/// Cause for which a session ended, or could not begin.
struct Failure {
    cause: Cause,
    answered: u64,
    lasted: Duration,
}

impl From<Cause> for Failure {
    fn from(cause: Cause) -> Self {
        Self {
            cause,
            answered: 0,
            lasted: Duration::ZERO,
        }
    }
}

impl Sessions {
    /// Returns the run of all sessions.
    pub(super) fn start(source: Box<dyn Source>, settings: Settings) -> Run {
        let Settings {
            options,
            signals,
            retry,
            connect_timeout,
            tasks,
            name,
        } = settings;
        let watched = options.watched.get().cloned();
        let mut sessions = Self {
            source,
            options,
            connect_timeout,
            tasks,
            total: Summary::default(),
            beside: None,
        };
        Run::new(name, signals, watched, |mut signals| async move {
            let cause = sessions.run(retry, &mut signals).await;
            signals.attend(sessions.join_beside()).await;
            let summary = sessions.total;
            Ended { cause, summary }
        })
    }

    /// Runs one session after another, and returns the cause to give up; `None` if the end was requested.
    async fn run(&mut self, retry: Retry, signals: &mut Signals) -> Option<Cause> {
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
    async fn next(
        &mut self,
        attempt: u32,
        signals: &mut Signals,
        instruments: &ConsumerInstruments,
    ) -> Option<Failure> {
        // Before the connection, so that a failure here leaves no connection to close.
        let shutdown = match self.source.shutdown() {
            Some(parent) => parent.child_token(),
            None => CancellationToken::new(),
        };
        if let Err(panic) = self.source.make_services(self.tasks, &shutdown) {
            return Some(EndCause::MakeServicePanicked(panic).into());
        }
        let wired = match self.subscribe(attempt, signals).await {
            Some(Ok(wired)) => wired,
            unconnected => {
                // Owners of the token or of the services may wait for their end.
                guard(|| shutdown.cancel());
                self.source.drop_services();
                return unconnected.and_then(Result::err).map(Failure::from);
            }
        };
        guard(|| tracing::info!("connected"));
        let connected = instruments.connected();
        let gone = CancellationToken::new();
        self.options.shutdown = Some(shutdown);
        self.options.gone = gone.clone();
        let stop = signals.stop_token();
        let consuming = consume(wired, self.options.clone(), signals, stop.clone());
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
                cause,
                answered,
                lasted,
            }),
        }
    }

    /// Lets a session drain while the next ones run, and stops the one that drained before it.
    async fn drain_beside(&mut self, rest: Rest, stop: CancellationToken, signals: &mut Signals) {
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
    async fn join_beside(&mut self) {
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
    async fn subscribe(
        &mut self,
        attempt: u32,
        signals: &mut Signals,
    ) -> Option<Result<Wired, Cause>> {
        if let Err(panic) = self.source.connect(attempt) {
            return Some(Err(EndCause::ConnectPanicked(panic)));
        }
        let limit = self.connect_timeout;
        let connecting = poll_fn(|cx| self.source.poll_connected(cx));
        let connected = signals.unless_asked(timeout(limit, connecting)).await;
        self.source.disconnect();
        Some(match connected? {
            Ok(Ok(Ok(wired))) => Ok(wired),
            Ok(Ok(Err(error))) => Err(EndCause::Connect(error)),
            Ok(Err(panic)) => Err(EndCause::ConnectPanicked(panic)),
            Err(_elapsed) => Err(EndCause::ConnectTimedOut(limit)),
        })
    }
}
