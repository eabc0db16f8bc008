//! [`Consuming`], the future of a consumer.

use std::{
    convert::Infallible,
    fmt,
    future::Future,
    marker::PhantomData,
    panic::resume_unwind,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    ConsumerError, EndCause, Summary,
    signals::Signals,
    tasks::{Ended, Rest},
    watched::{UntilEnd, Watched},
};
use crate::telemetry::consumer_name::named;

/// Future of a [`Consumer`](crate::Consumer) or a
/// [`ReconnectingConsumer`](crate::consumer::ReconnectingConsumer).
///
/// From the first poll on, the consumer runs on a separate task.
///
/// # Panics
///
/// The first poll panics outside of a tokio runtime, and in one without timers.
///
/// # Cancel safety
///
/// Dropping it shuts the consumer down as the graceful signal does; the drain goes on in the background.
/// Before the first poll nothing has been taken from the stream, and nothing happens.
#[must_use = "a consumer does nothing unless it is awaited"]
pub struct Consuming<T, E, C = Infallible> {
    run: Run,
    errors: PhantomData<fn() -> (T, E, C)>,
}

impl<T, E, C> Consuming<T, E, C> {
    pub(super) fn new(run: Run) -> Self {
        let errors = PhantomData;
        Self { run, errors }
    }
}

impl<T, E, C> Future for Consuming<T, E, C>
where
    T: Send + 'static,
    E: Send + 'static,
    C: Send + 'static,
{
    type Output = Result<Summary, ConsumerError<T, E, C>>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Ended { cause, summary } = ready!(self.run.poll(cx));
        Poll::Ready(match cause {
            None => Ok(summary),
            Some(cause) => Err(ConsumerError::new(cause.typed(), summary)),
        })
    }
}

impl<T, E, C> fmt::Debug for Consuming<T, E, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Consuming")
            .field("is_running", &matches!(self.run.state, State::Running(_)))
            .finish_non_exhaustive()
    }
}

/// Run of a consumer, on a task of its own from the first poll on.
pub(super) struct Run {
    state: State,
    _dropped: DropGuard,
}

enum State {
    Idle(Option<(Option<Arc<str>>, Rest)>),
    Running(JoinHandle<Ended>),
}

impl Run {
    pub(super) fn new<F>(
        name: Option<Arc<str>>,
        mut signals: Signals,
        watched: Option<Arc<Watched>>,
        run: impl FnOnce(Signals) -> F,
    ) -> Self
    where
        F: Future<Output = Ended> + Send + 'static,
    {
        let dropped = match &watched {
            Some(watched) => watched.drain.child_token(),
            None => CancellationToken::new(),
        };
        signals.watch(dropped.clone());
        let run = run(signals);
        let until_end = watched.map(UntilEnd);
        let run = async move {
            let _until_end = until_end;
            run.await
        };
        Self {
            state: State::Idle(Some((name, Box::pin(run)))),
            _dropped: dropped.drop_guard(),
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Ended> {
        if let State::Idle(idle) = &mut self.state {
            let (name, future) = idle.take().expect("`Consuming` polled after a panic");
            self.state = State::Running(tokio::spawn(named(name, future)));
        }
        let State::Running(task) = &mut self.state else {
            unreachable!("the state was left above");
        };
        Poll::Ready(match ready!(Pin::new(task).poll(cx)) {
            Ok(ended) => ended,
            Err(error) => match error.try_into_panic() {
                // Panics of user code are caught where it is called.
                Ok(payload) => resume_unwind(payload),
                Err(_) => Ended {
                    cause: Some(EndCause::RuntimeGone),
                    summary: Summary::default(),
                },
            },
        })
    }
}
