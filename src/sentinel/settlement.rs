//! The settlement of one job by its policy.

use std::{
    mem,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tower_service::Service;

use crate::{
    outcome::{Panic, catch, drop_quietly},
    policy::Report,
};

/// The settlement of one job: drives a policy to readiness, calls it once and awaits it.
///
/// `Unpin`, so that it can move to another task half-way: hence the box around the future.
pub(crate) enum Settlement<P, F, Tag, T, E> {
    // `None` once the report is with the policy.
    Readying(P, Option<Report<Tag, T, E>>),
    Calling(Pin<Box<F>>),
    Ended,
}

impl<P, F, Tag, T, E> Settlement<P, F, Tag, T, E>
where
    P: Service<Report<Tag, T, E>, Future = F>,
    F: Future<Output = Result<P::Response, P::Error>>,
{
    /// Returns what the policy answered, or how it panicked.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<F::Output, Panic>> {
        let mut answer = None;
        // All of it in one `catch`, for each has its price on the path of every job.
        let polled = catch(|| {
            answer = Some(ready!(self.poll_answer(cx)));
            *self = Settlement::Ended;
            Poll::Ready(())
        });
        match (polled, answer) {
            (Ok(Poll::Pending), _) => Poll::Pending,
            // A destructor that panics cannot take back an answer.
            (_, Some(answer)) => Poll::Ready(Ok(answer)),
            (Err(panic), None) => {
                self.end();
                Poll::Ready(Err(panic))
            }
            (Ok(Poll::Ready(())), None) => unreachable!("ready with an answer"),
        }
    }

    fn poll_answer(&mut self, cx: &mut Context<'_>) -> Poll<F::Output> {
        if let Settlement::Readying(policy, report) = self {
            if let Err(error) = ready!(policy.poll_ready(cx)) {
                return Poll::Ready(Err(error));
            }
            // Invariant: the call below leaves this state, also by unwinding.
            let report = report.take().expect("the policy is called once");
            let calling = Settlement::Calling(Box::pin(policy.call(report)));
            // A policy whose destructor panics has been called all the same.
            drop_quietly(mem::replace(self, calling));
        }
        match self {
            Settlement::Calling(future) => future.as_mut().poll(cx),
            _ => unreachable!("a settlement is not polled after its end"),
        }
    }

    /// Drops whatever is left of the policy and the report.
    pub(crate) fn end(&mut self) {
        drop_quietly(mem::replace(self, Settlement::Ended));
    }
}
