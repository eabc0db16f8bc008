//! [`Settlement`] of one job by its policy.

use std::{
    mem,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tower_service::Service;

use crate::{
    outcome::{Panic, catch_dyn, drop_quietly},
    policy::Report,
};

/// Settlement of one job, which drives a policy to readiness, calls it once and awaits it.
///
/// `Unpin`, so that it can move to another task half-way; therefore the future is boxed.
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
    /// Returns the response of the policy, or its panic.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<F::Output, Panic>> {
        let mut answer = None;
        // One `catch` for everything, since each one costs time on the path of every job.
        let polled = catch_dyn(&mut || {
            if let Poll::Ready(response) = self.poll_answer(cx) {
                answer = Some(response);
                *self = Settlement::Ended;
            }
        });
        match (polled, answer) {
            // A destructor that panics cannot undo a response.
            (_, Some(answer)) => Poll::Ready(Ok(answer)),
            (Ok(()), None) => Poll::Pending,
            (Err(panic), None) => {
                self.end();
                Poll::Ready(Err(panic))
            }
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
            if let Settlement::Readying(policy, _) = mem::replace(self, calling) {
                // If this panics, the policy has still been called.
                drop_quietly(policy);
            }
        }
        match self {
            Settlement::Calling(future) => future.as_mut().poll(cx),
            _ => unreachable!("a settlement is not polled after its end"),
        }
    }

    /// Drops the policy and the report, if they are still here.
    pub(crate) fn end(&mut self) {
        drop_quietly(mem::replace(self, Settlement::Ended));
    }
}
