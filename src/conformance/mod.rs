//! Scenarios that every broker adapter must pass, for the test of your own adapter.
//!
//! An adapter is a [`Subscription`](crate::consumer::Subscription) together with the tags of its jobs,
//! which [`Settle`](crate::settle::Settle). Its test implements [`Fixture`]: how to publish a job, how to
//! subscribe, and what the broker has left. Then it calls [`all`], or one function for each scenario.
//! The adapters of this crate pass the same scenarios.
//!
//! A fixture also states what the adapter documents, such as its
//! [capabilities](Fixture::capabilities). Each scenario holds the adapter to it: a capability that is
//! missing must be refused, and not made into something else.
//!
//! Jobs that are an [`Envelope`](crate::broker::Envelope) have one scenario more, by
//! [`EnvelopeFixture`].
//!
//! Not here, because it is different for each broker: connections that are lost, servers that are killed,
//! and addresses.
//!
//! # Time
//!
//! A scenario waits up to 30 s for what is to happen, and half a second for what must not happen. An
//! adapter without a server runs in paused time, which takes no time at all:
//! `#[tokio::test(start_paused = true)]`. One with a server runs in real time: all scenarios together take
//! about 10 s, and three leases more.
//!
//! # Examples
//!
//! An adapter for a queue in memory, and its test:
//!
//! ```
//! use std::{
//!     collections::{BTreeMap, VecDeque},
//!     convert::Infallible,
//!     future::{Ready, ready},
//!     io, mem,
//!     pin::Pin,
//!     sync::{Arc, Mutex},
//!     task::{Context, Poll, Waker},
//! };
//!
//! use futures_util::Stream;
//! use tower_sentinel::{
//!     Job, Verdict,
//!     conformance::{self, Backlog, DeadLetter, Fixture},
//!     consumer::Subscription,
//!     settle::{Capabilities, Lease, Reason, Settle, Unsettled},
//! };
//!
//! // === the broker ===
//!
//! #[derive(Clone, Debug, Default)]
//! struct Queue(Arc<Mutex<State>>);
//!
//! #[derive(Debug, Default)]
//! struct State {
//!     waiting: VecDeque<Message>,
//!     /// By number of the delivery.
//!     unacked: BTreeMap<u64, Message>,
//!     dead: Vec<DeadLetter>,
//!     last_delivery: u64,
//!     wakers: Vec<Waker>,
//! }
//!
//! #[derive(Debug)]
//! struct Message {
//!     body: String,
//!     attempts: u32,
//! }
//!
//! impl Queue {
//!     fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
//!         let mut state = self.0.lock().unwrap();
//!         let changed = change(&mut state);
//!         let wakers = mem::take(&mut state.wakers);
//!         drop(state);
//!         wakers.into_iter().for_each(Waker::wake);
//!         changed
//!     }
//! }
//!
//! // === its adapter ===
//!
//! struct Deliveries {
//!     queue: Queue,
//!     prefetch: usize,
//!     /// Numbers of the deliveries on this channel.
//!     delivered: Vec<u64>,
//!     is_closed: bool,
//! }
//!
//! #[derive(Debug)]
//! struct Delivery {
//!     body: String,
//!     tag: Tag,
//! }
//!
//! #[derive(Clone, Debug)]
//! struct Tag {
//!     queue: Queue,
//!     number: u64,
//!     deliveries: u32,
//! }
//!
//! impl Stream for Deliveries {
//!     type Item = Result<Delivery, Infallible>;
//!
//!     fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
//!         let this = self.get_mut();
//!         if this.is_closed {
//!             return Poll::Ready(None);
//!         }
//!         let mut state = this.queue.0.lock().unwrap();
//!         this.delivered.retain(|number| state.unacked.contains_key(number));
//!         let is_full = this.delivered.len() >= this.prefetch;
//!         let message = if is_full { None } else { state.waiting.pop_front() };
//!         let Some(message) = message else {
//!             state.wakers.push(cx.waker().clone());
//!             return Poll::Pending;
//!         };
//!         state.last_delivery += 1;
//!         let number = state.last_delivery;
//!         let (queue, deliveries) = (this.queue.clone(), message.attempts + 1);
//!         let body = message.body.clone();
//!         state.unacked.insert(number, message);
//!         this.delivered.push(number);
//!         let tag = Tag { queue, number, deliveries };
//!         Poll::Ready(Some(Ok(Delivery { body, tag })))
//!     }
//! }
//!
//! impl Subscription for Deliveries {
//!     type Job = Delivery;
//!     type Error = Infallible;
//!
//!     fn poll_closed(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
//!         // No connection can be lost: it ends by `poll_close` alone.
//!         if self.is_closed { Poll::Ready(Ok(())) } else { Poll::Pending }
//!     }
//!
//!     fn poll_close(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
//!         self.is_closed = true;
//!         let delivered = mem::take(&mut self.delivered);
//!         self.queue.change(|state| {
//!             for number in delivered.into_iter().rev() {
//!                 if let Some(mut message) = state.unacked.remove(&number) {
//!                     message.attempts += 1;
//!                     state.waiting.push_front(message);
//!                 }
//!             }
//!         });
//!         Poll::Ready(())
//!     }
//! }
//!
//! impl Job for Delivery {
//!     type Tag = Tag;
//!
//!     fn tag(&self) -> Tag {
//!         self.tag.clone()
//!     }
//! }
//!
//! impl AsRef<[u8]> for Delivery {
//!     fn as_ref(&self) -> &[u8] {
//!         self.body.as_bytes()
//!     }
//! }
//!
//! impl Settle for Tag {
//!     type Error = io::Error;
//!     type Future = Ready<Result<(), Unsettled<Self, io::Error>>>;
//!
//!     fn settle(self, verdict: Verdict, reason: Reason) -> Self::Future {
//!         if let Verdict::Retry { after: Some(_) } | Verdict::Release { after: Some(_) } = verdict {
//!             let error = io::Error::other("the queue has no delays");
//!             return ready(Err(Unsettled::last(error)));
//!         }
//!         ready(self.queue.change(|state| {
//!             let Some(mut message) = state.unacked.remove(&self.number) else {
//!                 let error = io::Error::other("the delivery is not unacked any more");
//!                 return Err(Unsettled::last(error));
//!             };
//!             match verdict {
//!                 Verdict::Ack => {}
//!                 Verdict::Retry { .. } => {
//!                     message.attempts += 1;
//!                     state.waiting.push_front(message);
//!                 }
//!                 Verdict::Release { .. } => state.waiting.push_front(message),
//!                 Verdict::Reject => state.dead.push(DeadLetter {
//!                     body: message.body,
//!                     kind: reason.kind,
//!                     message: reason.message,
//!                 }),
//!                 Verdict::Abandon => {
//!                     state.unacked.insert(self.number, message);
//!                 }
//!             }
//!             Ok(())
//!         }))
//!     }
//!
//!     async fn keep_alive(&self) -> Result<Lease, io::Error> {
//!         Err(io::Error::other("the queue has no leases"))
//!     }
//!
//!     fn deliveries(&self) -> Option<u32> {
//!         Some(self.deliveries)
//!     }
//!
//!     fn capabilities(&self) -> Capabilities {
//!         Capabilities::none().free_release().dead_letter()
//!     }
//! }
//!
//! // === its test ===
//!
//! impl Fixture for Queue {
//!     type Subscription = Deliveries;
//!     type Error = Infallible;
//!
//!     async fn publish(&self, body: &str) -> Result<(), Infallible> {
//!         let (body, attempts) = (body.to_owned(), 0);
//!         self.change(|state| state.waiting.push_back(Message { body, attempts }));
//!         Ok(())
//!     }
//!
//!     async fn subscribe(&self, prefetch: usize) -> Result<Deliveries, Infallible> {
//!         let (queue, delivered) = (self.clone(), Vec::new());
//!         Ok(Deliveries { queue, prefetch, delivered, is_closed: false })
//!     }
//!
//!     async fn backlog(&self) -> Result<Backlog, Infallible> {
//!         let state = self.0.lock().unwrap();
//!         let unacked = state.unacked.len();
//!         Ok(Backlog { unacked, total: state.waiting.len() + unacked })
//!     }
//!
//!     async fn dead_letters(&self) -> Result<Vec<DeadLetter>, Infallible> {
//!         Ok(self.0.lock().unwrap().dead.clone())
//!     }
//!
//!     fn capabilities(&self) -> Capabilities {
//!         Capabilities::none().free_release().dead_letter()
//!     }
//! }
//!
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() {
//! let conforms = conformance::all(async || Queue::default()).await;
//! conforms.unwrap_or_else(|error| panic!("{error}"));
//! # }
//! ```

mod envelope;
mod error;
mod fixture;
mod run;
mod settling;
mod supervising;
mod worker;

pub use self::{
    envelope::{EnvelopeFixture, Published, a_job_keeps_its_envelope_when_it_comes_back},
    error::ConformanceError,
    fixture::{Backlog, DeadLetter, Fixture},
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
    each_outcome_settles_as_decided(&start().await).await?;
    a_job_that_cannot_be_decoded_is_rejected_with_a_reason(&start().await).await?;
    a_delivery_limit_ends_a_loop(&start().await).await?;
    a_shutdown_under_load_leaves_nothing_unacked(&start().await).await?;
    a_release_at_drain_is_charged_only_where_the_broker_counts_it(&start().await).await
}
