//! [`Breaks`] of connections during an open request.

use std::time::Duration;

use tokio::time::Instant;

use super::SubscriptionError;

/// Greatest number of connections in a row that may break without having brought a message.
const BARREN_LIMIT: u32 = 5;

/// Shortest time after which a break is not related to the one before.
const QUIET: Duration = Duration::from_secs(60);

/// Counts of connections that broke while a request was open.
///
/// A server that goes down breaks one or two. A message that the client can't parse breaks one at each of its
/// deliveries, which come after its ack wait.
#[derive(Debug, Default)]
pub(super) struct Breaks {
    /// Breaks in a row without a received message between them.
    barren: u32,
    /// Breaks in a row without a quiet time between them.
    related: u32,
    last: Option<Instant>,
    is_suspicious: bool,
}

impl Breaks {
    /// Notes that a message was received.
    pub(super) fn hear(&mut self) {
        self.barren = 0;
    }

    /// Notes a break, and returns an error if too many connections in a row have brought nothing.
    pub(super) fn note(&mut self, ack_wait: Duration) -> Result<(), SubscriptionError> {
        let quiet = QUIET.max(ack_wait.saturating_mul(2));
        let is_related = self.last.is_some_and(|last| last.elapsed() < quiet);
        self.last = Some(Instant::now());
        self.related = if is_related { self.related + 1 } else { 1 };
        self.barren += 1;
        if self.barren >= BARREN_LIMIT {
            let times = self.barren;
            return Err(SubscriptionError::Breaking { times });
        }
        self.is_suspicious = self.related >= 2;
        Ok(())
    }

    /// Returns the number of related breaks, once after each.
    pub(super) fn take_suspicion(&mut self) -> Option<u32> {
        std::mem::take(&mut self.is_suspicious).then_some(self.related)
    }
}

#[cfg(test)]
mod tests {
    use super::{BARREN_LIMIT, Breaks, SubscriptionError};
    use std::time::Duration;
    use tokio::time::advance;

    const WAIT: Duration = Duration::from_secs(30);

    #[tokio::test(start_paused = true)]
    async fn the_second_of_two_is_suspicious_unless_time_has_passed() {
        let mut breaks = Breaks::default();
        breaks.note(WAIT).unwrap();
        assert_eq!(breaks.take_suspicion(), None);
        advance(WAIT).await;
        breaks.note(WAIT).unwrap();
        assert_eq!(breaks.take_suspicion(), Some(2));
        assert_eq!(breaks.take_suspicion(), None);
        advance(2 * WAIT).await;
        breaks.note(WAIT).unwrap();
        assert_eq!(breaks.take_suspicion(), None);
    }

    #[test]
    fn connections_that_bring_nothing_end_the_subscription() {
        let mut breaks = Breaks::default();
        for _ in 0..20 {
            breaks.hear();
            breaks.note(WAIT).unwrap();
        }
        let result = (0..BARREN_LIMIT - 1).try_for_each(|_| breaks.note(WAIT));
        assert!(matches!(
            result,
            Err(SubscriptionError::Breaking {
                times: BARREN_LIMIT
            })
        ));
    }
}
