//! [`Session`] of one subscription and its service, driven to their end.

use std::{
    fmt,
    future::poll_fn,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
};

use tokio_util::sync::CancellationToken;
use tower_service::Service;

use super::{
    Classify, EndCause, Escalation, Summary,
    counts::Readiness,
    in_flight::{Call, InFlight, poll_next, wake_all},
    options::{AfterError, Options},
    rebound::Rebound,
    signals::{Asked, Signals},
    subscription::Subscription,
    watchdog::Watchdog,
    watched::Part,
};
use crate::{
    outcome::{Panic, catch, drop_quietly, guard},
    sentinel::roll_call::RollCall,
};

/// Number of jobs that are taken before other tasks have their turn on this thread.
const BATCH: usize = 128;

pub(super) struct Session<B, S, F, C> {
    pub(super) subscription: Pin<Box<B>>,
    pub(super) service: S,
    pub(super) calls: InFlight<F>,
    // A closure need not be `Sync`.
    classify: Arc<Mutex<C>>,
    pub(super) options: Options,
    pub(super) summary: Summary,
    rebound: Option<Rebound>,
    /// `true` if the subscription brings no more jobs, or can't be asked to stop.
    pub(super) is_stopped: bool,
    /// Ends the other tasks of the subscription with this one, if there are any.
    peers: Option<CancellationToken>,
    /// `None` if nobody watches the consumer.
    pub(super) part: Option<Part>,
    pub(super) readiness: Readiness,
    watchdog: Option<Watchdog>,
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
        let watched = options.watched.get();
        let part = watched.map(|it| Part::new(Arc::clone(it)));
        let watchdog = options.watchdog.zip(watched);
        let watchdog = watchdog.map(|(timing, it)| Watchdog::new(timing, Arc::clone(it)));
        Self {
            subscription,
            service,
            calls: InFlight::new(),
            classify,
            options,
            part,
            readiness: Readiness::default(),
            watchdog,
            summary: Summary::default(),
            rebound: Some(Rebound::default()),
            is_stopped: false,
            peers: None,
        }
    }

    /// Makes this the session of one task among several, which all end when `peers` is cancelled.
    pub(super) fn among(mut self, peers: CancellationToken) -> Self {
        self.peers = Some(peers);
        self
    }

    /// Consumes until something ends it, and returns the cause; `None` if the end was requested.
    pub(super) async fn run(
        &mut self,
        signals: &mut Signals,
    ) -> Option<EndCause<B::Error, S::Error>> {
        let cause = poll_fn(|cx| {
            let polled = self.poll_cause(signals, cx);
            self.note();
            match polled {
                Poll::Pending => self.poll_watchdog(cx).map(Some),
                Poll::Ready(_) => polled,
            }
        });
        let cause = cause.await;
        drop_quietly(self.watchdog.take());
        // Jobs that are released during a drain do not come back here.
        self.rebound = None;
        if let Some(peers) = &self.peers {
            peers.cancel();
        }
        self.is_stopped = cause.as_ref().is_some_and(EndCause::is_of_the_stream);
        if cause.as_ref().is_some_and(EndCause::is_silent) {
            self.options.gone.cancel();
        }
        self.note_if_gone();
        match &cause {
            None => guard(|| tracing::info!("session ending on request")),
            Some(cause) => guard(|| tracing::warn!(cause = cause.print(), "session ending")),
        }
        cause
    }

    /// Tells the consumer's handles of the calls.
    pub(super) fn note(&mut self) {
        if let Some(part) = &mut self.part {
            let Summary {
                called,
                answered,
                failed,
                ..
            } = self.summary;
            part.note(self.calls.len(), called, answered + failed, self.readiness);
        }
    }

    fn poll_watchdog(&mut self, cx: &mut Context<'_>) -> Poll<EndCause<B::Error, S::Error>> {
        let Some(watchdog) = &mut self.watchdog else {
            return Poll::Pending;
        };
        let subscription = &self.subscription;
        let stall = watchdog.poll(cx, || subscription.probe());
        stall.map(|stall| EndCause::Stalled(Box::new(stall)))
    }

    /// Returns the number of calls that have succeeded.
    pub(super) fn answered(&self) -> u64 {
        self.summary.answered
    }

    fn poll_cause(
        &mut self,
        signals: &mut Signals,
        cx: &mut Context<'_>,
    ) -> Poll<Option<EndCause<B::Error, S::Error>>> {
        // Checked first, so that a stream that is always ready can't delay it.
        if signals.poll(cx) != Asked::Nothing {
            return Poll::Ready(None);
        }
        if let Err(cause) = self.answer(cx) {
            return Poll::Ready(Some(cause));
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
                // Calls that end while other tasks have their turn are then taken in one poll, and not in one
                // each. If the service itself limits its calls, its returned permits wake this task in the
                // same way.
                if room < BATCH && self.options.limit < usize::MAX {
                    cx.waker().wake_by_ref();
                }
                return Poll::Pending;
            }
            if room == 0 {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
        }
    }

    /// Calls the service with each job that is there, as long as it is ready.
    fn pull(
        &mut self,
        room: &mut usize,
        cx: &mut Context<'_>,
    ) -> Result<(), EndCause<B::Error, S::Error>> {
        while *room > 0 {
            match self.poll_ready(cx) {
                Err(panic) => return Err(EndCause::UnreadyPanicked(panic)),
                Ok(Poll::Ready(Err(error))) => return Err(EndCause::Unready(error)),
                Ok(Poll::Ready(Ok(()))) => {}
                // The stream is not polled now, so it would not report its end.
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
            // The job is taken now: nothing may come before its call.
            *room -= 1;
            self.summary.called += 1;
            // The push is inside, so that the future is moved only once.
            let called = catch(|| self.calls.push(Call::new(self.service.call(job))));
            called.map_err(|panic| self.call_panicked(panic))?;
        }
        Ok(())
    }

    /// Answers the questions of the consumer's handles.
    pub(super) fn answer(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Result<(), EndCause<B::Error, S::Error>> {
        let questions = match &self.part {
            Some(part) => part.questions(cx.waker()),
            None => return Ok(()),
        };
        if questions.is_empty() {
            return Ok(());
        }
        let mut call = RollCall::default();
        call.stops.extend(questions.iter().filter_map(|it| it.stop));
        // Each call is polled once then.
        wake_all(&mut self.calls);
        let taken = call.during(|| self.take_answers(cx));
        for question in questions {
            // The handle may have stopped waiting.
            drop(question.reply.send(call.jobs.clone()));
        }
        taken
    }

    /// Counts the calls that have ended, up to the first one that ends the session.
    pub(super) fn take_answers(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Result<(), EndCause<B::Error, S::Error>> {
        while let Poll::Ready(Some(answer)) = poll_next(&mut self.calls, cx) {
            self.take_answer(answer)?;
        }
        Ok(())
    }

    pub(super) fn take_answer(
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
        // If the classifier panics, the delivery may be unsettled.
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
                "consumer continuing after an error"
            );
        });
        drop_quietly(cause);
        Ok(())
    }

    fn classify(&self) -> MutexGuard<'_, C> {
        // A classifier that panicked is still used: its result can't be worse than the assumption for a
        // panic.
        self.classify.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn call_panicked(&mut self, panic: Panic) -> EndCause<B::Error, S::Error> {
        self.summary.failed += 1;
        self.summary.unanswered += 1;
        EndCause::CallPanicked(panic)
    }
}
