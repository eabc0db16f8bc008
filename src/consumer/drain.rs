//! End of a session: its drain, and the close of its channel.

use std::{
    future::{Future, poll_fn},
    pin::pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    task::unconstrained,
    time::{Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::{Summary, erased::Cause, options::Options, session::Session, tasks::Ended};
use crate::{outcome::guard, time::deadline};

/// Time limit for a channel to close; at this point everything else is done for the broker.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// Time limit for stopped calls to end if the channel is gone: none of their settlements counts.
///
/// It is longer than the sentinel's `stop_wait`, so that a job that blocks its thread is still reported.
const GONE_TIMEOUT: Duration = Duration::from_secs(10);

impl Session {
    /// Drains, closes the channel and drops the rest; a cancelled `stop` cuts the drain short.
    pub(super) async fn end(mut self, stop: CancellationToken) -> Ended {
        let cause = self.drain(&stop).await;
        // Handles do not wait for the close.
        drop(self.part.take());
        self.close().await;
        self.work.end();
        Ended {
            cause,
            summary: self.summary,
        }
    }

    /// Lets the calls finish, then stops them, then drops them; returns the gravest of their errors.
    async fn drain(&mut self, stop: &CancellationToken) -> Option<Cause> {
        let Options {
            drain_timeout,
            stop_timeout,
            ..
        } = self.options;
        let mut cause = None;
        guard(|| tracing::info!(in_flight = self.work.in_flight(), "drain starting"));
        let in_time = self.finish(drain_timeout, &mut cause, Some(stop)).await;
        if let (false, Some(token)) = (in_time, &self.options.shutdown) {
            guard(|| token.cancel());
            guard(|| {
                tracing::warn!(
                    in_flight = self.work.in_flight(),
                    "drain stopping the calls that still run"
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
            0 => guard(|| tracing::info!("drain ended")),
            _ => guard(|| tracing::error!(abandoned, "drain ended with unfinished calls")),
        }
        cause
    }

    /// Waits for all calls, until the time is over or the drain is cut short.
    async fn finish(
        &mut self,
        time: Duration,
        cause: &mut Option<Cause>,
        stop: Option<&CancellationToken>,
    ) -> bool {
        let due = deadline(Instant::now(), time);
        let mut timer = pin!(due.map(sleep_until));
        let mut stopped = pin!(stop.map(CancellationToken::cancelled));
        let shutdown = self.options.shutdown.clone();
        let mut shut_down = pin!(shutdown.as_ref().map(CancellationToken::cancelled));
        poll_fn(|cx| {
            // First, so that a job that is settled makes no room for another one.
            self.poll_stop(cx);
            if let Some(token) = shut_down.as_mut().as_pin_mut() {
                if token.poll(cx).is_ready() {
                    shut_down.set(None);
                    // A sentinel that the consumer made learns of the shutdown by a poll.
                    self.work.wake_calls();
                }
            }
            let mut is_over = false;
            if let Some(timer) = timer.as_mut().as_pin_mut() {
                is_over |= timer.poll(cx).is_ready();
            }
            if let Some(stopped) = stopped.as_mut().as_pin_mut() {
                is_over |= stopped.poll(cx).is_ready();
            }
            if let Err(other) = self.answer(cx) {
                add_cause(cause, other);
            }
            while let Err(other) = self.take_answers(cx) {
                add_cause(cause, other);
            }
            self.note();
            // Not before the calls: a settlement that failed may be the first sign.
            self.note_if_gone();
            match self.work.in_flight() == 0 {
                true => Poll::Ready(true),
                false if is_over => Poll::Ready(false),
                false => Poll::Pending,
            }
        })
        .await
    }

    /// Drops the calls that have not ended, and returns their number.
    ///
    /// Each call is polled once more for that. A task may poll 128 resources of tokio before it must yield,
    /// so some of the calls may not have been polled yet.
    async fn abandon(&mut self, cause: &mut Option<Cause>) -> u64 {
        let in_flight = self.work.in_flight();
        let answers = unconstrained(poll_fn(|cx| {
            Poll::Ready(self.work.abandon(&mut self.summary, cx))
        }));
        let answers = answers.await;
        let abandoned = in_flight - answers.len();
        for answer in answers {
            if let Err(other) = self.take_answer(answer) {
                add_cause(cause, other);
            }
        }
        u64::try_from(abandoned).unwrap_or(u64::MAX)
    }

    /// Cancels the token `gone` once no tag can be settled any more.
    pub(super) fn note_if_gone(&self) {
        let gone = &self.options.gone;
        if !gone.is_cancelled() && self.work.is_gone() {
            gone.cancel();
        }
    }

    /// Asks the broker for no more jobs. Nobody waits for the result, since closing the channel does the
    /// same.
    fn poll_stop(&mut self, cx: &mut Context<'_>) {
        if self.is_stopped {
            return;
        }
        match self.work.poll_stop(cx) {
            Ok(polled) => self.is_stopped = polled.is_ready(),
            Err(panic) => {
                self.is_stopped = true;
                guard(|| tracing::error!(%panic, "subscription panicked while stopping"));
            }
        }
    }

    /// Gives up the channel: jobs that are unsettled by now are not settled from here any more.
    async fn close(&mut self) {
        let mut timer = pin!(sleep(CLOSE_TIMEOUT));
        let closed = poll_fn(|cx| match self.work.poll_close(cx) {
            Ok(Poll::Ready(())) => Poll::Ready(Ok(true)),
            Err(panic) => Poll::Ready(Err(panic)),
            Ok(Poll::Pending) => timer.as_mut().poll(cx).map(|()| Ok(false)),
        });
        match closed.await {
            Ok(true) => {}
            Ok(false) => {
                guard(|| tracing::warn!(limit = ?CLOSE_TIMEOUT, "closing the channel timed out"));
            }
            Err(panic) => guard(|| tracing::error!(%panic, "subscription panicked while closing")),
        }
        let Summary {
            unanswered,
            abandoned,
            ..
        } = self.summary;
        match unanswered + abandoned {
            0 => guard(|| tracing::info!("session ended")),
            _ => guard(|| tracing::error!(unanswered, abandoned, "channel given up")),
        }
    }
}

/// Adds the error of a call that failed during a drain.
fn add_cause(cause: &mut Option<Cause>, other: Cause) {
    guard(|| {
        tracing::warn!(cause = other.print(), "call failed during a drain");
    });
    *cause = Cause::graver(cause.take(), Some(other));
}
