//! [`Summary`] of a consumer's work, in numbers.

use std::any::Any;

use crate::{
    outcome::OutcomeKind,
    settle::{Settled, Verdict, VerdictKind},
};

/// Maximum number of tags that a summary keeps.
const MAX_TAGS: usize = 1_000;

/// Summary of the work of a [`Consumer`](crate::Consumer).
///
/// Each call is counted once: as [`answered`](Self::answered), [`failed`](Self::failed) or
/// [`abandoned`](Self::abandoned). Outcomes and verdicts are counted if the response of the service is
/// [`Settled`], as it is for a sentinel with a [`SettlePolicy`](crate::SettlePolicy).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Summary {
    /// Number of jobs that were taken from the stream; the service was called with each of them.
    pub called: u64,
    /// Number of calls that succeeded.
    pub answered: u64,
    /// Number of calls that returned an error, or panicked.
    pub failed: u64,
    /// Number of failed calls that may have left their delivery unsettled.
    pub unanswered: u64,
    /// Number of failed calls whose settlement is [moot](crate::settle::Unsettled::moot): the broker no
    /// longer waited for it. Their jobs may run once more.
    pub moot: u64,
    /// Number of response futures that were dropped because they did not end in time.
    pub abandoned: u64,
    /// Number of settlements that the broker counts as an attempt.
    pub charged: u64,
    /// Number of jobs that still ran when they were settled.
    pub not_stopped: u64,
    /// The tags of those jobs, as `Debug` prints them; the first 1,000.
    pub not_stopped_tags: Vec<Box<str>>,
    outcomes: [u64; 5],
    verdicts: [u64; 5],
}

impl Summary {
    /// Returns the number of jobs with an outcome of this kind.
    pub fn outcomes(&self, kind: OutcomeKind) -> u64 {
        self.outcomes[kind as usize]
    }

    /// Returns the number of jobs that were settled with a verdict of this kind, with any delay.
    ///
    /// A [`Verdict`] stands for its kind.
    pub fn verdicts(&self, kind: impl Into<VerdictKind>) -> u64 {
        self.verdicts[kind.into() as usize]
    }

    /// Counts a call that succeeded, and returns its verdict if it has one.
    pub(super) fn answer<R: 'static>(&mut self, response: &mut R) -> Option<Verdict> {
        self.answered += 1;
        let response: &mut dyn Any = response;
        let settled = response.downcast_mut::<Settled>()?;
        self.outcomes[settled.kind as usize] += 1;
        self.verdicts[settled.verdict.kind() as usize] += 1;
        self.charged += u64::from(settled.charged);
        if !settled.stopped {
            self.not_stopped += 1;
            self.keep(settled.tag.take());
        }
        Some(settled.verdict)
    }

    /// Adds the summary of another session.
    pub(super) fn add(&mut self, other: Summary) {
        self.called += other.called;
        self.answered += other.answered;
        self.failed += other.failed;
        self.unanswered += other.unanswered;
        self.moot += other.moot;
        self.abandoned += other.abandoned;
        self.charged += other.charged;
        self.not_stopped += other.not_stopped;
        self.keep(other.not_stopped_tags);
        for (sum, n) in self.outcomes.iter_mut().zip(other.outcomes) {
            *sum += n;
        }
        for (sum, n) in self.verdicts.iter_mut().zip(other.verdicts) {
            *sum += n;
        }
    }

    fn keep(&mut self, tags: impl IntoIterator<Item = Box<str>>) {
        let room = MAX_TAGS - self.not_stopped_tags.len();
        self.not_stopped_tags.extend(tags.into_iter().take(room));
    }
}
