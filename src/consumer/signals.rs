//! [`Signals`] that request the end of a consumer, and their state.

use std::{
    fmt,
    future::{Future, poll_fn},
    pin::{Pin, pin},
    task::{Context, Poll},
};

use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use crate::outcome::{catch, drop_quietly, guard};

/// Request to a consumer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Asked {
    Nothing,
    /// To let running calls finish.
    Drain,
    /// To stop running calls.
    Stop,
}

/// Future of the user that resolves when something is requested.
pub(super) type Signal = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The two signals, and the drop of the consumer's future, which counts as the first.
#[derive(Default)]
pub(super) struct Signals {
    pub(super) graceful: Option<Signal>,
    /// Not polled before the first signal, since both may wait for the same key press.
    pub(super) forced: Option<Signal>,
    dropped: Option<Pin<Box<WaitForCancellationFutureOwned>>>,
    /// The shutdown token of the present session, while it takes jobs.
    shutdown: Option<Pin<Box<WaitForCancellationFutureOwned>>>,
    drain: bool,
    stop: bool,
    /// Cancelled with the second signal.
    stopped: CancellationToken,
}

impl Signals {
    /// Returns a token that is cancelled with the second signal, as long as these signals are polled.
    pub(super) fn stop_token(&self) -> CancellationToken {
        self.stopped.child_token()
    }

    /// Makes the cancellation of `token` count as the first signal.
    pub(super) fn watch(&mut self, token: CancellationToken) {
        self.dropped = Some(Box::pin(token.cancelled_owned()));
    }

    /// Makes the cancellation of a session's shutdown token count as the first signal. `None` ends that,
    /// since a session cancels its own token at its end.
    pub(super) fn watch_shutdown(&mut self, token: Option<CancellationToken>) {
        self.shutdown = token.map(|token| Box::pin(token.cancelled_owned()));
    }

    pub(super) fn asked(&self) -> Asked {
        match (self.drain, self.stop) {
            (_, true) => Asked::Stop,
            (true, false) => Asked::Drain,
            (false, false) => Asked::Nothing,
        }
    }

    /// Returns the request so far, and registers the waker for more.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Asked {
        if !self.drain {
            let dropped = self.dropped.as_mut();
            self.drain = dropped.is_some_and(|dropped| dropped.as_mut().poll(cx).is_ready());
            self.drain |= poll_signal(&mut self.graceful, cx);
            let shutdown = self.shutdown.as_mut();
            // A sentinel that is shut down would release every job at once.
            if shutdown.is_some_and(|shutdown| shutdown.as_mut().poll(cx).is_ready()) {
                guard(|| tracing::info!("shutdown token cancelled"));
                self.shutdown = None;
                self.drain = true;
            }
        }
        if self.drain && !self.stop {
            self.stop = poll_signal(&mut self.forced, cx);
            if self.stop {
                self.stopped.cancel();
            }
        }
        self.asked()
    }

    /// Waits for `future`, and polls the signals meanwhile.
    pub(super) async fn attend<F: Future>(&mut self, future: F) -> F::Output {
        let mut future = pin!(future);
        poll_fn(|cx| {
            self.poll(cx);
            future.as_mut().poll(cx)
        })
        .await
    }

    /// Waits for `future`, unless the end is requested first.
    pub(super) async fn unless_asked<F: Future>(&mut self, future: F) -> Option<F::Output> {
        let mut future = Box::pin(future);
        let output = poll_fn(|cx| match self.poll(cx) {
            Asked::Nothing => future.as_mut().poll(cx).map(Some),
            Asked::Drain | Asked::Stop => Poll::Ready(None),
        });
        let output = output.await;
        drop_quietly(future);
        output
    }
}

/// Polls a signal. One that panics counts as given, since the process can no longer request the end by it.
fn poll_signal(signal: &mut Option<Signal>, cx: &mut Context<'_>) -> bool {
    let Some(future) = signal else {
        return false;
    };
    let is_given = catch(|| future.as_mut().poll(cx).is_ready()).unwrap_or(true);
    if is_given {
        drop_quietly(signal.take());
    }
    is_given
}

impl fmt::Debug for Signals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signals")
            .field("graceful", &self.graceful.is_some())
            .field("forced", &self.forced.is_some())
            .finish_non_exhaustive()
    }
}
