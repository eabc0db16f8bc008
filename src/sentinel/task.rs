//! [`Task`] of a job, which catches every panic where it happens.

use std::{
    future::Future,
    panic::resume_unwind,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use pin_project_lite::pin_project;
use tower_service::Service;

use crate::{
    cancel::{JobContext, enter},
    outcome::{Panic, Quiet, Run, catch, catch_dyn, drop_quietly},
    telemetry::GuardedSpan,
};

/// Exit of a job that is not aborted.
type Exit<T, E> = Result<Result<T, E>, Panic>;

/// Result of a job's task. The context is returned with the exit: if it were released where the job ran, its
/// cache line would have to move between two cores.
pub(super) type Output<T, E> = Quiet<(Exit<T, E>, Option<Arc<JobContext>>)>;

pin_project! {
    /// Task of a job.
    pub(super) struct Task<S, J, F> {
        #[pin]
        call: Call<S, J, F>,
        // The exit takes it along.
        context: Option<Arc<JobContext>>,
        span: GuardedSpan,
    }

    impl<S, J, F> PinnedDrop for Task<S, J, F> {
        fn drop(this: Pin<&mut Self>) {
            let mut this = this.project();
            if let Call::Over = *this.call {
                return;
            }
            drop_job(this.span, this.context, &mut || this.call.set(Call::Over));
        }
    }
}

pin_project! {
    /// The call, then its future.
    #[project = CallProj]
    enum Call<S, J, F> {
        // Each is `None` once it is used.
        Calling { service: Option<S>, job: Option<J> },
        Running { #[pin] future: F },
        Over,
    }
}

impl<S, J, F> Task<S, J, F> {
    /// Creates the task that calls the service with the job, in `context` and in `span`.
    pub(super) fn new(context: Arc<JobContext>, (service, job): (S, J), span: GuardedSpan) -> Self {
        Self {
            call: Call::Calling {
                service: Some(service),
                job: Some(job),
            },
            context: Some(context),
            span,
        }
    }
}

impl<S, J> Future for Task<S, J, S::Future>
where
    S: Service<J>,
{
    type Output = Output<S::Response, S::Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let mut polling = Polling {
            call: this.call,
            result: None,
        };
        let panic = ready!(poll_job(this.span, this.context, &mut polling, cx));
        let exit = match (polling.result, panic) {
            // A destructor that panics cannot undo the result of the job.
            (Some(result), _) => Ok(result),
            (None, Some(panic)) => Err(panic),
            (None, None) => unreachable!("a call that did not panic left a result"),
        };
        // At this point the task no longer contains anything of the job.
        Poll::Ready(Quiet::new((exit, this.context.take())))
    }
}

/// One poll of a job.
struct Polling<'a, S: Service<J>, J> {
    call: Pin<&'a mut Call<S, J, S::Future>>,
    result: Option<Result<S::Response, S::Error>>,
}

/// A [`Polling`] without its types, so that most of a task is compiled once. `poll` and `end` may panic.
trait Poller {
    fn is_new(&self) -> bool;

    fn has_result(&self) -> bool;

    /// Calls the service, and polls its future.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()>;

    fn end(&mut self);
}

impl<S: Service<J>, J> Poller for Polling<'_, S, J> {
    fn is_new(&self) -> bool {
        matches!(*self.call, Call::Calling { .. })
    }

    fn has_result(&self) -> bool {
        self.result.is_some()
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let CallProj::Calling { service, job } = self.call.as_mut().project() {
            // Invariant: a task is not polled again once `call` has panicked.
            let (Some(callee), Some(job)) = (&mut *service, job.take()) else {
                unreachable!("a service is called once");
            };
            // If this panics, the service is dropped by `end`, and not by the unwinding.
            let future = callee.call(job);
            let service = service.take();
            self.call.set(Call::Running { future });
            drop_quietly(service);
        }
        if let CallProj::Running { future } = self.call.as_mut().project() {
            self.result = Some(ready!(future.poll(cx)));
        }
        self.end();
        Poll::Ready(())
    }

    fn end(&mut self) {
        // It writes the new value even if the drop of the old one unwinds.
        self.call.set(Call::Over);
    }
}

/// Polls a job in its span and its context, and returns its panic.
///
/// tokio would catch the panic too, but it drops a future while its panic unwinds. If the future then
/// panics in `Drop` as well, the process aborts.
fn poll_job(
    span: &GuardedSpan,
    context: &mut Option<Arc<JobContext>>,
    job: &mut dyn Poller,
    cx: &mut Context<'_>,
) -> Poll<Option<Panic>> {
    let _entered = span.enter();
    let _current = enter(context);
    JobContext::begin_poll();
    // A job that may not start has the outcome of one that never did, and was aborted before that.
    if job.is_new() && !JobContext::start_current() {
        return Poll::Pending;
    }
    match catch(|| job.poll(cx)) {
        Ok(polled) => polled.map(|()| None),
        Err(panic) => {
            if !job.has_result() {
                JobContext::close_current(&panic);
                drop(catch(|| job.end()));
            }
            Poll::Ready(Some(panic))
        }
    }
}

/// Drops a job that has not ended, in its span and its context.
#[cold]
fn drop_job(span: &GuardedSpan, context: &mut Option<Arc<JobContext>>, end: &mut dyn Run) {
    let _entered = span.enter();
    let dropped = {
        let _current = enter(context);
        JobContext::dropping(|| catch_dyn(end))
    };
    // The panic is passed on to tokio as a payload whose destructor does not panic. It reaches the
    // supervisor, or is dropped if nobody waits any more.
    if let Err(panic) = dropped {
        resume_unwind(Box::new(panic));
    }
}
