//! What an adapter inherits: the default methods of `Settle`, and the texts of the errors around its own.

use std::{
    error::Error as _,
    future::{Ready, ready},
};

use tower_sentinel::{
    Verdict,
    settle::{Capabilities, Lease, Reason, Settle, Unsettled, decision::Undecided},
};

use crate::support::Refused;

/// A tag that implements no more than it must, with its count of deliveries.
#[derive(Debug)]
struct Counted(Option<u32>);

impl Settle for Counted {
    type Error = Refused;
    type Future = Ready<Result<(), Unsettled<Self, Refused>>>;

    fn settle(self, _: Verdict, _: Reason) -> Self::Future {
        ready(Ok(()))
    }

    async fn keep_alive(&self) -> Result<Lease, Refused> {
        Ok(Lease::Held)
    }

    fn deliveries(&self) -> Option<u32> {
        self.0
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::none()
    }
}

#[test]
fn a_count_says_whether_a_job_was_delivered_before() {
    let expected = [
        (None, None),
        (Some(1), Some(false)),
        (Some(2), Some(true)),
        (Some(3), Some(true)),
    ];
    for (deliveries, redelivered) in expected {
        assert_eq!(
            Counted(deliveries).redelivered(),
            redelivered,
            "{deliveries:?}"
        );
    }
    assert!(!Counted(Some(2)).is_suspect());
    assert!(Counted(Some(2)).messaging().is_none());
}

#[test]
fn an_unsettled_delivery_names_the_error_of_its_adapter() {
    let unsettled = Unsettled::<Counted, _>::last(Refused);
    assert_eq!(
        unsettled.to_string(),
        "the delivery is not settled: refused"
    );
    assert!(unsettled.source().unwrap().is::<Refused>());
}

#[test]
fn an_undecided_settlement_says_what_the_broker_does_not_report() {
    let texts =
        [Undecided::DeliveriesUnknown, Undecided::RedeliveredUnknown].map(|it| it.to_string());
    let expected = [
        "the broker does not report how often the job was delivered",
        "the broker does not report whether the job was delivered before",
    ];
    assert_eq!(texts, expected);
}
