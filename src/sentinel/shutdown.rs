//! The shutdown of a sentinel's jobs, and when it was asked for.

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Wake},
};

use tokio::{runtime::Handle, time::Instant};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use crate::outcome::guard;

/// A token, and a watch on it that notes when it was cancelled: which cause of a stop came first is a
/// matter of time, and not of the next poll.
pub(crate) struct Shutdown {
    token: CancellationToken,
    alarm: Arc<Alarm>,
    // Never polled again: it keeps the alarm where the token finds it.
    _waiting: Option<Pin<Box<WaitForCancellationFutureOwned>>>,
}

impl Shutdown {
    /// Begins to watch, by the clock of `runtime`.
    pub(crate) fn new(token: &CancellationToken, runtime: Handle) -> Self {
        let at = OnceLock::new();
        let alarm = Arc::new(Alarm { at, runtime });
        let mut waiting = Box::pin(token.clone().cancelled_owned());
        let waker = Arc::clone(&alarm).into();
        let polled = waiting.as_mut().poll(&mut Context::from_waker(&waker));
        if polled.is_ready() {
            alarm.note();
        }
        Self {
            token: token.clone(),
            alarm,
            _waiting: polled.is_pending().then_some(waiting),
        }
    }

    /// Waits for the token to be cancelled.
    pub(crate) fn cancelled(&self) -> WaitForCancellationFutureOwned {
        self.token.clone().cancelled_owned()
    }

    /// Returns since when the token is cancelled, if it is.
    pub(crate) fn since(&self) -> Option<Instant> {
        if !self.token.is_cancelled() {
            return None;
        }
        // It may be cancelled on another thread just now.
        self.alarm.note();
        self.alarm.at.get().copied()
    }
}

struct Alarm {
    at: OnceLock<Instant>,
    runtime: Handle,
}

impl Alarm {
    fn note(&self) {
        self.at.get_or_init(|| {
            let _clock = self.runtime.enter();
            Instant::now()
        });
    }
}

impl Wake for Alarm {
    fn wake(self: Arc<Self>) {
        // No runtime can be entered in a thread that is about to end.
        guard(|| self.note());
    }
}
