//! [`Task`] of a job, which catches every panic where it happens.

use std::{
    future::Future,
    panic::resume_unwind,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use pin_project_lite::pin_project;
use tokio::task::futures::TaskLocalFuture;
use tower_service::Service;

use crate::{
    cancel::JobContext,
    outcome::{Panic, Quiet, catch, drop_quietly},
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
        // `None` once it is over.
        #[pin]
        call: Option<TaskLocalFuture<Arc<JobContext>, Call<S, J, F>>>,
        span: GuardedSpan,
    }

    impl<S, J, F> PinnedDrop for Task<S, J, F> {
        fn drop(this: Pin<&mut Self>) {
            let mut this = this.project();
            if this.call.is_none() {
                return;
            }
            let _entered = this.span.enter();
            // The panic is passed on to tokio as a payload whose destructor does not panic. It reaches the
            // supervisor, or is dropped if nobody waits any more.
            if let Err(panic) = JobContext::dropping(|| catch(|| this.call.set(None))) {
                resume_unwind(Box::new(panic));
            }
        }
    }
}

impl<S, J> Task<S, J, S::Future>
where
    S: Service<J>,
{
    /// Creates the task that calls the service with the job, in `context` and in `span`.
    pub(super) fn new(context: Arc<JobContext>, call: (S, J), span: GuardedSpan) -> Self {
        let call = Some(call);
        let call = Some(context.scope(Call::Calling { call }));
        Self { call, span }
    }
}

impl<S, J> Future for Task<S, J, S::Future>
where
    S: Service<J>,
{
    type Output = Output<S::Response, S::Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        let _entered = this.span.enter();
        // Invariant: a task is not polled again once it is over.
        let mut call = this.call.as_mut().as_pin_mut().expect("a job runs once");
        let exit = ready!(call.as_mut().poll(cx));
        let context = call.take_value();
        // At this point it no longer contains anything of the job.
        this.call.set(None);
        Poll::Ready(Quiet::new((exit, context)))
    }
}

pin_project! {
    /// The call, then its future, with every panic caught where it happens.
    ///
    /// tokio would catch the panics too, but it drops a future while its panic unwinds. If the future then
    /// panics in `Drop` as well, the process aborts.
    #[project = CallProj]
    enum Call<S, J, F> {
        Calling { call: Option<(S, J)> },
        Running { #[pin] future: F },
    }
}

impl<S, J> Future for Call<S, J, S::Future>
where
    S: Service<J>,
{
    type Output = Exit<S::Response, S::Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        JobContext::begin_poll();
        if let CallProj::Calling { call } = self.as_mut().project() {
            // The job has the outcome of a job that never started, and was aborted before that.
            if !JobContext::start_current() {
                return Poll::Pending;
            }
            // Invariant: a task is not polled again once `call` has panicked.
            let (mut service, job) = call.take().expect("the service is called once");
            let future = catch(|| service.call(job));
            drop_quietly(service);
            match future {
                Ok(future) => self.set(Call::Running { future }),
                Err(panic) => {
                    JobContext::close_current(&panic);
                    return Poll::Ready(Err(panic));
                }
            }
        }
        let mut returned = None;
        let polled = catch(|| {
            if let CallProj::Running { future } = self.as_mut().project() {
                returned = Some(ready!(future.poll(cx)));
            }
            self.set(Call::Calling { call: None });
            Poll::Ready(())
        });
        match (polled, returned) {
            (Ok(Poll::Pending), _) => Poll::Pending,
            // A destructor that panics cannot undo the result of the job.
            (_, Some(result)) => Poll::Ready(Ok(result)),
            (Err(panic), None) => {
                JobContext::close_current(&panic);
                // `set` writes the new value even if the drop of the old one unwinds.
                drop(catch(|| self.set(Call::Calling { call: None })));
                Poll::Ready(Err(panic))
            }
            (Ok(Poll::Ready(())), None) => unreachable!("a call that did not panic left a future"),
        }
    }
}
