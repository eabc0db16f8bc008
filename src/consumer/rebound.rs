//! [`Rebound`], which warns of jobs that are retried or released only to come again at once.

use std::time::Duration;

use tokio::time::Instant;

use crate::{outcome::guard, settle::Verdict};

/// Number of jobs a second that may be retried or released without a delay before there is a warning.
const LIMIT: u32 = 100;

/// Time without another warning.
const QUIET: Duration = Duration::from_secs(10);

/// Counter of jobs that are retried or released to be delivered again at once.
///
/// Without it a worker that runs one job again and again would go unnoticed, since each of its settlements
/// succeeds.
#[derive(Debug, Default)]
pub(super) struct Rebound {
    /// The second that is counted; `None` before the first such job.
    window: Option<Window>,
    warned: Option<Instant>,
}

#[derive(Clone, Copy, Debug)]
struct Window {
    begun: Instant,
    given_back: u32,
    others: u32,
}

impl Rebound {
    /// Notes a settlement.
    pub(super) fn note(&mut self, verdict: Verdict) {
        if !is_given_back_at_once(verdict) {
            if let Some(window) = &mut self.window {
                window.others = window.others.saturating_add(1);
            }
            return;
        }
        let now = Instant::now();
        let window = self.window.get_or_insert(Window {
            begun: now,
            given_back: 0,
            others: 0,
        });
        window.given_back = window.given_back.saturating_add(1);
        if now - window.begun < Duration::from_secs(1) {
            return;
        }
        // A longer window yields a lower rate than the real one, so it never warns too early.
        let elapsed = now - window.begun;
        let Window {
            given_back, others, ..
        } = *window;
        self.window = None;
        let is_loop =
            f64::from(given_back) > f64::from(LIMIT) * elapsed.as_secs_f64() && given_back > others;
        if is_loop && self.warned.is_none_or(|at| now - at >= QUIET) {
            self.warned = Some(now);
            guard(|| {
                tracing::warn!(
                    given_back,
                    others,
                    ?elapsed,
                    "most jobs are retried or released without a delay, and are delivered again at once: \
                     is there a `backoff`, or an `IntensityLayer`?"
                );
            });
        }
    }
}

fn is_given_back_at_once(verdict: Verdict) -> bool {
    match verdict {
        Verdict::Retry { after } | Verdict::Release { after } => {
            after.is_none_or(|after| after.is_zero())
        }
        Verdict::Ack | Verdict::Reject | Verdict::Abandon => false,
    }
}
