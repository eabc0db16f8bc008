//! [`Shutdown`] of a sentinel's jobs, and the time at which it was requested.

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Wake},
};

use tokio::{runtime::Handle, time::Instant};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use crate::outcome::guard;

/// A token, and the time at which it was cancelled. The order of causes is decided by time, and not by the
/// next poll.
pub(crate) struct Shutdown {
    token: CancellationToken,
    alarm: Arc<Alarm>,
    // It is not polled again; it keeps the alarm registered with the token.
    _waiting: Option<Pin<Box<WaitForCancellationFutureOwned>>>,
}

impl Shutdown {
    /// Starts to watch the token, by the clock of `runtime`.
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

    /// Returns the time at which the token was cancelled, if it is.
    pub(crate) fn since(&self) -> Option<Instant> {
        if !self.token.is_cancelled() {
            return None;
        }
        // Another thread may be cancelling it at this moment, before the alarm has noted the time.
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
