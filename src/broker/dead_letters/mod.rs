//! Dead letters of every broker: to list them, to move them back, and to delete them.
//!
//! Each adapter has a `DeadLetterQueue`, which implements [`DeadLetters`]. A [`Redrive`] moves dead letters back
//! to the place that they came from, and a [`Purge`] deletes them. A [`Filter`] chooses among them.
//!
//! ```
//! use futures_util::StreamExt;
//! use tower_sentinel::{Job, Outcome, Verdict, settle::{Reason, Settle}};
//! use tower_sentinel::broker::{
//!     Envelope,
//!     dead_letters::{DeadLetters, Filter, Redrive},
//!     memory::{Broker, DeadLetterQueue},
//! };
//!
//! # #[tokio::main(flavor = "current_thread", start_paused = true)]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let broker = Broker::new();
//! let orders = broker.queue("orders").dead_letter("orders.dead").declare();
//! orders.publish("order 7");
//! let mut jobs = orders.subscribe(1)?;
//! let job = jobs.next().await.unwrap()?;
//! let failed = Outcome::<(), _>::Failed("no such table: orders");
//! job.tag().settle(Verdict::Reject, Reason::of(&failed, Default::default())).await?;
//!
//! let dead = DeadLetterQueue::new(&broker.queue("orders.dead").declare());
//! let letters = dead.list(&Filter::all(), 10).await?;
//! assert_eq!(letters[0].message.as_deref(), Some("no such table: orders"));
//! assert_eq!(letters[0].destination.as_deref(), Some("orders"));
//!
//! // The table is there now.
//! let tally = Redrive::new(Filter::all().message("no such table")).run(&dead).await?;
//! assert_eq!((tally.moved, tally.left()), (1, 0));
//!
//! let job = jobs.next().await.unwrap()?;
//! assert_eq!((job.deliveries(), job.header("x-redriven")), (Some(1), Some("1")));
//! # Ok(())
//! # }
//! ```
//!
//! The [guide](crate::_guide::dead_letters) tells the promises, and the differences between the brokers.

mod counts;
mod filter;
mod letter;
mod pass;
mod purge;
mod redrive;
mod walk;

pub use self::{
    counts::{Interrupted, Tally},
    filter::Filter,
    letter::DeadLetter,
    pass::{DeadLetters, Fate, Moved, Pass, Taken},
    purge::Purge,
    redrive::Redrive,
};
