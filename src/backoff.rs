//! Growing delays; the sequence is that of the `backon` crate.

use std::{ops::RangeInclusive, time::Duration};

use backon::{BackoffBuilder, ExponentialBuilder};

/// From here on the sequence stays where it is, whatever its bounds: 1 ns doubled this often is
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

    /// Returns the delay after the `n`-th try, the first of which is 1.
    pub(crate) fn nth(self, n: u32) -> Duration {
        let index = n.saturating_sub(1).min(LAST);
        self.delays().nth(index as usize).unwrap_or(self.max)
    }

    fn delays(self) -> impl Iterator<Item = Duration> {
        ExponentialBuilder::new()
            .with_min_delay(self.min)
            .with_max_delay(self.max)
            .without_max_times()
            // Never drawn from; it keeps the builder from asking the thread for a seed.
            .with_jitter_seed(0)
            .build()
    }
}

/// Returns the part `draw`, from 0 to 1, of `ceiling`: "full jitter".
pub(crate) fn full_jitter(ceiling: Duration, draw: f64) -> Duration {
    // `max` and `min` also turn a NaN into a 0, where `clamp` would keep it.
    let draw = draw.max(0.0).min(1.0);
    let seconds = ceiling.as_secs_f64() * draw;
    Duration::try_from_secs_f64(seconds).map_or(ceiling, |delay| delay.min(ceiling))
}
