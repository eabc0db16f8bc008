//! [`Run`]: one run of a scenario, and the steps of scenarios.

use std::{
    error::Error,
    fmt,
    future::{Future, poll_fn},
    pin::Pin,
    time::Duration,
};

use futures_util::StreamExt;
use tokio::time::{Instant, sleep, timeout};

use crate::{
    conformance::{
        error::ConformanceError,
        fixture::{Backlog, DeadLetter, Fixture, JobOf, TagOf},
    },
    consumer::Subscription,
    job::Job,
    settle::{Reason, Settle, Verdict},
};

/// Longest time that an expected event may take.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// Time to wait for an event that must not happen.
const QUIET: Duration = Duration::from_millis(500);

/// Result of a step of a scenario of the fixture `F`.
pub(super) type Step<F, T = ()> = Result<T, ConformanceError<<F as Fixture>::Error>>;

/// One run of a scenario.
pub(super) struct Run<'a, F> {
    scenario: &'static str,
    pub(super) fixture: &'a F,
}

impl<'a, F: Fixture> Run<'a, F> {
    pub(super) fn new(scenario: &'static str, fixture: &'a F) -> Self {
        Self { scenario, fixture }
    }

    pub(super) fn violated<T>(
        &self,
        expected: impl fmt::Display,
        found: impl fmt::Display,
    ) -> Step<F, T> {
        Err(ConformanceError::Violated {
            scenario: self.scenario,
            expected: expected.to_string(),
            found: found.to_string(),
        })
    }

    /// Expects `subject` to be `expected`.
    pub(super) fn equal<T: PartialEq + fmt::Debug>(
        &self,
        subject: impl fmt::Display,
        found: T,
        expected: T,
    ) -> Step<F> {
        match (found, expected) {
            (found, expected) if found == expected => Ok(()),
            (found, expected) => self.violated(
                format_args!("{subject} to be {expected:?}"),
                format_args!("{found:?}"),
            ),
        }
    }

    /// Expects a condition to hold.
    pub(super) fn holds(
        &self,
        condition: bool,
        expected: impl fmt::Display,
        found: impl fmt::Debug,
    ) -> Step<F> {
        if condition {
            return Ok(());
        }
        self.violated(expected, format_args!("{found:?}"))
    }

    /// Expects `action` to succeed.
    pub(super) fn succeeds<T, E: Error>(
        &self,
        action: impl fmt::Display,
        result: Result<T, E>,
    ) -> Step<F, T> {
        match result {
            Ok(value) => Ok(value),
            Err(error) => self.violated(
                format_args!("{action} to succeed"),
                format_args!("the error \"{error}\""),
            ),
        }
    }

    /// Ends the run if the fixture failed.
    pub(super) fn fixture<T>(&self, result: Result<T, F::Error>) -> Step<F, T> {
        result.map_err(|error| ConformanceError::Fixture {
            scenario: self.scenario,
            error,
        })
    }

    /// Expects `future` to resolve in time.
    pub(super) async fn in_time<T>(
        &self,
        expected: impl fmt::Display,
        future: impl Future<Output = T>,
    ) -> Step<F, T> {
        match timeout(PATIENCE, future).await {
            Ok(value) => Ok(value),
            Err(_) => self.violated(expected, format_args!("nothing within {PATIENCE:?}")),
        }
    }

    // === the queue ===

    pub(super) async fn publish(&self, body: &str) -> Step<F> {
        self.fixture(self.fixture.publish(body).await)
    }

    /// Publishes the numbers below `n`.
    pub(super) async fn publish_n(&self, n: usize) -> Step<F> {
        for n in 0..n {
            self.publish(&n.to_string()).await?;
        }
        Ok(())
    }

    pub(super) async fn subscribe(&self, prefetch: usize) -> Step<F, F::Subscription> {
        self.fixture(self.fixture.subscribe(prefetch).await)
    }

    pub(super) async fn backlog(&self) -> Step<F, Backlog> {
        self.fixture(self.fixture.backlog().await)
    }

    /// Waits until `n` jobs are left, and none of them is unacked.
    pub(super) async fn left(&self, n: usize) -> Step<F> {
        let expected = Backlog {
            unacked: 0,
            total: n,
        };
        self.eventually("the backlog", expected, async || self.backlog().await)
            .await
    }

    /// Waits until the only dead letter is `letter`, or expects none if the broker keeps none.
    pub(super) async fn dead(&self, letter: DeadLetter) -> Step<F> {
        let expected = match self.fixture.capabilities().has_dead_letter() {
            true => vec![letter],
            false => Vec::new(),
        };
        let found = async || self.fixture(self.fixture.dead_letters().await);
        self.eventually("the dead letters", expected, found).await
    }

    /// Waits until `subject` is `expected`.
    pub(super) async fn eventually<T: PartialEq + fmt::Debug>(
        &self,
        subject: impl fmt::Display,
        expected: T,
        find: impl AsyncFn() -> Step<F, T>,
    ) -> Step<F> {
        let started = Instant::now();
        loop {
            let found = find().await?;
            if found == expected {
                return Ok(());
            }
            if started.elapsed() >= PATIENCE {
                return self.equal(
                    format_args!("{subject}, within {PATIENCE:?},"),
                    found,
                    expected,
                );
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    // === a subscription ===

    /// Returns the next job, which must come.
    pub(super) async fn take(&self, jobs: &mut F::Subscription) -> Step<F, JobOf<F>> {
        match self.in_time("a delivery", jobs.next()).await? {
            Some(Ok(job)) => Ok(job),
            Some(Err(error)) => self.violated("a delivery", format_args!("the error \"{error}\"")),
            None => self.violated("a delivery", "the end of the stream"),
        }
    }

    /// Returns `n` jobs, which must come.
    pub(super) async fn take_n(
        &self,
        jobs: &mut F::Subscription,
        n: usize,
    ) -> Step<F, Vec<JobOf<F>>> {
        let mut taken = Vec::new();
        while taken.len() < n {
            taken.push(self.take(jobs).await?);
        }
        Ok(taken)
    }

    /// Expects no job for a while.
    pub(super) async fn quiet(&self, jobs: &mut F::Subscription) -> Step<F> {
        let expected = format_args!("no delivery within {QUIET:?}");
        match timeout(QUIET, jobs.next()).await {
            Err(_) => Ok(()),
            Ok(None) => self.violated(expected, "the end of the stream"),
            Ok(Some(Ok(job))) => self.violated(expected, format_args!("the job {:?}", body(&job))),
            Ok(Some(Err(error))) => self.violated(expected, format_args!("the error \"{error}\"")),
        }
    }

    /// Closes the channel.
    pub(super) async fn close(&self, jobs: &mut F::Subscription) -> Step<F> {
        let closed = poll_fn(|cx| Pin::new(&mut *jobs).poll_close(cx));
        self.in_time("`poll_close` to be ready", closed).await
    }

    /// Expects the channel to be closed, and not lost.
    pub(super) async fn closed(&self, jobs: &mut F::Subscription) -> Step<F> {
        let closed = poll_fn(|cx| Pin::new(&mut *jobs).poll_closed(cx));
        let closed = self.in_time("`poll_closed` to be ready", closed).await?;
        self.succeeds("the end of a channel that is closed", closed)
    }

    // === a delivery ===

    /// Settles `job`, which must succeed.
    pub(super) async fn settle(&self, job: &JobOf<F>, verdict: Verdict) -> Step<F> {
        self.settle_tag(job.tag(), verdict).await
    }

    pub(super) async fn settle_tag(&self, tag: TagOf<F>, verdict: Verdict) -> Step<F> {
        let settled = self.settled(tag, verdict).await?;
        match settled {
            Ok(()) => Ok(()),
            Err(unsettled) => self.violated(
                format_args!("the verdict \"{verdict}\" to succeed"),
                format_args!("the error \"{}\"", unsettled.error),
            ),
        }
    }

    /// Returns the result of a settlement, which must end.
    pub(super) async fn settled(
        &self,
        tag: TagOf<F>,
        verdict: Verdict,
    ) -> Step<F, <<TagOf<F> as Settle>::Future as Future>::Output> {
        let expected = format_args!("an end of the verdict \"{verdict}\"");
        self.in_time(expected, tag.settle(verdict, reason())).await
    }

    /// Expects a count of deliveries, or none if the broker does not count.
    pub(super) fn delivered(&self, tag: &TagOf<F>, deliveries: u32) -> Step<F> {
        let expected = self.fixture.counts_deliveries().then_some(deliveries);
        self.equal("the count of deliveries", tag.deliveries(), expected)
    }
}

/// Returns the reason of a verdict that no outcome led to.
pub(super) fn reason() -> Reason {
    Reason::completed(Duration::from_millis(5))
}

pub(super) fn body(job: &impl AsRef<[u8]>) -> String {
    String::from_utf8_lossy(job.as_ref()).into_owned()
}

pub(super) fn sorted_bodies<J: AsRef<[u8]>>(jobs: &[J]) -> Vec<String> {
    let mut bodies: Vec<_> = jobs.iter().map(body).collect();
    bodies.sort_unstable();
    bodies
}
