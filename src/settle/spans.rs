//! Spans of a job and of its settlement.
//!
//! Names of spans and fields follow the
//! [messaging conventions of OpenTelemetry](https://opentelemetry.io/docs/specs/semconv/messaging/messaging-spans/)
//! (status: development). See [`ProcessSpan`].

use tracing::{Span, field};

use crate::{
    settle::{Settle, verdict::Verdict},
    telemetry::{GuardedSpan, consumer_name},
    time::elapsed_since,
};

// === ProcessSpan ===

/// The [`MakeSpan`](crate::sentinel::MakeSpan) of
/// [`SentinelLayer::process_span`](crate::SentinelLayer::process_span): one `process` span for each job.
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
/// | `messaging.system`, `messaging.destination.name`, `messaging.consumer.group.name`, `messaging.message.id`, `messaging.rabbitmq.message.delivery_tag` | from the tag's [`Settle::messaging`] | the same |
/// | `consumer.name` | the name of the [`Consumer`](crate::Consumer::name), if it has one | |
/// | `tower_sentinel.queue.duration` | seconds from the publish of the message to the sentinel's `call`, from the tag's [`Settle::published_at`]; for a retry they include the runs before | |
/// | `tower_sentinel.retries` | deliveries before this one, from the tag's [`Settle::deliveries`] | |
/// | `error.type` | `panic`, `timeout`, the type of the job's error, or the reason of a cancellation other than a shutdown | the type of the last error, or `timeout` |
/// | `error.message` | the text of the job's error, from a `SettlePolicy` | |
/// | `otel.status_code` | `ERROR` if the job failed, panicked or timed out | `ERROR` if it failed |
///
/// `tracing-opentelemetry` reads the `otel.*` fields.
///
/// # Events
///
/// In the job's span there is one event for each job that has not completed. Its level is `ERROR` for a
/// job that panicked or is rejected, `INFO` for a job that was cancelled by a shutdown or because its
/// caller dropped it, and `WARN` for all others.
///
/// | field | jobs that have it |
/// | --- | --- |
/// | `error.type` | those that failed: the type of the error |
/// | `exception.message`, and with the [panic hook](crate::panic_hook) `code.file.path`, `code.line.number`, `exception.stacktrace` | those that panicked, also on their way down |
/// | `limit` | those that passed their time limit |
/// | `reason` | those that were cancelled: the name from [`CancelReason::as_str`](crate::outcome::CancelReason::as_str) |
/// | `started` | those that never started |
/// | `stopped` | those that passed their time limit or were cancelled |
///
/// A [`SettlePolicy`](crate::SettlePolicy) knows more. If the sentinel has one, the policy emits the event
/// instead, with these additional fields:
///
/// | field | content |
/// | --- | --- |
/// | `error.message` | the text of the job's error, or the reason why a job was not run |
/// | `verdict` | such as `retry after 5s`; none if the policy has no verdict, or none that the broker can carry out |
/// | `deliveries` | from the tag's [`Settle::deliveries`] |
/// | `messaging.destination.name`, `messaging.message.id`, `messaging.rabbitmq.message.delivery_tag` | from the tag's [`Settle::messaging`]; if that is `None`, the field `tag` with the tag's `Debug` instead |
///
/// If a rejected job is [not kept as a dead letter](crate::settle::Capabilities::has_dead_letter), the event
/// says that it is dropped. The text of an error comes from its author: it should contain no secret and no
/// payload.
///
/// The sentinel recognises a `SettlePolicy` by its response, [`Settled`](crate::settle::Settled). Behind a
/// `map_response` both emit an event.
///
/// # Trace context of a message
///
/// The caller's span is the parent. If a message brings its own trace context in its headers, the span
/// should be *linked* to it: by convention the traces of consumer and producer are separate. Links belong
/// to OpenTelemetry and not to `tracing`, so they need OpenTelemetry's crates; see [`process_span`].
#[derive(Clone, Copy, Debug, Default)]
pub struct ProcessSpan;

/// Creates the span `process` of a job, to be extended; see [`ProcessSpan`] for its fields.
///
/// Use it in [`SentinelLayer::make_span`](crate::SentinelLayer::make_span) to link the span to the trace of
/// the message's sender, as the example `otlp` does:
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
///         return span; // nobody would read it, and the description may have to be built
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
                messaging.consumer.group.name = field::Empty,
                messaging.message.id = field::Empty,
                messaging.rabbitmq.message.delivery_tag = field::Empty,
                consumer.name = field::Empty,
                tower_sentinel.queue.duration = field::Empty,
                tower_sentinel.retries = field::Empty,
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
    age(&span, tag);
    span
}

/// Creates the span of a settlement, a child of the job's span; a disabled one if the subscriber panics.
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
        messaging.consumer.group.name = field::Empty,
        messaging.message.id = field::Empty,
        messaging.rabbitmq.message.delivery_tag = field::Empty,
        error.type = field::Empty,
    )
}

/// Records how long and how often the tag's job has waited for its turn.
fn age<Tag: Settle>(span: &Span, tag: &Tag) {
    if span.is_disabled() {
        return;
    }
    if let Some(published) = tag.published_at() {
        let age = elapsed_since(published).as_secs_f64();
        span.record("tower_sentinel.queue.duration", age);
    }
    if let Some(deliveries) = tag.deliveries() {
        let retries = deliveries.saturating_sub(1);
        span.record("tower_sentinel.retries", retries);
    }
}

/// Records the tag's description of its delivery in `span`.
fn describe<Tag: Settle>(span: &Span, tag: &Tag, operation: &str) {
    // The description may have to be built, so it is only asked for if somebody reads it.
    if span.is_disabled() {
        return;
    }
    if let Some(messaging) = tag.messaging() {
        messaging.record(span, operation);
    }
}
