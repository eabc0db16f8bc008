//! Growing delays between tries; the sequence is that of the `backon` crate.

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

    /// Returns the first `n` delays together.
    pub(crate) fn sum(self, n: u32) -> Duration {
        let growing = self
            .delays()
            .take(n.min(LAST) as usize)
            .fold(Duration::ZERO, Duration::saturating_add);
        growing.saturating_add(self.max.saturating_mul(n.saturating_sub(LAST)))
    }

    /// Returns the sequence, in whole milliseconds between its bounds, as timers are: `backon`
    /// counts in single precision, where twice 100 ms are 200.000003 ms.
    fn delays(self) -> impl Iterator<Item = Duration> {
        ExponentialBuilder::new()
            .with_min_delay(self.min)
            .with_max_delay(self.max)
            .without_max_times()
            // Never drawn from; it keeps the builder from asking the thread for a seed.
            .with_jitter_seed(0)
            .build()
            .map(move |delay| round(delay).clamp(self.min, self.max))
    }
}

fn round(delay: Duration) -> Duration {
    let millis = (delay.as_nanos() + 500_000) / 1_000_000;
    u64::try_from(millis).map_or(delay, Duration::from_millis)
}

/// Returns the part `draw`, from 0 to 1, of `ceiling`: "full jitter".
pub(crate) fn full_jitter(ceiling: Duration, draw: f64) -> Duration {
    let seconds = ceiling.as_secs_f64() * draw.clamp(0.0, 1.0);
    // An error is an overflow by rounding, or a NaN.
    Duration::try_from_secs_f64(seconds).map_or(ceiling, |delay| delay.min(ceiling))
}
