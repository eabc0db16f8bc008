//! [`DeliveryLimit`]: how many failed deliveries a quorum queue forgives.

/// The limit that servers give to a quorum queue which was declared without one, from 4.0 on.
const DEFAULT: u32 = 20;

/// How many failed deliveries a quorum queue forgives; with the next it lets go of the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DeliveryLimit {
    /// The user has not said it, and AMQP does not tell it.
    Assumed,
    /// `None` if there is none, or where what the queue lets go of is not lost.
    Known(Option<u32>),
}

impl DeliveryLimit {
    /// Returns whether a job that has failed so often has to be published anew, lest its next
    /// failures take it over the limit.
    ///
    /// Half of the limit is left to what the adapter can't replace: the end of a channel counts.
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
