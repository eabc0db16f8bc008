//! [`Work`] of one task: a subscription, a service and its calls, behind one trait object.

use std::{
    fmt, mem,
    pin::{Pin, pin},
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
};

use tower_service::Service;

use super::{
    Classify, Escalation, Summary,
    erased::{Cause, Erased},
    in_flight::{Call, InFlight, poll_next, wake_all},
    probe::Probing,
    share::Share,
    subscription::Subscription,
};
use crate::{
    outcome::{Panic, catch, catch_dyn, drop_quietly, guard_dyn},
    settle::Verdict,
};

/// Subscription of jobs `J`, with errors `T`, whose panics are caught.
///
/// It has no other parameters, so that handlers of one broker have it in common.
struct Jobs<J, T>(Pin<Box<AnySubscription<J, T>>>);

type AnySubscription<J, T> = dyn Subscription<Job = J, Error = T, Item = Result<J, T>> + Send;

impl<J: 'static, T: fmt::Display + Send + 'static> Jobs<J, T> {
    fn prefetch(&self) -> Option<usize> {
        // A prefetch of 0 would let nothing in.
        let prefetch = catch(|| self.0.prefetch()).ok().flatten();
        prefetch.map(|it| it.max(1))
    }

    /// Returns a part of `subscription` for each of at most `tasks`, and the prefetch if the tasks are bounded by it: then
    /// each has room for at least one call.
    fn among<B>(subscription: B, tasks: usize, is_bounded: bool) -> (Vec<Self>, Option<usize>)
    where
        B: Subscription<Job = J, Error = T> + Send + 'static,
    {
        let jobs = Self(Box::pin(subscription));
        let prefetch = match is_bounded {
            true => jobs.prefetch(),
            false => None,
        };
        let parts = jobs.split(tasks.min(prefetch.unwrap_or(usize::MAX)));
        (parts, prefetch)
    }

    /// Returns the subscription for each of the tasks.
    fn split(self, tasks: usize) -> Vec<Self> {
        if tasks == 1 {
            return vec![self];
        }
        let shares = Share::among(tasks, self.0);
        shares.map(|share| Self(Box::pin(share))).collect()
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<J, Cause>> {
        match catch(|| self.0.as_mut().poll_next(cx)) {
            Ok(polled) => polled.map(|next| match next {
                Some(Ok(job)) => Ok(job),
                Some(Err(error)) => Err(Cause::Stream(Erased::new(error))),
                None => Err(Cause::StreamEnded),
            }),
            Err(panic) => Poll::Ready(Err(Cause::StreamPanicked(panic))),
        }
    }

    fn poll_closed(&mut self, cx: &mut Context<'_>) -> Poll<Cause> {
        match catch(|| self.0.as_mut().poll_closed(cx)) {
            Ok(polled) => polled.map(|closed| match closed {
                Ok(()) => Cause::StreamEnded,
                Err(error) => Cause::Stream(Erased::new(error)),
            }),
            Err(panic) => Poll::Ready(Cause::StreamPanicked(panic)),
        }
    }

    fn poll_stop(&mut self, cx: &mut Context<'_>) -> Result<Poll<()>, Panic> {
        catch(|| self.0.as_mut().poll_stop(cx))
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Result<Poll<()>, Panic> {
        catch(|| self.0.as_mut().poll_close(cx))
    }

    fn is_gone(&self) -> bool {
        catch(|| self.0.is_gone()).unwrap_or(false)
    }
}

/// The part of a session that depends on the types of its subscription and its service.
///
/// A trait object, so that the rest of a consumer is compiled once, and not for each handler.
pub(super) trait Work: Send {
    /// Returns the number of calls in flight.
    fn in_flight(&self) -> usize;

    /// Polls the service for readiness.
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Result<Poll<Result<(), Erased>>, Panic>;

    /// Takes the next job, and calls the service with it, which must be ready.
    fn poll_call(&mut self, summary: &mut Summary, cx: &mut Context<'_>)
    -> Poll<Result<(), Cause>>;

    /// Takes the answer of a call that has ended; `None` if no call is in flight.
    fn poll_answer(&mut self, summary: &mut Summary, cx: &mut Context<'_>) -> Poll<Option<Answer>>;

    /// Wakes each call, so that it is polled again.
    fn wake_calls(&mut self);

    /// Polls each call once more, drops those that have not ended, and returns the answers of the others.
    fn abandon(&mut self, summary: &mut Summary, cx: &mut Context<'_>) -> Vec<Answer>;

    /// Waits for the end of the stream's channel, and returns it as a cause.
    fn poll_closed(&mut self, cx: &mut Context<'_>) -> Poll<Cause>;

    /// Asks the broker for no more jobs.
    fn poll_stop(&mut self, cx: &mut Context<'_>) -> Result<Poll<()>, Panic>;

    /// Gives up the channel.
    fn poll_close(&mut self, cx: &mut Context<'_>) -> Result<Poll<()>, Panic>;

    /// Returns whether no tag of the channel can be settled any more.
    fn is_gone(&self) -> bool;

    /// Asks the broker for its own view of the subscription.
    fn probe(&self) -> Option<Probing>;

    /// Drops the service, then the subscription.
    fn end(self: Box<Self>);
}

/// Answer of a call.
pub(super) enum Answer {
    /// It has succeeded, and is counted.
    Succeeded(Option<Verdict>),
    Failed(Escalation, Erased),
    Panicked(Panic),
}

/// Work of a session, for each of its tasks.
pub(super) struct Wired {
    pub(super) works: Vec<Box<dyn Work>>,
    /// Number of calls that may be in flight, if the consumer limits it.
    pub(super) prefetch: Option<usize>,
}

impl Wired {
    /// Connects a subscription with the services of a session. Each of them has a part of the subscription's
    /// prefetch if the consumer is bounded by it.
    pub(super) fn new<B, S, C>(
        subscription: B,
        mut services: Vec<S>,
        classify: &Arc<Mutex<C>>,
        is_bounded: bool,
    ) -> Self
    where
        B: Subscription<Job: Send, Error: fmt::Display + Send + 'static> + Send + 'static,
        S: Service<B::Job, Response: Send + 'static> + Send + 'static,
        S::Error: fmt::Display + Send + 'static,
        S::Future: Send + 'static,
        C: Classify<S::Error> + Send + 'static,
    {
        let (mut parts, prefetch) = Jobs::among(subscription, services.len(), is_bounded);
        services.truncate(parts.len());
        let mut works: Vec<Box<dyn Work>> = Vec::with_capacity(parts.len());
        while let Some(service) = services.pop() {
            // Invariant: there is a part for each service.
            let jobs = parts.pop().expect("a service has its jobs");
            works.push(Typed::boxed(jobs, service, classify));
        }
        works.reverse();
        Self { works, prefetch }
    }
}

struct Typed<J, T, S, F, C> {
    jobs: Jobs<J, T>,
    service: S,
    calls: InFlight<F>,
    // A closure need not be `Sync`.
    classify: Arc<Mutex<C>>,
}

impl<J, T, S, C> Typed<J, T, S, S::Future, C>
where
    S: Service<J, Response: 'static, Error: fmt::Display + Send + 'static>,
    C: Classify<S::Error>,
{
    fn boxed(jobs: Jobs<J, T>, service: S, classify: &Arc<Mutex<C>>) -> Box<dyn Work>
    where
        Self: Work + 'static,
    {
        Box::new(Self {
            jobs,
            service,
            calls: InFlight::new(),
            classify: Arc::clone(classify),
        })
    }

    fn answer(
        &self,
        summary: &mut Summary,
        answer: Result<Result<S::Response, S::Error>, Panic>,
    ) -> Answer {
        match answer {
            Ok(Ok(mut response)) => {
                let verdict = summary.answer(&mut response);
                drop_quietly(response);
                Answer::Succeeded(verdict)
            }
            Ok(Err(error)) => {
                // A classifier that panicked is still used: its result can't be worse than the assumption for a
                // panic.
                // If the classifier panics, the delivery may be unsettled.
                let mut escalation = Escalation::Channel;
                guard_dyn(&mut || {
                    let classify = self.classify.lock();
                    let classify = classify.unwrap_or_else(PoisonError::into_inner);
                    escalation = classify.classify(&error);
                });
                Answer::Failed(escalation, Erased::new(error))
            }
            Err(panic) => Answer::Panicked(panic),
        }
    }
}

impl<J, T, S, C> Work for Typed<J, T, S, S::Future, C>
where
    J: Send + 'static,
    T: fmt::Display + Send + 'static,
    S: Service<J, Response: 'static, Error: fmt::Display + Send + 'static> + Send,
    S::Future: Send,
    C: Classify<S::Error> + Send,
{
    fn in_flight(&self) -> usize {
        self.calls.len()
    }

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Result<Poll<Result<(), Erased>>, Panic> {
        let mut polled = Poll::Pending;
        catch_dyn(&mut || polled = self.service.poll_ready(cx))?;
        Ok(polled.map_err(Erased::new))
    }

    fn poll_call(
        &mut self,
        summary: &mut Summary,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), Cause>> {
        let mut job = match ready!(self.jobs.poll_next(cx)) {
            Ok(job) => Some(job),
            Err(cause) => return Poll::Ready(Err(cause)),
        };
        // The job is taken now: nothing may come before its call.
        summary.called += 1;
        // The push is inside, so that the future is moved only once.
        let called = catch_dyn(&mut || {
            if let Some(job) = job.take() {
                self.calls.push(Call::new(self.service.call(job)));
            }
        });
        Poll::Ready(called.map_err(Cause::CallPanicked))
    }

    fn poll_answer(&mut self, summary: &mut Summary, cx: &mut Context<'_>) -> Poll<Option<Answer>> {
        let answer = ready!(poll_next(&mut self.calls, cx));
        Poll::Ready(answer.map(|answer| self.answer(summary, answer)))
    }

    fn wake_calls(&mut self) {
        wake_all(&mut self.calls);
    }

    fn abandon(&mut self, summary: &mut Summary, cx: &mut Context<'_>) -> Vec<Answer> {
        let mut calls = pin!(mem::take(&mut self.calls));
        let mut answers = Vec::new();
        for call in calls.as_mut().iter_pin_mut() {
            if let Poll::Ready(answer) = call.poll(cx) {
                answers.push(self.answer(summary, answer));
            }
        }
        answers
    }

    fn poll_closed(&mut self, cx: &mut Context<'_>) -> Poll<Cause> {
        self.jobs.poll_closed(cx)
    }

    fn poll_stop(&mut self, cx: &mut Context<'_>) -> Result<Poll<()>, Panic> {
        self.jobs.poll_stop(cx)
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Result<Poll<()>, Panic> {
        self.jobs.poll_close(cx)
    }

    fn is_gone(&self) -> bool {
        self.jobs.is_gone()
    }

    fn probe(&self) -> Option<Probing> {
        self.jobs.0.probe()
    }

    fn end(self: Box<Self>) {
        let Self { jobs, service, .. } = *self;
        drop_quietly(service);
        drop_quietly(jobs);
    }
}
