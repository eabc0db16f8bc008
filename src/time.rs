//! Deadlines, and a [`Timer`] that outlives its runtime.

use std::{
    iter,
    pin::{Pin, pin},
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use pin_project_lite::pin_project;
use tokio::{
    runtime::Handle,
    task::unconstrained,
    time::{Instant, Sleep, sleep_until},
};

use crate::outcome::catch;

/// Returns the instant `time` after `start`, or `None` if it is too far for a timer.
#[inline]
pub(crate) fn deadline(start: Instant, time: Duration) -> Option<Instant> {
    // A timer rounds up to a whole millisecond, and panics if that overflows.
    let due = start.checked_add(time)?;
    due.checked_add(Duration::from_millis(1)).map(|_| due)
}

/// Returns the time since `then`; zero if the clocks disagree and it is still to come.
pub(crate) fn elapsed_since(then: SystemTime) -> Duration {
    SystemTime::now().duration_since(then).unwrap_or_default()
}

/// Timer of a future that may move from one runtime to another.
///
/// Boxed, since a future that is ready at once has none.
#[derive(Debug)]
pub(crate) struct Timer(Pin<Box<Timing>>);

pin_project! {
    #[derive(Debug)]
    struct Timing {
        // `None`: too far for a timer.
        due: Option<Instant>,
        #[pin]
        sleep: Option<Sleep>,
    }
}

impl Timer {
    pub(crate) fn until(due: Option<Instant>) -> Self {
        let sleep = None;
        Self(Box::pin(Timing { due, sleep }))
    }

    pub(crate) fn after(time: Duration) -> Self {
        Self::until(deadline(Instant::now(), time))
    }

    pub(crate) fn reset(&mut self, due: Instant) {
        *self.0.as_mut().project().due = Some(due);
    }

    /// Waits until it is due.
    ///
    /// `None` if no runtime measures the time: outside of any runtime, and in one without timers.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Option<Poll<()>> {
        let timing = self.0.as_mut().project();
        match *timing.due {
            Some(due) => {
                let current = iter::once_with(Handle::try_current).flatten();
                poll_timer(timing.sleep, due, current, cx)
            }
            None => Some(Poll::Pending),
        }
    }
}

/// Polls the timer in `slot` for `due`.
///
/// If its runtime has ended, it is made anew on the first of `runtimes` that has timers. A timer panics
/// once its runtime is gone; this must not end the future that waits, and its deadline stays the same.
pub(crate) fn poll_timer(
    mut slot: Pin<&mut Option<Sleep>>,
    due: Instant,
    runtimes: impl IntoIterator<Item = Handle>,
    cx: &mut Context<'_>,
) -> Option<Poll<()>> {
    if let Some(mut sleep) = slot.as_mut().as_pin_mut() {
        let polled = catch(|| {
            if sleep.deadline() != due {
                sleep.as_mut().reset(due);
            }
            poll_anyway(sleep, cx)
        });
        if let Ok(polled) = polled {
            return Some(polled);
        }
    }
    for runtime in runtimes {
        let polled = catch(|| {
            let _context = runtime.enter();
            slot.set(Some(sleep_until(due)));
            slot.as_mut().as_pin_mut().map(|it| poll_anyway(it, cx))
        });
        if let Ok(polled) = polled {
            return polled;
        }
    }
    slot.set(None);
    None
}

/// Polls a timer, also if the task has used up its budget: the policy that the timer limits may be the one
/// that uses it up.
fn poll_anyway(sleep: Pin<&mut Sleep>, cx: &mut Context<'_>) -> Poll<()> {
    pin!(unconstrained(sleep)).poll(cx)
}
