//! [`Consuming`]: the future of a consumer.

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

use super::{ConsumerError, EndCause, Summary, signals::Signals};
use crate::telemetry::consumer_name::named;

/// The result of a consumer: what it did, or why it ended without being asked to.
type Ended<T, E, C> = Result<Summary, ConsumerError<T, E, C>>;

type BoxFuture<R> = Pin<Box<dyn Future<Output = R> + Send>>;

/// The future of a [`Consumer`](crate::Consumer) and of a
/// [`ReconnectingConsumer`](crate::consumer::ReconnectingConsumer).
///
/// The consumer runs on a task of its own from the first poll on.
///
/// # Panics
///
/// The first poll panics outside of a tokio runtime, and in one without timers.
///
/// # Cancel safety
///
/// To drop it shuts the consumer down as the graceful signal does; the drain goes on in the
/// background. Before the first poll nothing was taken from the stream, and nothing happens.
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
        run: impl FnOnce(Signals) -> F,
    ) -> Self
    where
        F: Future<Output = Ended<T, E, C>> + Send + 'static,
    {
        let dropped = CancellationToken::new();
        signals.watch(dropped.clone());
        Self {
            state: State::Idle(Some((name, Box::pin(run(signals))))),
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
                // What is the user's is caught where it is called.
                Ok(payload) => resume_unwind(payload),
                Err(_) => Err(ConsumerError::new(
                    EndCause::RuntimeGone,
                    Summary::default(),
                )),
            },
        })
    }
}

// The boxed future stays where it is.
impl<T, E, C> Unpin for Consuming<T, E, C> {}

impl<T, E, C> fmt::Debug for Consuming<T, E, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Consuming")
            .field("is_running", &matches!(self.state, State::Running(_)))
            .finish_non_exhaustive()
    }
}
