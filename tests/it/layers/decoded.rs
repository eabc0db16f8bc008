//! The job that a decoded job still is.

use std::time::{Duration, SystemTime};

use tower_sentinel::{
    Job, TimeLimit,
    decode::{DecodeError, Decoded},
    settle::Messaging,
};

use crate::support::{Refused, tag::Tag};

const SECOND: Duration = Duration::from_secs(1);

/// A job with a value for each method.
struct Told;

impl Job for Told {
    type Tag = Tag;

    fn tag(&self) -> Tag {
        Tag::new().delivered(3)
    }

    fn time_limit(&self) -> TimeLimit {
        TimeLimit::After(7 * SECOND)
    }

    fn lease(&self) -> Option<Duration> {
        Some(30 * SECOND)
    }

    fn messaging(&self) -> Option<Messaging<'_>> {
        Some(Messaging::new("memory", "orders"))
    }

    fn queued_since(&self) -> Option<SystemTime> {
        Some(SystemTime::UNIX_EPOCH)
    }
}

#[test]
fn a_decoded_job_keeps_its_limit_its_lease_and_its_description() {
    let job = Decoded {
        job: Told,
        value: 42,
    };
    assert_eq!(job.time_limit(), TimeLimit::After(7 * SECOND));
    assert_eq!(job.lease(), Some(30 * SECOND));
    assert!(job.messaging().is_some());
    assert_eq!(job.queued_since(), Some(SystemTime::UNIX_EPOCH));
}

#[test]
fn only_an_error_of_the_codec_is_undecodable() {
    assert!(DecodeError::<_, Refused>::Undecodable(Refused).is_undecodable());
    assert!(!DecodeError::<Refused, _>::Inner(Refused).is_undecodable());
}
