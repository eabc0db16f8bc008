//! [`Consuming`], the future of a consumer.

use std::{
    fmt,
    future::Future,
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
    watched::{UntilEnd, Watched},
};
use crate::telemetry::consumer_name::named;

/// Result of a consumer: its summary, or the cause of an end that was not requested.
type Ended<T, E, C> = Result<Summary, ConsumerError<T, E, C>>;

type BoxFuture<R> = Pin<Box<dyn Future<Output = R> + Send>>;

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
pub struct Consuming<T, E, C = std::convert::Infallible> {
    state: State<Ended<T, E, C>>,
    _dropped: DropGuard,
}

enum State<R> {
    Idle(Option<(Option<Arc<str>>, BoxFuture<R>)>),
    Running(JoinHandle<R>),
}

impl<T, E, C> Consuming<T, E, C> {
    pub(super) fn new<F>(
        name: Option<Arc<str>>,
        mut signals: Signals,
        watched: Option<Arc<Watched>>,
        run: impl FnOnce(Signals) -> F,
    ) -> Self
    where
        F: Future<Output = Ended<T, E, C>> + Send + 'static,
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
}

impl<T, E, C> Future for Consuming<T, E, C>
where
    T: Send + 'static,
    E: Send + 'static,
    C: Send + 'static,
{
    type Output = Ended<T, E, C>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
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
                Err(_) => Err(ConsumerError::new(
                    EndCause::RuntimeGone,
                    Summary::default(),
                )),
            },
        })
    }
}

// The boxed future does not move.
impl<T, E, C> Unpin for Consuming<T, E, C> {}

impl<T, E, C> fmt::Debug for Consuming<T, E, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Consuming")
            .field("is_running", &matches!(self.state, State::Running(_)))
            .finish_non_exhaustive()
    }
}
