//! What crosses of a job to its process beside its bytes.

use std::{collections::HashMap, convert::Infallible, sync::Arc};

use futures_util::StreamExt;
use opentelemetry::{
    propagation::TextMapPropagator,
    trace::{TraceContextExt, TracerProvider},
};
use opentelemetry_sdk::{propagation::TraceContextPropagator, trace::SdkTracerProvider};
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_sentinel::{
    Outcome, Report, SentinelLayer,
    broker::{
        Envelope,
        memory::{Broker, Delivery, DeliveryTag},
    },
    process::{ProcessError, ProcessPool, Request, serve},
};
use tracing::{Span, Subscriber, info_span, subscriber};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::{layer::SubscriberExt, registry};

use crate::child::{Decode, decode, encode, this_test};

/// A pool of children that say what has crossed.
fn pool() -> ProcessPool<Decode> {
    ProcessPool::new(1, decode as Decode).arguments(this_test(module_path!(), "child"))
}

#[test]
#[ignore = "it is a process that the other tests start"]
fn child() {
    serve(service_fn(job), encode);
}

async fn job(request: Request) -> Result<String, Infallible> {
    Ok(match request.as_ref() {
        b"trace" => subscriber::with_default(traced(), || traces(&request)),
        b"debug" => format!("{request:?}"),
        _ => format!(
            "{:?} {:?} {:?} {:?} {:?} {:?}",
            request.header("TENANT"),
            Vec::from_iter(request.headers()),
            request.message_id(),
            request.routing_key(),
            request.deliveries(),
            request.redelivered(),
        ),
    })
}

/// Returns a subscriber with traces of OpenTelemetry.
fn traced() -> impl Subscriber + Send + Sync {
    let tracer = SdkTracerProvider::builder().build().tracer("test");
    registry().with(tracing_opentelemetry::layer().with_tracer(tracer))
}

/// Returns the trace of a span of the handler, and the id of its parent.
fn traces(request: &Request) -> String {
    let headers = request.headers();
    let headers: HashMap<_, _> = headers
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    let context = TraceContextPropagator::new().extract(&headers);
    // The sender's is replaced.
    assert_eq!(
        headers.get("traceparent").map(String::as_str),
        request.header("traceparent")
    );
    let span = info_span!("handler");
    span.set_parent(context.clone()).unwrap();
    let own = span.context();
    let parent = context.span().span_context().span_id();
    format!("{} {parent}", own.span().span_context().trace_id())
}

/// Returns headers with the trace context of the current span.
fn current_trace() -> HashMap<String, String> {
    let mut headers = HashMap::new();
    TraceContextPropagator::new().inject_context(&Span::current().context(), &mut headers);
    headers
}

async fn run<S, E>(service: &mut S, job: Delivery<&'static str>) -> String
where
    S: Service<Delivery<&'static str>, Response = String, Error = E>,
    E: std::fmt::Debug,
{
    service.ready().await.unwrap().call(job).await.unwrap()
}

#[tokio::test]
async fn the_bytes_of_a_job_cross_alone_by_default() {
    let queue = Broker::new().queue("orders").declare();
    queue.publish_with_headers("head", [("tenant", "acme")]);
    let job = queue.subscribe(1).unwrap().next().await.unwrap().unwrap();
    assert_eq!(run(&mut pool(), job).await, "None [] None None None None");
}

#[tokio::test]
async fn headers_that_are_named_cross_with_the_envelope() {
    let queue = Broker::new().queue("orders").declare();
    let headers = [("tenant", "acme"), ("Größe", "ä\0\n"), ("secret", "pony")];
    queue.publish_with_headers("head", headers);
    let mut jobs = queue.subscribe(1).unwrap();
    let mut pool = pool().headers(["tenant", "grösse", "Größe", "absent"]);
    let job = jobs.next().await.unwrap().unwrap();
    let id = job.message_id().unwrap().into_owned();
    let crossed =
        r#"Some("acme") [("tenant", "acme"), ("Größe", "ä\0\n")] Some("ID") Some("orders") "#
            .replace("ID", &id);
    assert_eq!(
        run(&mut pool, job).await,
        format!("{crossed}Some(1) Some(false)")
    );
    // Without a verdict it comes again.
    drop(jobs);
    let mut jobs = queue.subscribe(1).unwrap();
    let job = jobs.next().await.unwrap().unwrap();
    assert_eq!(
        run(&mut pool, job).await,
        format!("{crossed}Some(2) Some(true)")
    );
}

#[tokio::test]
async fn a_request_prints_no_payload_and_no_value_of_a_header() {
    let queue = Broker::new().queue("orders").declare();
    queue.publish_with_headers("debug", [("token", "pony")]);
    let mut jobs = queue.subscribe(1).unwrap();
    let job = jobs.next().await.unwrap().unwrap();
    let text = run(&mut pool().headers(["token"]), job).await;
    assert!(
        text.contains("length: 5") && text.contains("orders"),
        "{text}"
    );
    assert!(!text.contains("debug") && !text.contains("pony"), "{text}");
}

#[tokio::test]
async fn a_span_of_the_handler_is_a_child_of_the_span_of_the_job() {
    let _subscriber = subscriber::set_default(traced());
    let queue = Broker::new().queue("orders").declare();
    // The trace of its sender is another one.
    let senders = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    queue.publish_with_headers("trace", [("Traceparent", senders)]);
    let mut jobs = queue.subscribe(1).unwrap();
    let policy = service_fn(
        |report: Report<DeliveryTag<_>, String, ProcessError<String, _>>| async {
            let Outcome::Completed(text) = report.outcome else {
                panic!("{:?}", report.outcome);
            };
            let span = Span::current().context().span().span_context().clone();
            let expected = format!("{} {}", span.trace_id(), span.span_id());
            Ok::<_, Infallible>(format!("{text} {expected}"))
        },
    );
    let pool = pool().headers(["traceparent"]).trace_context(current_trace);
    let mut sentinel = SentinelLayer::new(policy)
        .make_span(|_: &DeliveryTag<_>| info_span!("job"))
        .layer(pool);
    let job = jobs.next().await.unwrap().unwrap();
    let texts = run(&mut sentinel, job).await;
    let [trace, parent, job_trace, job_span] = *Vec::from_iter(texts.split(' ')) else {
        panic!("{texts}");
    };
    assert_eq!((trace, parent), (job_trace, job_span));
    assert!(!senders.contains(trace) && trace.len() == 32, "{trace}");
}

#[tokio::test]
async fn a_trace_context_that_panics_costs_no_job() {
    let queue = Broker::new().queue("orders").declare();
    queue.publish("head");
    let mut jobs = queue.subscribe(1).unwrap();
    let job = jobs.next().await.unwrap().unwrap();
    let write = Arc::new(|| -> HashMap<String, String> { panic!("no trace") });
    let mut pool = pool().trace_context(move || write());
    assert_eq!(run(&mut pool, job).await, "None [] None None None None");
}
