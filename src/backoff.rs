//! Growing delays between tries.

use std::{ops::RangeInclusive, time::Duration};

/// Number of doublings after which the sequence no longer grows, for any bounds: 1 ns doubled this often is
/// more than a `Duration` can hold.
const LAST: u32 = 96;

/// Delays that double from a minimum to a maximum.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Delays {
    min: Duration,
    max: Duration,
}

impl Delays {
    #[track_caller]
    pub(crate) fn new(bounds: RangeInclusive<Duration>) -> Self {
        let (min, max) = bounds.into_inner();
        assert!(!min.is_zero(), "a backoff from 0 would never grow");
        assert!(min <= max, "a backoff from {min:?} can't end at {max:?}");
        Self { min, max }
    }

    /// Returns the delay after the `n`-th try, counted from 1.
    pub(crate) fn nth(self, n: u32) -> Duration {
        let doubled = 1_u128 << n.saturating_sub(1).min(LAST);
        let nanos = self.min.as_nanos().saturating_mul(doubled);
        if nanos >= self.max.as_nanos() {
            return self.max;
        }
        let second = Duration::from_secs(1).as_nanos();
        // Invariant: it is less than `max`, so neither cast truncates.
        Duration::new((nanos / second) as u64, (nanos % second) as u32)
    }

    /// Returns whether no delay is longer than the `n`-th.
    pub(crate) fn is_longest(self, n: u32) -> bool {
        n > LAST || self.nth(n) == self.max
    }
}

/// Returns `ceiling` times `draw`, which is from 0 to 1: "full jitter".
pub(crate) fn full_jitter(ceiling: Duration, draw: f64) -> Duration {
    let seconds = ceiling.as_secs_f64() * draw.clamp(0.0, 1.0);
    // An error is an overflow by rounding, or a NaN.
    Duration::try_from_secs_f64(seconds).map_or(ceiling, |delay| delay.min(ceiling))
}
