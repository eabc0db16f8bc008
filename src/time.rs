//! Deadlines, and a timer that outlives its runtime.

use std::{
    iter,
    pin::{Pin, pin},
    task::{Context, Poll},
    time::Duration,
};

use pin_project_lite::pin_project;
use tokio::{
    runtime::Handle,
    task::unconstrained,
    time::{Instant, Sleep, sleep_until},
};

use crate::outcome::catch;

/// Returns when `time` from `start` on is over, or nothing if no timer reaches as far.
#[inline]
pub(crate) fn deadline(start: Instant, time: Duration) -> Option<Instant> {
    // A timer rounds up to a whole millisecond, and panics where that overflows.
    let due = start.checked_add(time)?;
    due.checked_add(Duration::from_millis(1)).map(|_| due)
}

/// The timer of a future that may be polled on one runtime after another. Boxed, since a future that
/// is ready at once has none.
#[derive(Debug)]
pub(crate) struct Timer(Pin<Box<Timing>>);

pin_project! {
    #[derive(Debug)]
    struct Timing {
        // `None`: so far that no timer reaches it.
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

    /// Waits until it is due; nothing if no runtime measures the time: outside of any, and in one
    /// without timers.
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

/// Polls the timer in `slot` for `due`, made anew on the first of `runtimes` that has timers if the
/// one that is there has none any more.
///
/// A timer panics once its runtime is gone. Whoever waits is not to die of it, and no time has
/// passed by it: another runtime measures it.
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

/// Polls a timer though the task has used up its budget: what uses it up may be the very policy
/// that is to be limited.
fn poll_anyway(sleep: Pin<&mut Sleep>, cx: &mut Context<'_>) -> Poll<()> {
    pin!(unconstrained(sleep)).poll(cx)
}
