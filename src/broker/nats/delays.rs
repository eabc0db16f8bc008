//! [`Delays`] by NAK, which count toward the `max_ack_pending` of their consumer.

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    fmt,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// Delayed NAKs of one subscription that are not due yet.
pub(super) struct Delays {
    /// Greatest number of unacked deliveries; `None` if there is no limit.
    limit: Option<usize>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    due: BinaryHeap<Reverse<Instant>>,
    is_warned: bool,
}

/// Delays that are near the limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NearLimit {
    pub(super) delayed: usize,
    pub(super) limit: usize,
}

impl Delays {
    /// Creates the delays of a consumer; below one `max_ack_pending` is no limit.
    pub(super) fn new(max_ack_pending: i64) -> Self {
        Self {
            limit: usize::try_from(max_ack_pending)
                .ok()
                .filter(|limit| *limit > 0),
            state: Mutex::default(),
        }
    }

    /// Notes a NAK with `delay` beside `held` unsettled deliveries; returns `NearLimit` once they reach three
    /// quarters of the limit, and only the first time.
    pub(super) fn add(&self, delay: Duration, held: usize) -> Option<NearLimit> {
        let limit = self.limit?;
        let now = Instant::now();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while state.due.peek().is_some_and(|Reverse(due)| *due <= now) {
            state.due.pop();
        }
        // A time beyond the clock's range counts as for ever.
        let due = now.checked_add(delay).unwrap_or(now + FOR_EVER);
        state.due.push(Reverse(due));
        let delayed = state.due.len();
        let unacked = delayed + held;
        let was_warned = state.is_warned;
        if unacked * 4 >= limit * 3 {
            state.is_warned = true;
        } else if unacked * 2 < limit {
            state.is_warned = false;
        }
        (state.is_warned && !was_warned).then_some(NearLimit { delayed, limit })
    }
}

const FOR_EVER: Duration = Duration::from_secs(60 * 60 * 24 * 365);

impl fmt::Debug for Delays {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delays")
            .field("limit", &self.limit)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::{Delays, NearLimit};
    use std::time::Duration;
    use tokio::time::advance;

    const MINUTE: Duration = Duration::from_secs(60);

    #[tokio::test(start_paused = true)]
    async fn it_is_said_once_until_half_of_them_are_due() {
        let delays = Delays::new(8);
        for _ in 0..4 {
            assert_eq!(delays.add(MINUTE, 1), None);
        }
        let near = NearLimit {
            delayed: 5,
            limit: 8,
        };
        assert_eq!(delays.add(MINUTE, 1), Some(near));
        assert_eq!(delays.add(MINUTE, 1), None);
        advance(MINUTE).await;
        assert_eq!(delays.add(MINUTE, 1), None);
        let near = NearLimit {
            delayed: 2,
            limit: 8,
        };
        assert_eq!(delays.add(MINUTE, 4), Some(near));
        assert_eq!(delays.add(Duration::MAX, 3), None);
    }

    #[test]
    fn without_a_limit_there_is_nothing_to_say() {
        for unlimited in [-1, 0] {
            assert_eq!(Delays::new(unlimited).add(MINUTE, 1_000), None);
        }
    }
}
