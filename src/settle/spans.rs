//! What a job's traces say: its span, that of its settlement, and an event for a bad end.
//!
//! Spans and fields are named as the
//! [messaging conventions of OpenTelemetry](https://opentelemetry.io/docs/specs/semconv/messaging/messaging-spans/)
//! (status: development) have it. See [`ProcessSpan`].

use tracing::{Span, field};

use crate::{
    settle::{Settle, verdict::Verdict},
    telemetry::{GuardedSpan, consumer_name},
};

// === impl Messaging ===

/// The [`MakeSpan`](crate::sentinel::MakeSpan) of [`SentinelLayer::process_span`](crate::SentinelLayer::process_span).
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
/// | `reason` | those that were cancelled, as [`CancelReason::as_str`](crate::outcome::CancelReason::as_str) says |
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
/// A job that is rejected where [no dead letter](crate::settle::Capabilities::has_dead_letter) is kept is said
/// to be dropped. What an error prints is its author's: it should have no secret and no payload in it.
///
/// The sentinel knows its `SettlePolicy` by the response, [`Settled`](crate::settle::Settled): behind a
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

/// Makes the span `process` of a job, to be added to; see [`ProcessSpan`] for what is in it.
///
/// For [`SentinelLayer::make_span`](crate::SentinelLayer::make_span), to link the span to the
/// trace of the message's sender, as the example `otlp` does:
///
/// ```ignore
/// use opentelemetry::{propagation::TextMapPropagator, trace::TraceContextExt};
/// use opentelemetry_sdk::propagation::TraceContextPropagator;
/// use std::collections::HashMap;
/// use tower_sentinel::settle::{Settle, process_span};
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
    span.record(|span| describe(span, tag, verdict.as_str()));
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
