//! What a job's traces say: its span, that of its settlement, and an event for a bad end.
//!
//! Spans and fields are named as the
//! [messaging conventions of OpenTelemetry](https://opentelemetry.io/docs/specs/semconv/messaging/messaging-spans/)
//! (status: development) have it. See [`ProcessSpan`].

use std::{any::type_name, borrow::Cow, mem};

use tracing::{Span, field, span::Id};

use crate::{
    cancel::CancelReason,
    consumer_name,
    hooks::MakeSpan,
    outcome::Outcome,
    panic::{drop_quietly, guard},
    settle::{Settle, Verdict},
};

// === impl Messaging ===

/// What traces say of a delivery; see [`Settle::messaging`].
///
/// ```
/// use tower_sentinel::Messaging;
///
/// let delivery = Messaging::new("rabbitmq", "orders").message_id("m-7").delivery_tag(42);
/// assert_eq!(delivery.destination, "orders");
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Messaging<'a> {
    /// `messaging.system`: which broker it is, such as `rabbitmq`.
    pub system: &'a str,
    /// `messaging.destination.name`: the queue or stream. It is in the names of the spans, so it
    /// should have few values.
    pub destination: Cow<'a, str>,
    /// `messaging.message.id`.
    pub message_id: Option<Cow<'a, str>>,
    /// `messaging.rabbitmq.message.delivery_tag`.
    pub delivery_tag: Option<u64>,
    /// The W3C trace context that came with the message: its `traceparent` header.
    pub traceparent: Option<Cow<'a, str>>,
    /// The `tracestate` header that goes with it.
    pub tracestate: Option<Cow<'a, str>>,
}

impl<'a> Messaging<'a> {
    /// Creates the description of a delivery from `destination`, on a broker called `system`.
    pub fn new(system: &'a str, destination: impl Into<Cow<'a, str>>) -> Self {
        Self {
            system,
            destination: destination.into(),
            ..Self::default()
        }
    }

    /// Adds the id of the message.
    pub fn message_id(mut self, id: impl Into<Cow<'a, str>>) -> Self {
        self.message_id = Some(id.into());
        self
    }

    /// Adds the delivery tag, of AMQP 0-9-1.
    pub fn delivery_tag(mut self, tag: u64) -> Self {
        self.delivery_tag = Some(tag);
        self
    }

    /// Adds the `traceparent` header of the message, if there is one.
    pub fn traceparent(mut self, header: Option<impl Into<Cow<'a, str>>>) -> Self {
        self.traceparent = header.map(Into::into);
        self
    }

    /// Adds the `tracestate` header of the message, if there is one.
    pub fn tracestate(mut self, header: Option<impl Into<Cow<'a, str>>>) -> Self {
        self.tracestate = header.map(Into::into);
        self
    }

    fn record(&self, span: &Span, operation: &str) {
        let name = format!("{operation} {}", self.destination);
        span.record("otel.name", &*name);
        span.record("messaging.system", self.system);
        span.record("messaging.destination.name", &*self.destination);
        if let Some(id) = &self.message_id {
            span.record("messaging.message.id", &**id);
        }
        if let Some(tag) = self.delivery_tag {
            span.record("messaging.rabbitmq.message.delivery_tag", tag);
        }
    }
}

// === impl ProcessSpan ===

/// The [`MakeSpan`] of [`SentinelLayer::process_span`](crate::SentinelLayer::process_span).
///
/// # The spans of a job
///
/// - `process`, of level `INFO`: from the sentinel's `call` until the job is settled. It is a child
///   of the caller's span, and current in the job and in the policy.
/// - `settle`, of level `INFO`, its child: one for each settlement of a
///   [`SettlePolicy`](crate::SettlePolicy), all tries included.
///
/// | field | `process` | `settle` |
/// | --- | --- | --- |
/// | `otel.name` | `process {destination}` | `{verdict} {destination}` |
/// | `otel.kind` | `consumer` | `client` |
/// | `messaging.operation.type` | `process` | `settle` |
/// | `messaging.operation.name` | `process` | the verdict, such as `ack` |
/// | `messaging.system`, `messaging.destination.name`, `messaging.message.id`, `messaging.rabbitmq.message.delivery_tag` | as the tag's [`Settle::messaging`] says | the same |
/// | `consumer.name` | the name of the [`Consumer`](crate::Consumer::name), if it has one | |
/// | `error.type` | `panic`, `timeout`, the type of the job's error, or why it was cancelled, but for a shutdown | the type of the last error, or `timeout` |
/// | `error.message` | what the job's error prints, from a `SettlePolicy` | |
/// | `otel.status_code` | `ERROR` if the job failed, panicked or timed out | `ERROR` if it failed |
///
/// The `otel.*` fields are those that `tracing-opentelemetry` reads.
///
/// # Events
///
/// In the job's span, whichever it is, there is one event for each job that has not completed. Its
/// level is `ERROR` for a job that panicked or is rejected, `INFO` for one that was shut down or whose
/// caller dropped it, and `WARN` for all others.
///
/// | field | of which jobs |
/// | --- | --- |
/// | `error.type` | those that failed: the type of the error |
/// | `exception.message`, and with the [panic hook](crate::panic_hook) `code.file.path`, `code.line.number`, `exception.stacktrace` | those that panicked, also on their way down |
/// | `limit` | those that passed their time limit |
/// | `reason` | those that were cancelled, as [`CancelReason::as_str`] says |
/// | `started` | those that never did |
/// | `stopped` | those that passed their time limit or were cancelled |
///
/// A [`SettlePolicy`](crate::SettlePolicy) knows more, so where the sentinel has one the event is the
/// policy's, with these fields besides:
///
/// | field | |
/// | --- | --- |
/// | `error.message` | what the job's error prints; why a job was not run |
/// | `verdict` | such as `retry after 5s`; none if the policy has no verdict, or none that the broker can carry out |
/// | `deliveries` | as the tag's [`Settle::deliveries`] says |
/// | `messaging.destination.name`, `messaging.message.id`, `messaging.rabbitmq.message.delivery_tag` | as the tag's [`Settle::messaging`] says; `tag`, as its `Debug` prints it, if that says nothing |
///
/// A job that is rejected where [no dead letter](crate::Capabilities::has_dead_letter) is kept is said
/// to be dropped. What an error prints is its author's: it should have no secret and no payload in it.
///
/// The sentinel knows its `SettlePolicy` by the response, [`Settled`](crate::Settled): behind a
/// `map_response`, both tell.
///
/// # Where the trace comes from
///
/// The caller's span is the parent. A message that brings a trace context of its own, in its
/// headers, is to be *linked* to: conventions have it that a consumer's trace is not that of the
/// producer. Links are OpenTelemetry's and not `tracing`'s, so they take its crates; see
/// [`process_span`].
#[derive(Clone, Copy, Debug, Default)]
pub struct ProcessSpan;

impl<Tag: Settle> MakeSpan<Tag> for ProcessSpan {
    fn make_span(&self, tag: &Tag) -> Span {
        process_span(tag)
    }
}

/// Makes the span `process` of a job, to be added to; see [`ProcessSpan`] for what is in it.
///
/// For [`SentinelLayer::make_span`](crate::SentinelLayer::make_span), to link the span to the
/// trace of the message's sender, as the example `otlp` does:
///
/// ```ignore
/// use opentelemetry::{propagation::TextMapPropagator, trace::TraceContextExt};
/// use opentelemetry_sdk::propagation::TraceContextPropagator;
/// use std::collections::HashMap;
/// use tower_sentinel::{Settle, process_span};
/// use tracing::Span;
/// use tracing_opentelemetry::OpenTelemetrySpanExt;
///
/// fn linked_span<Tag: Settle>(tag: &Tag) -> Span {
///     let span = process_span(tag);
///     if span.is_disabled() {
///         return span; // what the tag says may have to be made, and nobody would read it
///     }
///     if let Some(traceparent) = tag.messaging().and_then(|it| it.traceparent) {
///         let headers = HashMap::from([("traceparent".to_owned(), traceparent.into_owned())]);
///         let sender = TraceContextPropagator::new().extract(&headers);
///         span.add_link(sender.span().span_context().clone());
///     }
///     span
/// }
/// ```
pub fn process_span<Tag: Settle>(tag: &Tag) -> Span {
    macro_rules! process {
        ($($parent:tt)*) => {
            tracing::info_span!(
                $($parent)*
                "process",
                otel.name = field::Empty,
                otel.kind = "consumer",
                otel.status_code = field::Empty,
                messaging.operation.name = "process",
                messaging.operation.type = "process",
                messaging.system = field::Empty,
                messaging.destination.name = field::Empty,
                messaging.message.id = field::Empty,
                messaging.rabbitmq.message.delivery_tag = field::Empty,
                consumer.name = field::Empty,
                error.type = field::Empty,
                error.message = field::Empty,
            )
        };
    }
    let span = match consumer_name::parent_of_jobs() {
        Some(parent) => process!(parent: parent,),
        None => process!(),
    };
    if let Some(name) = consumer_name::current() {
        span.record("consumer.name", &*name);
    }
    describe(&span, tag, "process");
    span
}

/// Makes the span of a settlement, within the job's; none if the subscriber panics.
pub(crate) fn settle_span<Tag: Settle>(tag: &Tag, verdict: Verdict) -> GuardedSpan {
    let span = GuardedSpan::make(|| new_settle_span(verdict));
    guard(|| describe(&span.0, tag, verdict.as_str()));
    span
}

fn new_settle_span(verdict: Verdict) -> Span {
    tracing::info_span!(
        "settle",
        otel.name = field::Empty,
        otel.kind = "client",
        otel.status_code = field::Empty,
        messaging.operation.name = verdict.as_str(),
        messaging.operation.type = "settle",
        messaging.system = field::Empty,
        messaging.destination.name = field::Empty,
        messaging.message.id = field::Empty,
        messaging.rabbitmq.message.delivery_tag = field::Empty,
        error.type = field::Empty,
    )
}

/// A span of the user's subscriber, which may panic: no panic gets out of it but that of `new`.
#[derive(Clone, Debug)]
pub(crate) struct GuardedSpan(Span);

impl GuardedSpan {
    #[inline]
    pub(crate) fn new(span: Span) -> Self {
        Self(span)
    }

    /// Makes a span, or none if the subscriber panics.
    pub(crate) fn make(make: impl FnOnce() -> Span) -> Self {
        let mut span = Self(Span::none());
        guard(|| span = Self(make()));
        span
    }

    pub(crate) fn id(&self) -> Option<Id> {
        self.0.id()
    }

    /// Enters the span until the guard is dropped.
    #[inline]
    pub(crate) fn enter(&self) -> Entered<'_> {
        let mut entered = None;
        // Without a subscriber this is all.
        if !self.0.is_disabled() {
            guard(|| entered = Some(self.0.enter()));
        }
        Entered(entered)
    }

    /// Marks it as that of something that went wrong.
    pub(crate) fn record_error(&self, error_type: &str) {
        guard(|| {
            self.0.record("error.type", error_type);
            self.0.record("otel.status_code", "ERROR");
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

/// Leaves its span when it is dropped.
pub(crate) struct Entered<'a>(Option<tracing::span::Entered<'a>>);

impl Drop for Entered<'_> {
    #[inline]
    fn drop(&mut self) {
        if let Some(entered) = self.0.take() {
            drop_quietly(entered);
        }
    }
}

/// Records in `span` what the tag says of its delivery.
fn describe<Tag: Settle>(span: &Span, tag: &Tag, operation: &str) {
    // What the tag has to say may have to be made, so nobody asks in vain.
    if span.is_disabled() {
        return;
    }
    if let Some(messaging) = tag.messaging() {
        messaging.record(span, operation);
    }
}

/// Marks `span` as that of a job that has not completed.
pub(crate) fn mark<T, E>(span: &GuardedSpan, outcome: &Outcome<T, E>) {
    match outcome {
        Outcome::Completed(_) => {}
        Outcome::Failed(_) => span.record_error(type_name::<E>()),
        Outcome::Panicked(_) => span.record_error("panic"),
        Outcome::TimedOut(_) => span.record_error("timeout"),
        Outcome::Cancelled(cancelled) => match cancelled.reason() {
            // To be shut down is no failure of the job's.
            CancelReason::Shutdown => {}
            reason => guard(|| {
                span.0.record("error.type", reason.as_str());
            }),
        },
    }
}
