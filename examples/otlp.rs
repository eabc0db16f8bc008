//! A worker that exports its traces to an OpenTelemetry collector, over OTLP and gRPC.
//!
//! ```sh
//! OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4317 cargo run --example otlp
//! ```
//!
//! Each job has a span `process orders`, which is linked to the span `send orders` of its sender. Within it
//! is a span for the settlement, such as `ack orders`. Jobs that fail are delivered twice.

use std::{collections::HashMap, error::Error, fmt, future::pending, time::Duration};

use opentelemetry::{
    propagation::TextMapPropagator,
    trace::{TraceContextExt, TracerProvider},
};
use opentelemetry_otlp::{ExporterBuildError, SpanExporter, WithExportConfig};
use opentelemetry_sdk::{Resource, propagation::TraceContextPropagator, trace::SdkTracerProvider};
use tokio_util::sync::CancellationToken;
use tower::ServiceBuilder;
use tower_sentinel::{
    Consumer, DecisionExt, SentinelLayer, SettlePolicy, ack_on_success,
    broker::memory::{Broker, Counts, Delivery, Queue},
    settle::{Settle, process_span},
};
use tracing::{Span, Subscriber, info_span};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::{filter::LevelFilter, layer::SubscriberExt};

/// The jobs, each with a different outcome.
pub const JOBS: [&str; 4] = ["a job", "fail", "panic", "hang"];

/// Error of a job.
#[derive(Debug)]
pub struct Refused;

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no such user")
    }
}

/// The job, which does what its payload says.
async fn process(delivery: Delivery<&'static str>) -> Result<(), Refused> {
    match *delivery.payload() {
        "fail" => Err(Refused),
        "panic" => panic!("a poison message"),
        "hang" => pending().await,
        _ => Ok(()),
    }
}

/// Publishes a job, with the trace context of its sender.
fn send(queue: &Queue<&'static str>, job: &'static str) {
    let name = format!("send {}", queue.name());
    let span = info_span!("send", otel.name = name, otel.kind = "producer");
    let mut headers = HashMap::new();
    TraceContextPropagator::new().inject_context(&span.context(), &mut headers);
    queue.publish_with_headers(job, headers);
}

/// Creates the span of a job, in its own trace and linked to the trace of the sender.
fn linked_span<Tag: Settle>(tag: &Tag) -> Span {
    let span = process_span(tag);
    if span.is_disabled() {
        return span;
    }
    let Some(messaging) = tag.messaging() else {
        return span;
    };
    let mut headers = HashMap::new();
    for (name, value) in [
        ("traceparent", messaging.traceparent),
        ("tracestate", messaging.tracestate),
    ] {
        headers.extend(value.map(|value| (name.to_owned(), value.into_owned())));
    }
    let sender = TraceContextPropagator::new().extract(&headers);
    span.add_link(sender.span().span_context().clone());
    span
}

/// Sends the jobs, works on them until the queue is empty, and returns their counts.
pub async fn run() -> Result<Counts, Box<dyn Error>> {
    let broker = Broker::new();
    let queue = broker.queue("orders").dead_letter("orders.dead").declare();
    JOBS.into_iter().for_each(|job| send(&queue, job));

    let jobs = queue.subscribe(8)?;
    let shutdown = CancellationToken::new();
    let sentinel = SentinelLayer::new(SettlePolicy::new(ack_on_success().delivery_limit(2)))
        .timeout(Duration::from_millis(100))
        .shutdown(shutdown.clone())
        .make_span(linked_span);
    let service = ServiceBuilder::new()
        .layer(jobs.gate())
        .layer(sentinel)
        .service_fn(process);
    let emptied = queue.clone();
    Consumer::new(jobs, service)
        .shutdown(shutdown)
        .with_graceful_shutdown(async move { emptied.emptied().await })
        .run()
        .await?;
    Ok(queue.counts())
}

/// Creates a provider that exports spans to `endpoint`.
///
/// The default is `OTEL_EXPORTER_OTLP_ENDPOINT`, or else port 4317 of this machine. The provider exports in
/// the tokio runtime that it is created in.
pub fn exporting(endpoint: Option<String>) -> Result<SdkTracerProvider, ExporterBuildError> {
    let mut exporter = SpanExporter::builder().with_tonic();
    if let Some(endpoint) = endpoint {
        exporter = exporter.with_endpoint(endpoint);
    }
    Ok(SdkTracerProvider::builder()
        .with_resource(Resource::builder().with_service_name("worker").build())
        .with_batch_exporter(exporter.build()?)
        .build())
}

/// Creates a subscriber whose spans `provider` exports. The spans of the exporter are below its level.
pub fn subscriber(provider: &SdkTracerProvider) -> impl Subscriber + Send + Sync + use<> {
    let tracer = provider.tracer("worker");
    tracing_subscriber::registry()
        .with(LevelFilter::INFO)
        .with(tracing_opentelemetry::layer().with_tracer(tracer))
}

/// Exports the remaining spans, on a separate thread: it blocks, and the exporter's connection is a task.
pub async fn flush(provider: SdkTracerProvider) -> Result<(), Box<dyn Error>> {
    let flushing = tokio::task::spawn_blocking(move || {
        // A shutdown exports too, but does not report whether that worked.
        let flushed = provider.force_flush();
        provider.shutdown()?;
        flushed
    });
    Ok(flushing.await??)
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let provider = exporting(None)?;
    tracing::subscriber::set_global_default(subscriber(&provider))?;
    let counts = run().await?;
    flush(provider).await?;
    println!(
        "settled {} jobs: {} acked, {} dead; their spans are exported",
        JOBS.len(),
        counts.acked,
        counts.dead
    );
    Ok(())
}
