//! One subscription and its service, driven to their end.

use std::{
    fmt,
    future::{Future, poll_fn},
    mem,
    pin::{Pin, pin},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    task::unconstrained,
    time::{Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tower_service::Service;

use super::{
    Classify, EndCause, Escalation, Summary,
    in_flight::{Call, InFlight, poll_next},
    rebound::Rebound,
    signals::{Asked, Signals},
    tasks::Ended,
};
use crate::{
    consumer::subscription::Subscription,
    outcome::{Panic, catch, drop_quietly, guard},
    time::deadline,
};

/// How many jobs are taken before others have their turn on this thread.
const BATCH: usize = 128;

/// How long to wait for a channel to close: what can be done for the broker is done.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long to wait for what is told to stop where its channel is gone: no answer of it counts.
///
/// Longer than the sentinel's `stop_wait`, so that a job that blocks its thread is still told of.
const GONE_TIMEOUT: Duration = Duration::from_secs(10);

/// What a [`Consumer`](crate::Consumer) does after an error that concerns
/// [one call alone](Escalation::Call).
///
/// After one that reaches further it always stops.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum AfterError {
    /// It drains, closes and returns the error.
    #[default]
    Stop,
    /// It counts the error in [`Summary::failed`] and goes on.
    Continue,
}

#[derive(Clone, Debug)]
pub(super) struct Options {
    pub(super) drain_timeout: Duration,
    pub(super) stop_timeout: Duration,
    pub(super) after_error: AfterError,
    pub(super) shutdown: Option<CancellationToken>,
    /// Cancelled when the channel is known to be gone.
    pub(super) gone: CancellationToken,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            drain_timeout: Duration::from_secs(30),
            stop_timeout: Duration::from_secs(40),
            after_error: AfterError::Stop,
            shutdown: None,
            gone: CancellationToken::new(),
        }
    }
}

pub(super) struct Session<B, S, F, C> {
    subscription: Pin<Box<B>>,
    service: S,
    calls: InFlight<F>,
    // A closure need not be `Sync`.
    classify: Arc<Mutex<C>>,
    options: Options,
    summary: Summary,
    rebound: Option<Rebound>,
    /// Whether the subscription brings no more jobs, or can't be asked for it.
    is_stopped: bool,
    /// Tells the other tasks of the subscription to end with this one, if there are any.
    peers: Option<CancellationToken>,
}

impl<B, S, C> Session<B, S, S::Future, C>
where
    B: Subscription<Error: fmt::Display>,
    S: Service<B::Job, Response: 'static, Error: fmt::Display>,
    C: Classify<S::Error>,
{
    pub(super) fn new(
        subscription: Pin<Box<B>>,
        service: S,
        classify: Arc<Mutex<C>>,
        options: Options,
    ) -> Self {
        Self {
            subscription,
            service,
            calls: InFlight::new(),
            classify,
            options,
            summary: Summary::default(),
            rebound: Some(Rebound::default()),
            is_stopped: false,
            peers: None,
        }
    }

    /// Makes this the part of one task among several, which end when `peers` is cancelled.
    pub(super) fn among(mut self, peers: CancellationToken) -> Self {
        self.peers = Some(peers);
        self
    }

    /// Consumes until something ends it, and returns what: none if it was asked for.
    pub(super) async fn run(
        &mut self,
        signals: &mut Signals,
    ) -> Option<EndCause<B::Error, S::Error>> {
        let shutdown = self.options.shutdown.clone();
        let mut cancelled = pin!(shutdown.as_ref().map(CancellationToken::cancelled));
        let cause = poll_fn(|cx| {
            // A sentinel that is shut down gives every job back at once.
            let cancelled = cancelled.as_mut().as_pin_mut();
            if cancelled.is_some_and(|it| it.poll(cx).is_ready()) {
                guard(|| tracing::info!("the shutdown token is cancelled"));
                return Poll::Ready(None);
            }
            self.poll_cause(signals, cx)
        })
        .await;
        // What a drain gives back does not come back here.
        self.rebound = None;
        if let Some(peers) = &self.peers {
            peers.cancel();
        }
        self.is_stopped = cause.as_ref().is_some_and(EndCause::is_of_the_stream);
        self.note_if_gone();
        match &cause {
            None => guard(|| tracing::info!("a session ends: it is asked to")),
            Some(cause) => guard(|| tracing::warn!(cause = cause.print(), "a session ends")),
        }
        cause
    }

    /// Returns how many calls succeeded until now.
    pub(super) fn answered(&self) -> u64 {
        self.summary.answered
    }

    /// Drains, closes the channel and drops what is left; a cancelled `stop` cuts the drain short.
    pub(super) async fn end(mut self, stop: CancellationToken) -> Ended<B::Error, S::Error> {
        let cause = self.drain(&stop).await;
        self.close().await;
        drop_quietly(self.service);
        drop_quietly(self.subscription);
        Ended {
            cause,
            summary: self.summary,
        }
    }

    fn poll_cause(
        &mut self,
        signals: &mut Signals,
        cx: &mut Context<'_>,
    ) -> Poll<Option<EndCause<B::Error, S::Error>>> {
        // First of all: nobody is to be kept from it by a stream that is always ready.
        if signals.poll(cx) != Asked::Nothing {
            return Poll::Ready(None);
        }
        let mut room = BATCH;
        loop {
            // Before the pull, since it frees permits.
            if let Err(cause) = self.take_answers(cx) {
                return Poll::Ready(Some(cause));
            }
            let before = room;
            if let Err(cause) = self.pull(&mut room, cx) {
                return Poll::Ready(Some(cause));
            }
            if room == before {
                return Poll::Pending;
            }
            if room == 0 {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
        }
    }

    /// Calls the service with each job that it is ready for, and that is there.
    fn pull(
        &mut self,
        room: &mut usize,
        cx: &mut Context<'_>,
    ) -> Result<(), EndCause<B::Error, S::Error>> {
        while *room > 0 {
            match catch(|| self.service.poll_ready(cx)) {
                Err(panic) => return Err(EndCause::UnreadyPanicked(panic)),
                Ok(Poll::Ready(Err(error))) => return Err(EndCause::Unready(error)),
                Ok(Poll::Ready(Ok(()))) => {}
                // The stream is not polled now, and would not tell.
                Ok(Poll::Pending) => {
                    return match catch(|| self.subscription.as_mut().poll_closed(cx)) {
                        Err(panic) => Err(EndCause::StreamPanicked(panic)),
                        Ok(Poll::Ready(Err(error))) => Err(EndCause::Stream(error)),
                        Ok(Poll::Ready(Ok(()))) => Err(EndCause::StreamEnded),
                        Ok(Poll::Pending) => Ok(()),
                    };
                }
            }
            let job = match catch(|| self.subscription.as_mut().poll_next(cx)) {
                Err(panic) => return Err(EndCause::StreamPanicked(panic)),
                Ok(Poll::Ready(Some(Err(error)))) => return Err(EndCause::Stream(error)),
                Ok(Poll::Ready(None)) => return Err(EndCause::StreamEnded),
                Ok(Poll::Ready(Some(Ok(job)))) => job,
                Ok(Poll::Pending) => return Ok(()),
            };
            // From here on the job is ours: nothing may come before its call.
            *room -= 1;
            self.summary.called += 1;
            // The push is in it, so that the future is moved once.
            let called = catch(|| self.calls.push(Call::new(self.service.call(job))));
            called.map_err(|panic| self.call_panicked(panic))?;
        }
        Ok(())
    }

    /// Counts the calls that have ended, up to the first that ends the session.
    fn take_answers(&mut self, cx: &mut Context<'_>) -> Result<(), EndCause<B::Error, S::Error>> {
        while let Poll::Ready(Some(answer)) = poll_next(&mut self.calls, cx) {
            self.take_answer(answer)?;
        }
        Ok(())
    }

    fn take_answer(
        &mut self,
        answer: Result<Result<S::Response, S::Error>, Panic>,
    ) -> Result<(), EndCause<B::Error, S::Error>> {
        match answer {
            Ok(Ok(mut response)) => {
                let verdict = self.summary.answer(&mut response);
                if let (Some(rebound), Some(verdict)) = (&mut self.rebound, verdict) {
                    rebound.note(verdict);
                }
                drop_quietly(response);
                Ok(())
            }
            Ok(Err(error)) => self.call_failed(error),
            Err(panic) => Err(self.call_panicked(panic)),
        }
    }

    fn call_failed(&mut self, error: S::Error) -> Result<(), EndCause<B::Error, S::Error>> {
        self.summary.failed += 1;
        // Whoever can't say is not to be trusted with the answer of a job.
        let escalation = catch(|| self.classify().classify(&error)).unwrap_or(Escalation::Channel);
        let cause = match escalation {
            Escalation::Moot | Escalation::Call => EndCause::Failed(error),
            Escalation::Channel => EndCause::Unanswered(error),
            Escalation::Consumer => EndCause::Misconfigured(error),
        };
        self.summary.unanswered += u64::from(cause.is_unanswered());
        let moot = escalation == Escalation::Moot;
        self.summary.moot += u64::from(moot);
        let goes_on = match escalation {
            Escalation::Moot => true,
            Escalation::Call => self.options.after_error == AfterError::Continue,
            Escalation::Channel | Escalation::Consumer => false,
        };
        if !goes_on {
            return Err(cause);
        }
        guard(|| {
            tracing::warn!(
                error = cause.print(),
                moot,
                "the consumer goes on after an error"
            );
        });
        drop_quietly(cause);
        Ok(())
    }

    fn classify(&self) -> MutexGuard<'_, C> {
        // One that panicked is asked again: it can't say worse of an error than was assumed.
        self.classify.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn call_panicked(&mut self, panic: Panic) -> EndCause<B::Error, S::Error> {
        self.summary.failed += 1;
        self.summary.unanswered += 1;
        EndCause::CallPanicked(panic)
    }

    /// Lets the calls finish, then stops them, then drops them; returns the gravest error of theirs.
    async fn drain(&mut self, stop: &CancellationToken) -> Option<EndCause<B::Error, S::Error>> {
        let Options {
            drain_timeout,
            stop_timeout,
            ..
        } = self.options;
        let mut cause = None;
        guard(|| tracing::info!(in_flight = self.calls.len(), "a drain begins"));
        let in_time = self.finish(drain_timeout, &mut cause, Some(stop)).await;
        if let (false, Some(token)) = (in_time, &self.options.shutdown) {
            guard(|| token.cancel());
            guard(|| {
                tracing::warn!(
                    in_flight = self.calls.len(),
                    "a drain stops what still runs"
                );
            });
            let limit = match self.options.gone.is_cancelled() {
                true => stop_timeout.min(GONE_TIMEOUT),
                false => stop_timeout,
            };
            self.finish(limit, &mut cause, None).await;
        }
        self.summary.abandoned = self.abandon(&mut cause).await;
        let Summary { abandoned, .. } = self.summary;
        match abandoned {
            0 => guard(|| tracing::info!("a drain ended")),
            _ => guard(|| tracing::error!(abandoned, "a drain ended with calls that did not")),
        }
        cause
    }

    /// Waits for all calls, unless the time is over or it is to be cut short.
    async fn finish(
        &mut self,
        time: Duration,
        cause: &mut Option<EndCause<B::Error, S::Error>>,
        stop: Option<&CancellationToken>,
    ) -> bool {
        let due = deadline(Instant::now(), time);
        let mut timer = pin!(due.map(sleep_until));
        let mut stopped = pin!(stop.map(CancellationToken::cancelled));
        poll_fn(|cx| {
            // First, so that nothing that is answered makes room for another job.
            self.poll_stop(cx);
            let mut is_over = false;
            if let Some(timer) = timer.as_mut().as_pin_mut() {
                is_over |= timer.poll(cx).is_ready();
            }
            if let Some(stopped) = stopped.as_mut().as_pin_mut() {
                is_over |= stopped.poll(cx).is_ready();
            }
            while let Err(other) = self.take_answers(cx) {
                add_cause(cause, other);
            }
            // Not before: a settlement that failed may be the first to know.
            self.note_if_gone();
            match self.calls.is_empty() {
                true => Poll::Ready(true),
                false if is_over => Poll::Ready(false),
                false => Poll::Pending,
            }
        })
        .await
    }

    /// Drops the calls that have not ended, and returns how many they are.
    ///
    /// Whether they have, each is asked: a task may poll 128 things of tokio before it has to yield, and
    /// there was no time for that.
    async fn abandon(&mut self, cause: &mut Option<EndCause<B::Error, S::Error>>) -> u64 {
        let mut calls = pin!(mem::take(&mut self.calls));
        let abandoned = unconstrained(poll_fn(|cx| {
            let mut abandoned = 0;
            for call in calls.as_mut().iter_pin_mut() {
                match call.poll(cx) {
                    Poll::Pending => abandoned += 1,
                    Poll::Ready(answer) => {
                        if let Err(other) = self.take_answer(answer) {
                            add_cause(cause, other);
                        }
                    }
                }
            }
            Poll::Ready(abandoned)
        }));
        abandoned.await
    }

    /// Tells whoever waits for it that no tag can be settled any more.
    fn note_if_gone(&self) {
        let gone = &self.options.gone;
        if !gone.is_cancelled() && catch(|| self.subscription.is_gone()).unwrap_or(false) {
            gone.cancel();
        }
    }

    /// Asks for no more jobs. Nobody waits for it: the close does as well.
    fn poll_stop(&mut self, cx: &mut Context<'_>) {
        if self.is_stopped {
            return;
        }
        match catch(|| self.subscription.as_mut().poll_stop(cx)) {
            Ok(polled) => self.is_stopped = polled.is_ready(),
            Err(panic) => {
                self.is_stopped = true;
                guard(|| tracing::error!(%panic, "stopping a subscription panicked"));
            }
        }
    }

    /// Gives up the channel: what has no answer by now will get none from here.
    async fn close(&mut self) {
        let mut timer = pin!(sleep(CLOSE_TIMEOUT));
        let closed = poll_fn(
            |cx| match catch(|| self.subscription.as_mut().poll_close(cx)) {
                Ok(Poll::Ready(())) => Poll::Ready(Ok(true)),
                Err(panic) => Poll::Ready(Err(panic)),
                Ok(Poll::Pending) => timer.as_mut().poll(cx).map(|()| Ok(false)),
            },
        );
        match closed.await {
            Ok(true) => {}
            Ok(false) => {
                guard(|| tracing::warn!(limit = ?CLOSE_TIMEOUT, "a channel did not close in time"));
            }
            Err(panic) => guard(|| tracing::error!(%panic, "closing a channel panicked")),
        }
        let Summary {
            unanswered,
            abandoned,
            ..
        } = self.summary;
        match unanswered + abandoned {
            0 => guard(|| tracing::info!("a session ended")),
            _ => guard(|| tracing::error!(unanswered, abandoned, "gave up a channel")),
        }
    }
}

/// Adds what a call failed with while a drain is under way.
fn add_cause<T, E>(cause: &mut Option<EndCause<T, E>>, other: EndCause<T, E>)
where
    T: fmt::Display,
    E: fmt::Display,
{
    guard(|| {
        tracing::warn!(
            cause = other.print(),
            "a call failed while a drain is under way"
        );
    });
    *cause = EndCause::graver(cause.take(), Some(other));
}
