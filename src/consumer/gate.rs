//! Readiness of a session for the next job: its limit, its pauses and its service.

use std::{
    mem,
    task::{Context, Poll},
};

use super::{counts::Readiness, erased::Erased, session::Session};
use crate::{
    outcome::{Panic, guard},
    sentinel::listening::observe,
    unready::{self, Cause},
};

impl Session {
    /// Polls the service for readiness, if there is room for its call.
    pub(super) fn poll_ready(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Result<Poll<Result<(), Erased>>, Panic> {
        self.readiness = Readiness::Full;
        let (limit, is_paused) = match &self.part {
            Some(part) => (self.options.limit.min(part.limit()), part.is_paused()),
            None => (self.options.limit, false),
        };
        if is_paused || self.work.in_flight() >= limit {
            return Ok(Poll::Pending);
        }
        let (polled, cause) = match self.part {
            Some(_) => unready::observe(|| self.ask(cx)),
            None => (self.ask(cx), None),
        };
        self.readiness = match (&polled, cause) {
            (Ok(Poll::Pending), Some(Cause::Intensity)) => Readiness::Throttled,
            (Ok(Poll::Pending), Some(Cause::Abandoned)) => Readiness::Exhausted,
            (Ok(Poll::Pending), None) => Readiness::Unready,
            _ => Readiness::Ready,
        };
        polled
    }

    fn ask(&mut self, cx: &mut Context<'_>) -> Result<Poll<Result<(), Erased>>, Panic> {
        let mut ask = || self.work.poll_ready(cx);
        if !mem::take(&mut self.options.checks_token) {
            return ask();
        }
        let (polled, listens) = observe(ask);
        let has_token = self.options.shutdown.is_some();
        if listens.is_some_and(|listens| listens != has_token) {
            guard(|| {
                tracing::warn!(
                    consumer = has_token,
                    sentinel = !has_token,
                    "only one side has a shutdown token: a drain will drop unfinished jobs instead of \
                     stopping them. Set both `shutdown`s to one token, or use the consumer's `sentinel`"
                );
            });
        }
        polled
    }
}
