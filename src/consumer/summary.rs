//! [`Summary`]: what a consumer did, in numbers.

use std::any::Any;

use crate::{
    outcome::OutcomeKind,
    settle::{Settled, Verdict, VerdictKind},
};

/// The most tags that a summary keeps.
const MAX_TAGS: usize = 1_000;

/// What a [`Consumer`](crate::Consumer) did.
///
/// Each call is counted once: as [`answered`](Self::answered), [`failed`](Self::failed) or
/// [`abandoned`](Self::abandoned). Outcomes and verdicts are counted where the service answers
/// with [`Settled`], as a sentinel with a [`SettlePolicy`](crate::SettlePolicy) does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Summary {
    /// How many jobs were taken from the stream; each of them was called.
    pub called: u64,
    /// How many calls succeeded.
    pub answered: u64,
    /// How many calls returned an error, or panicked.
    pub failed: u64,
    /// How many of the failed calls may have left the broker without an answer.
    pub unanswered: u64,
    /// How many of the failed calls had a settlement that is [moot](crate::settle::Unsettled::moot): the
    /// broker waited for none any more. Their jobs may run once more.
    pub moot: u64,
    /// How many response futures were dropped, because they did not end in time.
    pub abandoned: u64,
    /// How many settlements the broker counts as an attempt.
    pub charged: u64,
    /// How many jobs still ran when they were settled.
    pub not_stopped: u64,
    /// The tags of those jobs, as `Debug` prints them; the first 1,000.
    pub not_stopped_tags: Vec<Box<str>>,
    outcomes: [u64; 5],
    verdicts: [u64; 5],
}

impl Summary {
    /// Returns how many jobs had an outcome of this kind.
    pub fn outcomes(&self, kind: OutcomeKind) -> u64 {
        self.outcomes[kind as usize]
    }

    /// Returns how many jobs were settled with a verdict of this kind, whatever its delay.
    ///
    /// A [`Verdict`] stands for its kind.
    pub fn verdicts(&self, kind: impl Into<VerdictKind>) -> u64 {
        self.verdicts[kind.into() as usize]
    }

    /// Counts a call that succeeded, and returns its verdict where there is one.
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

    /// Adds what another session did.
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
