//! [`GuardedSpan`]: a span whose subscriber may panic.

use std::mem;

use tracing::{Span, span::Id};

use crate::outcome::{drop_quietly, guard};

/// A span of the user's subscriber that swallows the subscriber's panics.
#[derive(Clone, Debug)]
pub(crate) struct GuardedSpan(Span);

impl GuardedSpan {
    #[inline]
    pub(crate) fn new(span: Span) -> Self {
        Self(span)
    }

    /// Creates a span, or a disabled one if the subscriber panics.
    pub(crate) fn make(make: impl FnOnce() -> Span) -> Self {
        let mut span = Self(Span::none());
        guard(|| span = Self(make()));
        span
    }

    /// Returns the name, unless the span is disabled.
    pub(crate) fn name(&self) -> Option<&'static str> {
        Some(self.0.metadata()?.name())
    }

    pub(crate) fn id(&self) -> Option<Id> {
        self.0.id()
    }

    /// Enters the span until the returned guard is dropped.
    #[inline]
    pub(crate) fn enter(&self) -> Entered<'_> {
        let mut entered = None;
        // Without a subscriber there is nothing to enter.
        if !self.0.is_disabled() {
            guard(|| entered = Some(self.0.enter()));
        }
        Entered(entered)
    }

    /// Calls `describe` to record fields in the span, and swallows its panic.
    pub(crate) fn record(&self, describe: impl FnOnce(&Span)) {
        guard(|| describe(&self.0));
    }

    /// Marks the span as failed.
    pub(crate) fn record_error(&self, error_type: &str) {
        self.record(|span| {
            span.record("error.type", error_type);
            span.record("otel.status_code", "ERROR");
        });
    }
}

impl Drop for GuardedSpan {
    #[inline]
    fn drop(&mut self) {
        if !self.0.is_disabled() {
            drop_quietly(mem::replace(&mut self.0, Span::none()));
        }
    }
}

/// Guard that leaves its span when it is dropped.
pub(crate) struct Entered<'a>(Option<tracing::span::Entered<'a>>);

impl Drop for Entered<'_> {
    #[inline]
    fn drop(&mut self) {
        if let Some(entered) = self.0.take() {
            drop_quietly(entered);
        }
    }
}
