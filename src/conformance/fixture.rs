//! [`Fixture`]: the queue that an adapter is tested on.

use std::{error::Error, fmt, future::Future, time::Duration};

use crate::{
    consumer::Subscription,
    job::Job,
    outcome::OutcomeKind,
    settle::{Capabilities, Settle},
};

/// Queue that an adapter is tested on, and the facts that the adapter documents.
///
/// A fixture has one queue. Each scenario needs its own fixture, whose queue is empty.
///
/// See the [module](crate::conformance) for an example.
pub trait Fixture {
    /// Subscription of the adapter. A job is the bytes that were published, and its tag can be
    /// settled.
    type Subscription: Subscription<
            Job: Job<Tag: Settle<Future: Send + 'static> + fmt::Debug + Send + 'static>
                     + AsRef<[u8]>
                     + Send
                     + 'static,
            Error: Error + Send + 'static,
        > + Unpin
        + Send
        + 'static;

    /// Error of the fixture itself, such as a server that cannot be reached.
    type Error: Error + 'static;

    /// Publishes a job; the broker has it when the future resolves.
    ///
    /// # Errors
    ///
    /// Returns an error if the broker did not take the job. The scenario ends.
    fn publish(&self, body: &str) -> impl Future<Output = Result<(), Self::Error>>;

    /// Opens a subscription on its own channel, with this prefetch.
    ///
    /// # Errors
    ///
    /// Returns an error if there is no subscription. The scenario ends.
    fn subscribe(
        &self,
        prefetch: usize,
    ) -> impl Future<Output = Result<Self::Subscription, Self::Error>>;

    /// Counts the jobs that are left in the queue, without the dead letters.
    ///
    /// # Errors
    ///
    /// Returns an error if the broker did not report it. The scenario ends.
    fn backlog(&self) -> impl Future<Output = Result<Backlog, Self::Error>>;

    /// Reads all dead letters, in any order; none if the broker keeps none.
    ///
    /// # Errors
    ///
    /// Returns an error if the broker did not report it. The scenario ends.
    fn dead_letters(&self) -> impl Future<Output = Result<Vec<DeadLetter>, Self::Error>>;

    /// Returns the capabilities that each tag must report.
    ///
    /// A capability that is missing here is expected to be refused.
    fn capabilities(&self) -> Capabilities;

    /// Returns whether a tag knows the number of its job's deliveries; `true` by default.
    fn counts_deliveries(&self) -> bool {
        true
    }

    /// Returns the time after which the broker delivers a job again that was neither settled nor
    /// kept alive; `None`, the default, if it never does while the channel is open.
    ///
    /// Use a lease of 2 s or more. Scenarios hold jobs for 1 s, and one waits until the lease is over.
    fn lease(&self) -> Option<Duration> {
        None
    }

    /// Returns whether the end of a channel counts as a failed attempt of each job that it held; `true`
    /// by default.
    fn charges_lost_deliveries(&self) -> bool {
        true
    }

    /// Returns whether [`Backlog::unacked`] is without the jobs that were given back and are not
    /// delivered again; `true` by default.
    fn tells_given_back(&self) -> bool {
        true
    }
}

/// Number of jobs that are left in a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backlog {
    /// Jobs that were delivered and are not settled.
    pub unacked: usize,
    /// All jobs that are neither acked nor rejected: waiting, delayed and unacked.
    pub total: usize,
}

/// Dead letter, with the parts of its [`Reason`](crate::settle::Reason) that an adapter keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadLetter {
    /// Bytes of the job, as text.
    pub body: String,
    /// Outcome of the job.
    pub kind: OutcomeKind,
    /// Message of the reason, if there is one.
    pub message: Option<String>,
}

/// Job of a fixture.
pub(super) type JobOf<F> = <<F as Fixture>::Subscription as Subscription>::Job;

/// Tag of a fixture's jobs.
pub(super) type TagOf<F> = <JobOf<F> as Job>::Tag;
