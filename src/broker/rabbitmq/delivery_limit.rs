//! [`DeliveryLimit`] of a quorum queue.

/// The limit that servers from 4.0 on give to a quorum queue that is declared without one.
const DEFAULT: u32 = 20;

/// The number of failed deliveries that a quorum queue allows; with the next one it drops or dead-letters the
/// job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DeliveryLimit {
    /// The limit is not set by the user, and AMQP does not report it.
    Assumed,
    /// `None` if there is no limit, or if the queue dead-letters the jobs that exceed it.
    Known(Option<u32>),
}

impl DeliveryLimit {
    /// Returns whether a job with so many failed deliveries has to be published anew, so that its next
    /// failures don't exceed the limit.
    ///
    /// Half of the limit is left to the ends of channels, which count and which the adapter can't replace.
    pub(super) fn is_near(self, failed: u32) -> bool {
        let limit = match self {
            DeliveryLimit::Assumed => Some(DEFAULT),
            DeliveryLimit::Known(limit) => limit,
        };
        limit.is_some_and(|limit| failed >= limit / 2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_the_limit_is_left() {
        for limit in 0..50 {
            let near = |failed| DeliveryLimit::Known(Some(limit)).is_near(failed);
            let first = (0..).find(|failed| near(*failed)).unwrap();
            assert_eq!(first, limit / 2, "{limit}");
        }
        assert!(!DeliveryLimit::Assumed.is_near(9));
        assert!(DeliveryLimit::Assumed.is_near(10));
        assert!(!DeliveryLimit::Known(None).is_near(u32::MAX));
    }
}
