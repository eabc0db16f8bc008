//! The parts of a delivery that all brokers have.

use tower_sentinel::broker::{Envelope, memory::Broker};

use super::take;

#[test]
fn a_header_is_read_through_the_envelope() {
    let queue = Broker::new().queue("jobs").declare();
    queue.publish_with_headers(1, [("Tenant", "seven")]);
    let mut jobs = queue.subscribe(1).unwrap();
    let job = take(&mut jobs);
    assert_eq!(Envelope::header(&job, "tenant"), Some("seven"));
    assert_eq!(Envelope::header(&job, "other"), None);
}

#[test]
fn each_job_has_a_number_as_its_message_id() {
    let queue = Broker::new().queue("jobs").declare();
    (1..=2).for_each(|job| queue.publish(job));
    let mut jobs = queue.subscribe(2).unwrap();
    let ids = [(); 2].map(|()| Envelope::message_id(&take(&mut jobs)).unwrap().into_owned());
    assert!(ids.iter().all(|id| id.parse::<u64>().is_ok()), "{ids:?}");
    assert_ne!(ids[0], ids[1]);
}
