//! Traces as a collector gets them: the example of that name, against a receiver of OTLP.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex},
};

use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::{KeyValue, any_value::Value},
    trace::v1::{Span, span::SpanKind, status::StatusCode},
};
use tokio::net::TcpListener;
use tonic::{Request, Response, Status, service::Routes};

use self::otlp_example::{exporting, flush, run, subscriber};

#[allow(dead_code, unreachable_pub)]
#[path = "../../../examples/otlp.rs"]
mod otlp_example;

/// A collector that keeps the requests that it gets.
#[derive(Clone, Default)]
struct Receiver(Arc<Mutex<Vec<Span>>>);

#[tonic::async_trait]
impl TraceService for Receiver {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let resources = request.into_inner().resource_spans.into_iter();
        let scopes = resources.flat_map(|resource| resource.scope_spans);
        let spans = scopes.flat_map(|scope| scope.spans);
        self.0.lock().unwrap().extend(spans);
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Receiver {
    /// Listens until the test's runtime ends, and returns where.
    async fn listen(&self) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let app = Routes::new(TraceServiceServer::new(self.clone())).into_axum_router();
        tokio::spawn(async move { axum::serve(listener, app).await });
        format!("http://{address}")
    }
}

/// Returns the attributes of OpenTelemetry's conventions, without those of `tracing`'s bridge.
fn attributes(attributes: &[KeyValue]) -> BTreeMap<&str, String> {
    let prefixes = ["messaging.", "error.", "exception.", "tower_sentinel."];
    let ours = attributes
        .iter()
        .filter(|it| prefixes.iter().any(|prefix| it.key.starts_with(prefix)));
    ours.map(|it| {
        let value = it.value.as_ref().and_then(|value| value.value.as_ref());
        let value = match value {
            Some(Value::StringValue(text)) => text.clone(),
            Some(Value::DoubleValue(number)) => number.to_string(),
            Some(Value::IntValue(number)) => number.to_string(),
            other => format!("{other:?}"),
        };
        (&*it.key, value)
    })
    .collect()
}

/// End of a job.
struct Ended {
    id: &'static str,
    error_type: Option<&'static str>,
    error_message: Option<&'static str>,
    verdict: &'static str,
}

#[tokio::test]
async fn a_collector_gets_the_spans_of_each_job_linked_to_its_sender() {
    let receiver = Receiver::default();
    let provider = exporting(Some(receiver.listen().await)).unwrap();
    // For this thread only, which runs the jobs too.
    let guard = tracing::subscriber::set_default(subscriber(&provider));
    let counts = run().await.unwrap();
    drop(guard);
    flush(provider).await.unwrap();
    assert_eq!((counts.acked, counts.dead), (1, 3));

    let spans = std::mem::take(&mut *receiver.0.lock().unwrap());
    let named = |name: &str| -> Vec<&Span> {
        let mut spans: Vec<_> = spans.iter().filter(|span| span.name == name).collect();
        spans.sort_by_key(|span| span.start_time_unix_nano);
        spans
    };
    let id = |span: &Span| attributes(&span.attributes)["messaging.message.id"].clone();

    let senders = named("send orders");
    assert_eq!(senders.len(), 4);
    assert!(senders.iter().all(|it| it.kind() == SpanKind::Producer));
    // The jobs are numbered as they were sent.
    let sender_of: HashMap<String, &Span> =
        (1..).map(|id: u32| id.to_string()).zip(senders).collect();

    let failed = |id, error_type, error_message, verdict| Ended {
        id,
        error_type: Some(error_type),
        error_message: Some(error_message),
        verdict,
    };
    let refused = std::any::type_name::<otlp_example::Refused>();
    let mut expected = vec![Ended {
        id: "1",
        error_type: None,
        error_message: None,
        verdict: "ack",
    }];
    for verdict in ["retry", "reject"] {
        expected.push(failed("2", refused, "no such user", verdict));
        expected.push(failed("3", "panic", "", verdict));
        expected.push(failed("4", "timeout", "", verdict));
    }

    let mut processed = named("process orders");
    assert_eq!(processed.len(), expected.len());
    assert_eq!(spans.len(), 4 + 2 * expected.len());
    for Ended {
        id: number,
        error_type,
        error_message,
        verdict,
    } in expected
    {
        // The first delivery of a job comes before the second.
        let first = processed.iter().position(|span| id(span) == number);
        let process = processed.remove(first.unwrap());
        let case = format!("{verdict} of job {number}");

        let mut fields = BTreeMap::from([
            ("messaging.system", "memory"),
            ("messaging.destination.name", "orders"),
            ("messaging.message.id", number),
            ("messaging.operation.type", "process"),
            ("messaging.operation.name", "process"),
        ]);
        let mut of_process = fields.clone();
        of_process.extend(error_type.map(|it| ("error.type", it)));
        of_process.extend(
            error_message
                .filter(|it| !it.is_empty())
                .map(|it| ("error.message", it)),
        );
        let mut found = attributes(&process.attributes);
        // At most the time that the test takes.
        let age = found.remove("tower_sentinel.queue.duration").unwrap();
        assert!((0.0..60.0).contains(&age.parse().unwrap()), "{case}: {age}");
        let retries = found.remove("tower_sentinel.retries").unwrap();
        let is_first = error_type.is_none() || verdict == "retry";
        assert_eq!(retries, if is_first { "0" } else { "1" }, "{case}");
        assert_eq!(process.kind(), SpanKind::Consumer, "{case}");
        assert!(process.parent_span_id.is_empty(), "{case}");
        assert!(same(&found, &of_process), "{case}: {found:?}");
        let status = process
            .status
            .as_ref()
            .map_or(StatusCode::Unset, |it| it.code());
        let failed = matches!(status, StatusCode::Error);
        assert_eq!(failed, error_type.is_some(), "{case}");

        let sender = sender_of[number];
        let [link] = &*process.links else {
            panic!("{case}: {:?}", process.links);
        };
        assert_eq!(link.trace_id, sender.trace_id, "{case}");
        assert_eq!(link.span_id, sender.span_id, "{case}");
        assert_ne!(process.trace_id, sender.trace_id, "{case}");

        let panics: Vec<_> = process
            .events
            .iter()
            .filter_map(|event| attributes(&event.attributes).remove("exception.message"))
            .collect();
        match error_type {
            Some("panic") => assert_eq!(panics, ["a poison message"], "{case}"),
            _ => assert!(panics.is_empty(), "{case}: {panics:?}"),
        }

        let mut settled = named(&format!("{verdict} orders"));
        settled.retain(|span| span.parent_span_id == process.span_id);
        let [settle] = &*settled else {
            panic!("{case}: {settled:?}");
        };
        assert_eq!(settle.kind(), SpanKind::Client, "{case}");
        assert_eq!(settle.trace_id, process.trace_id, "{case}");
        fields.insert("messaging.operation.type", "settle");
        fields.insert("messaging.operation.name", verdict);
        let found = attributes(&settle.attributes);
        assert!(same(&found, &fields), "{case}: {found:?}");
        let status = settle
            .status
            .as_ref()
            .map_or(StatusCode::Unset, |it| it.code());
        assert_ne!(status, StatusCode::Error, "{case}");
    }
}

#[tokio::test]
async fn a_worker_without_a_collector_works_all_the_same_and_says_so() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let nobody = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let provider = exporting(Some(nobody)).unwrap();
    let guard = tracing::subscriber::set_default(subscriber(&provider));
    let counts = run().await.unwrap();
    drop(guard);
    assert_eq!((counts.acked, counts.dead), (1, 3));
    flush(provider).await.unwrap_err();
}

fn same(found: &BTreeMap<&str, String>, expected: &BTreeMap<&str, &str>) -> bool {
    let found: BTreeMap<_, _> = found.iter().map(|(key, value)| (*key, &**value)).collect();
    found == *expected
}
