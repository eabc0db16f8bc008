//! Scenarios that every broker adapter must pass, for the test of your own adapter.
//!
//! An adapter is a [`Subscription`](crate::consumer::Subscription) together with the tags of its jobs,
//! which [`Settle`](crate::settle::Settle). Its test implements [`Fixture`]: to publish a job, to subscribe,
//! and to count the jobs that the broker still has. Then it calls [`all`], or one function for each scenario.
//! The adapters of this crate pass the same scenarios.
//!
//! A fixture also states what the adapter documents, such as its
//! [capabilities](Fixture::capabilities). Each scenario holds the adapter to it: a capability that is
//! missing must be refused, and not replaced with something else.
//!
//! Jobs that are an [`Envelope`](crate::broker::Envelope) have one more scenario, by [`EnvelopeFixture`].
//!
//! Lost connections, killed servers and addresses are not tested here, because they are different for each
//! broker.
//!
//! # Time
//!
//! A scenario waits up to 30 s for an expected event, and half a second for an event that must not happen. An
//! adapter without a server runs in paused time, which takes no time at all:
//! `#[tokio::test(start_paused = true)]`. One with a server runs in real time, and takes three leases and some
//! seconds.
//!
//! # Examples
//!
//! A complete adapter, and its test with all scenarios, is a page of the guide:
//! [Bring your own broker](crate::_guide::own_broker). A broker of this crate passes them, too:
//!
//! ```
//! use std::convert::Infallible;
//! use tower_sentinel::{
//!     broker::memory::{Broker, Deliveries, Queue},
//!     conformance::{Backlog, DeadLetter, Fixture, an_ack_removes_the_job},
//!     settle::Capabilities,
//! };
//!
//! struct Jobs(Queue<String>);
//!
//! impl Fixture for Jobs {
//!     type Subscription = Deliveries<String>;
//!     type Error = Infallible;
//!
//!     async fn publish(&self, body: &str) -> Result<(), Infallible> {
//!         Ok(self.0.publish(body.to_owned()))
//!     }
//!
//!     async fn subscribe(&self, prefetch: usize) -> Result<Deliveries<String>, Infallible> {
//!         Ok(self.0.subscribe(prefetch).expect("a broker in memory is not down"))
//!     }
//!
//!     async fn backlog(&self) -> Result<Backlog, Infallible> {
//!         let counts = self.0.counts();
//!         let (ready, unacked) = (counts.ready + counts.delayed, counts.unacked);
//!         Ok(Backlog { unacked, total: ready + unacked })
//!     }
//!
//!     async fn dead_letters(&self) -> Result<Vec<DeadLetter>, Infallible> {
//!         Ok(Vec::new()) // it keeps none
//!     }
//!
//!     fn capabilities(&self) -> Capabilities {
//!         Capabilities::none().free_release().delay()
//!     }
//! }
//!
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() {
//! let jobs = Jobs(Broker::new().queue("jobs").declare());
//! an_ack_removes_the_job(&jobs).await.unwrap();
//! # }
//! ```

mod envelope;
mod error;
mod fixture;
mod probing;
mod run;
mod settling;
mod supervising;
mod worker;

pub use self::{
    envelope::{EnvelopeFixture, Published, a_job_keeps_its_envelope_when_it_comes_back},
    error::ConformanceError,
    fixture::{Backlog, DeadLetter, Fixture},
    probing::a_probe_counts_what_waits,
    settling::{
        a_closed_subscription_redelivers_what_it_held, a_delayed_retry_is_not_seen_before_its_time,
        a_reject_is_kept_with_its_reason, a_release_is_free_where_the_broker_can_tell,
        a_retry_redelivers_with_the_count_raised, a_second_settlement_is_refused,
        a_tag_tells_what_its_broker_can_do, an_ack_removes_the_job,
        keep_alive_holds_a_job_past_the_redelivery_time, prefetch_holds,
        the_order_of_settling_is_free,
    },
    supervising::{
        a_delivery_limit_ends_a_loop, a_job_that_cannot_be_decoded_is_rejected_with_a_reason,
        a_release_at_drain_is_charged_only_where_the_broker_counts_it,
        a_shutdown_under_load_leaves_nothing_unacked, each_outcome_settles_as_decided,
    },
};

/// Runs all scenarios, one after another, each on a fixture that `start` makes for it.
///
/// # Errors
///
/// Returns the first expectation that was not met; the scenarios after it are not run.
///
/// # Panics
///
/// Panics outside of a tokio runtime, and in one without timers.
///
/// # Cancel safety
///
/// If the future is dropped, a consumer of the scenario may go on for a moment in the background.
pub async fn all<F: Fixture>(start: impl AsyncFn() -> F) -> Result<(), ConformanceError<F::Error>> {
    an_ack_removes_the_job(&start().await).await?;
    a_retry_redelivers_with_the_count_raised(&start().await).await?;
    a_delayed_retry_is_not_seen_before_its_time(&start().await).await?;
    a_reject_is_kept_with_its_reason(&start().await).await?;
    a_release_is_free_where_the_broker_can_tell(&start().await).await?;
    prefetch_holds(&start().await).await?;
    a_second_settlement_is_refused(&start().await).await?;
    the_order_of_settling_is_free(&start().await).await?;
    keep_alive_holds_a_job_past_the_redelivery_time(&start().await).await?;
    a_tag_tells_what_its_broker_can_do(&start().await).await?;
    a_closed_subscription_redelivers_what_it_held(&start().await).await?;
    a_probe_counts_what_waits(&start().await).await?;
    each_outcome_settles_as_decided(&start().await).await?;
    a_job_that_cannot_be_decoded_is_rejected_with_a_reason(&start().await).await?;
    a_delivery_limit_ends_a_loop(&start().await).await?;
    a_shutdown_under_load_leaves_nothing_unacked(&start().await).await?;
    a_release_at_drain_is_charged_only_where_the_broker_counts_it(&start().await).await
}
