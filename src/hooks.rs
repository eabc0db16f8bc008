//! The functions that a layer can be given, and what stands in for those that it was not.

use tracing::Span;

use crate::{error::SentinelError, job::ByJob};

/// The functions that a layer was given: how to read a tag, make a span, take an unsettled error.
#[derive(Clone, Copy, Debug, Default)]
pub struct Hooks<G = ByJob, M = CallerSpan, U = EventOnly> {
    pub(crate) tag: G,
    pub(crate) span: M,
    pub(crate) unsettled: U,
}

/// How a sentinel makes the span of a job; implemented for `fn(&Tag) -> Span`.
pub trait MakeSpan<Tag> {
    /// Returns the span in which the job runs and is settled.
    fn make_span(&self, tag: &Tag) -> Span;
}

/// The default [`MakeSpan`]: the caller's own span.
#[derive(Clone, Copy, Debug, Default)]
pub struct CallerSpan;

impl<Tag> MakeSpan<Tag> for CallerSpan {
    fn make_span(&self, _: &Tag) -> Span {
        Span::current()
    }
}

impl<Tag> MakeSpan<Tag> for fn(&Tag) -> Span {
    fn make_span(&self, tag: &Tag) -> Span {
        self(tag)
    }
}

/// Who takes an error that no caller waits for; implemented for `Fn(SentinelError<E, P>)`.
pub trait OnUnsettled<E, P> {
    /// Takes the error of a settlement.
    fn unsettled(&self, error: SentinelError<E, P>);
}

/// The default [`OnUnsettled`]: there is only the `error!` event.
#[derive(Clone, Copy, Debug, Default)]
pub struct EventOnly;

impl<E, P> OnUnsettled<E, P> for EventOnly {
    fn unsettled(&self, _: SentinelError<E, P>) {}
}

impl<E, P, F: Fn(SentinelError<E, P>)> OnUnsettled<E, P> for F {
    fn unsettled(&self, error: SentinelError<E, P>) {
        self(error);
    }
}
