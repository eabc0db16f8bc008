//! User callbacks of a `SentinelLayer`, and their defaults.

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use tracing::{Span, level_filters::LevelFilter};

use crate::{
    job::{Job, TimeLimit},
    outcome::CancelReason,
    sentinel::error::SentinelError,
    settle::{ProcessSpan, Settle, process_span},
    telemetry::messaging::Messaging,
};

/// User callbacks of a layer: they read a tag, make a span, and take the error of a settlement.
#[derive(Clone, Copy, Debug, Default)]
pub struct Hooks<G = ByJob, M = CallerSpan, U = EventOnly> {
    pub(crate) tag: G,
    pub(crate) span: M,
    pub(crate) unsettled: U,
}

/// Constructor of a job's span.
///
/// Implemented for every `Fn(&Tag) -> Span`, [`CallerSpan`] and [`ProcessSpan`]. The name appears in error
/// messages; it is not meant to be implemented.
pub trait MakeSpan<Tag>: sealed::MakeSpan<Tag> {
    /// Returns the span in which the job runs and is settled.
    fn make_span(&self, tag: &Tag) -> Span;

    /// Returns the id of the message, if the constructor knows it.
    fn message_id(&self, _tag: &Tag) -> Option<Box<str>> {
        None
    }
}

/// The default [`MakeSpan`]: the caller's own span.
#[derive(Clone, Copy, Debug, Default)]
pub struct CallerSpan;

impl<Tag> MakeSpan<Tag> for CallerSpan {
    fn make_span(&self, _: &Tag) -> Span {
        // Without a subscriber there is no span to look for.
        match LevelFilter::current() {
            LevelFilter::OFF => Span::none(),
            _ => Span::current(),
        }
    }
}

impl<Tag, F: Fn(&Tag) -> Span> MakeSpan<Tag> for F {
    fn make_span(&self, tag: &Tag) -> Span {
        self(tag)
    }
}

/// Handler of an error that no caller waits for.
///
/// Implemented for every `Fn(SentinelError<E, P>)` and for [`EventOnly`]. The name appears in error messages;
/// it is not meant to be implemented.
pub trait OnUnsettled<E, P>: sealed::OnUnsettled<E, P> {
    /// Takes the error of a settlement.
    fn unsettled(&self, error: SentinelError<E, P>);
}

/// The default [`OnUnsettled`], which leaves the error to the `error!` event.
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

/// Reader of the tag and the time limit of a `J`.
///
/// Implemented for [`ByJob`], for every `Fn(&J) -> Tag`, and for [`LimitedDeliveries`] of one of them. The
/// name appears in error messages; it is not meant to be implemented.
///
/// [`LimitedDeliveries`]: crate::sentinel::LimitedDeliveries
#[diagnostic::on_unimplemented(
    message = "`{J}` is not a `Job`",
    label = "the sentinel cannot read a tag from `{J}`",
    note = "implement `tower_sentinel::Job` for `{J}`, or build the layer with `SentinelLayer::with_tag(policy, tag_fn)`, whose tag must be `Debug`"
)]
pub trait Tagging<J>: sealed::Tagging<J> {
    /// The tag, which is passed to the policy.
    type Tag: fmt::Debug;

    /// Returns the tag of `job`.
    fn tag(&self, job: &J) -> Self::Tag;

    /// Returns the time limit of `job`.
    fn time_limit(&self, job: &J) -> TimeLimit;

    /// Returns the lease of `job`.
    fn lease(&self, _job: &J) -> Option<Duration> {
        None
    }

    /// Returns the description of the delivery of `job`.
    fn messaging<'a>(&self, _job: &'a J) -> Option<Messaging<'a>> {
        None
    }

    /// Returns the time since which `job` waits in its queue.
    fn queued_since(&self, _job: &J) -> Option<SystemTime> {
        None
    }

    /// Returns the reason why the job of `tag` must not run, if there is one.
    fn refusal(&self, _tag: &Self::Tag) -> Option<CancelReason> {
        None
    }
}

/// The default [`Tagging`], which reads them from the [`Job`] itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct ByJob;

impl<J: Job> Tagging<J> for ByJob {
    type Tag = J::Tag;

    fn tag(&self, job: &J) -> J::Tag {
        job.tag()
    }

    fn time_limit(&self, job: &J) -> TimeLimit {
        job.time_limit()
    }

    fn lease(&self, job: &J) -> Option<Duration> {
        job.lease()
    }

    fn messaging<'a>(&self, job: &'a J) -> Option<Messaging<'a>> {
        job.messaging()
    }

    fn queued_since(&self, job: &J) -> Option<SystemTime> {
        job.queued_since()
    }
}

impl<J, Tag: fmt::Debug, F: Fn(&J) -> Tag> Tagging<J> for F {
    type Tag = Tag;

    fn tag(&self, job: &J) -> Tag {
        self(job)
    }

    fn time_limit(&self, _: &J) -> TimeLimit {
        TimeLimit::Inherit
    }
}

impl<Tag: Settle> MakeSpan<Tag> for ProcessSpan {
    fn make_span(&self, tag: &Tag) -> Span {
        process_span(tag)
    }

    fn message_id(&self, tag: &Tag) -> Option<Box<str>> {
        let id = tag.messaging()?.message_id?;
        Some(id.into())
    }
}

/// Supertraits that keep the traits above from being implemented elsewhere.
pub(super) mod sealed {
    use super::*;

    pub trait MakeSpan<Tag> {}

    impl<Tag> MakeSpan<Tag> for CallerSpan {}

    impl<Tag> MakeSpan<Tag> for ProcessSpan {}

    impl<Tag, F: Fn(&Tag) -> Span> MakeSpan<Tag> for F {}

    pub trait OnUnsettled<E, P> {}

    impl<E, P> OnUnsettled<E, P> for EventOnly {}

    impl<E, P, F: Fn(SentinelError<E, P>)> OnUnsettled<E, P> for F {}

    pub trait Tagging<J> {}

    impl<J: Job> Tagging<J> for ByJob {}

    impl<J, Tag: fmt::Debug, F: Fn(&J) -> Tag> Tagging<J> for F {}
}
