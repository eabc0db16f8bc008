//! Decisions on jobs that took their process down.

use super::decide::{Decision, Undecided, within};
use crate::{
    outcome::Outcome,
    settle::{Settle, verdict::Verdict},
};

/// Error that says whether the job took its process down.
///
/// [`ProcessError`](crate::process::ProcessError) is one. Implement it for an error of your own that holds a
/// `ProcessError`, so that [`on_crash`](crate::DecisionExt::on_crash) and
/// [`crash_limit`](crate::DecisionExt::crash_limit) can decide on it.
pub trait Crash {
    /// Returns whether the job took its process down, or made it unusable.
    fn is_crash(&self) -> bool;
}

/// Returns whether the job took its process down.
fn is_crash<T, E: Crash>(outcome: &Outcome<T, E>) -> bool {
    matches!(outcome, Outcome::Failed(error) if error.is_crash())
}

// === OnCrash ===

/// The [`Decision`] returned by [`DecisionExt::on_crash`](crate::DecisionExt::on_crash).
#[derive(Clone, Copy, Debug)]
pub struct OnCrash<D> {
    pub(super) inner: D,
    pub(super) verdict: Verdict,
}

impl<D, Tag, T, E> Decision<Tag, T, E> for OnCrash<D>
where
    D: Decision<Tag, T, E>,
    E: Crash,
{
    fn decide(&self, tag: &Tag, outcome: &Outcome<T, E>) -> Result<Verdict, Undecided> {
        match is_crash(outcome) {
            true => Ok(self.verdict),
            false => self.inner.decide(tag, outcome),
        }
    }
}

// === CrashLimit ===

/// The [`Decision`] returned by [`DecisionExt::crash_limit`](crate::DecisionExt::crash_limit).
#[derive(Clone, Copy, Debug)]
pub struct CrashLimit<D> {
    pub(super) inner: D,
    pub(super) limit: u32,
}

impl<D, Tag, T, E> Decision<Tag, T, E> for CrashLimit<D>
where
    D: Decision<Tag, T, E>,
    Tag: Settle,
    E: Crash,
{
    fn decide(&self, tag: &Tag, outcome: &Outcome<T, E>) -> Result<Verdict, Undecided> {
        let verdict = self.inner.decide(tag, outcome)?;
        let comes_back = matches!(verdict, Verdict::Retry { .. } | Verdict::Release { .. });
        if !comes_back || !is_crash(outcome) {
            return Ok(verdict);
        }
        within(self.limit, tag, verdict)
    }
}
