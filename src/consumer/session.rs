//! [`Session`] of one subscription and its service, driven to their end.

use std::{
    future::{Future, poll_fn},
    pin::pin,
    sync::Arc,
    task::{Context, Poll},
};

use tokio::task::unconstrained;
use tokio_util::sync::CancellationToken;

use super::{
    EndCause, Escalation, Summary,
    counts::Readiness,
    erased::{Cause, Erased},
    options::{AfterError, Options},
    rebound::Rebound,
    signals::{Asked, Signals},
    watchdog::Watchdog,
    watched::Part,
    work::{Answer, Work},
};
use crate::{
    outcome::{drop_quietly, guard},
    sentinel::roll_call::RollCall,
};

/// Number of jobs that are taken before other tasks have their turn on this thread.
const BATCH: usize = 128;

pub(super) struct Session {
    pub(super) work: Box<dyn Work>,
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

impl Session {
    pub(super) fn new(work: Box<dyn Work>, options: Options) -> Self {
        let watched = options.watched.get();
        let part = watched.map(|it| Part::new(Arc::clone(it)));
        let watchdog = options.watchdog.zip(watched);
        let watchdog = watchdog.map(|(timing, it)| Watchdog::new(timing, Arc::clone(it)));
        Self {
            work,
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
    pub(super) async fn run(&mut self, signals: &mut Signals) -> Option<Cause> {
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
            part.note(
                self.work.in_flight(),
                called,
                answered + failed,
                self.readiness,
            );
        }
    }

    fn poll_watchdog(&mut self, cx: &mut Context<'_>) -> Poll<Cause> {
        let Some(watchdog) = &mut self.watchdog else {
            return Poll::Pending;
        };
        let work = &self.work;
        let stall = watchdog.poll(cx, || work.probe());
        stall.map(|stall| EndCause::Stalled(Box::new(stall)))
    }

    /// Returns the number of calls that have succeeded.
    pub(super) fn answered(&self) -> u64 {
        self.summary.answered
    }

    fn poll_cause(&mut self, signals: &mut Signals, cx: &mut Context<'_>) -> Poll<Option<Cause>> {
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
    fn pull(&mut self, room: &mut usize, cx: &mut Context<'_>) -> Result<(), Cause> {
        while *room > 0 {
            match self.poll_ready(cx) {
                Err(panic) => return Err(EndCause::UnreadyPanicked(panic)),
                Ok(Poll::Ready(Err(error))) => return Err(EndCause::Unready(error)),
                Ok(Poll::Ready(Ok(()))) => {}
                // The stream is not polled now, so it would not report its end.
                Ok(Poll::Pending) => {
                    return match self.work.poll_closed(cx) {
                        Poll::Ready(cause) => Err(cause),
                        Poll::Pending => Ok(()),
                    };
                }
            }
            match self.work.poll_call(&mut self.summary, cx) {
                Poll::Ready(Ok(())) => *room -= 1,
                Poll::Ready(Err(cause)) => return Err(self.count_if_panicked(cause)),
                Poll::Pending => return Ok(()),
            }
        }
        Ok(())
    }

    /// Answers the questions of the consumer's handles.
    pub(super) fn answer(&mut self, cx: &mut Context<'_>) -> Result<(), Cause> {
        let questions = match &self.part {
            Some(part) => part.questions(cx.waker()),
            None => return Ok(()),
        };
        if questions.is_empty() {
            return Ok(());
        }
        let mut call = RollCall::default();
        call.stops.extend(questions.iter().filter_map(|it| it.stop));
        // Each call is polled once then, whatever is left of the task's budget.
        self.work.wake_calls();
        let taking = unconstrained(poll_fn(|cx| Poll::Ready(self.take_answers(cx))));
        let taken = call.during(|| match pin!(taking).poll(cx) {
            Poll::Ready(taken) => taken,
            Poll::Pending => Ok(()),
        });
        for question in questions {
            // The handle may have stopped waiting.
            drop(question.reply.send(call.jobs.clone()));
        }
        taken
    }

    /// Counts the calls that have ended, up to the first one that ends the session.
    pub(super) fn take_answers(&mut self, cx: &mut Context<'_>) -> Result<(), Cause> {
        while let Poll::Ready(Some(answer)) = self.work.poll_answer(&mut self.summary, cx) {
            self.take_answer(answer)?;
        }
        Ok(())
    }

    pub(super) fn take_answer(&mut self, answer: Answer) -> Result<(), Cause> {
        match answer {
            Answer::Succeeded(verdict) => {
                if let (Some(rebound), Some(verdict)) = (&mut self.rebound, verdict) {
                    rebound.note(verdict);
                }
                Ok(())
            }
            Answer::Failed(escalation, error) => self.call_failed(escalation, error),
            Answer::Panicked(panic) => Err(self.count_if_panicked(EndCause::CallPanicked(panic))),
        }
    }

    fn call_failed(&mut self, escalation: Escalation, error: Erased) -> Result<(), Cause> {
        self.summary.failed += 1;
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

    /// Counts the call of which `cause` is the panic, if it is one.
    fn count_if_panicked(&mut self, cause: Cause) -> Cause {
        if let EndCause::CallPanicked(_) = cause {
            self.summary.failed += 1;
            self.summary.unanswered += 1;
        }
        cause
    }
}
