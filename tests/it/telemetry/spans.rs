//! Traces of a job: names, fields, parents and levels of spans and events.

use std::{
    collections::BTreeMap,
    fmt,
    future::{pending, ready},
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use tokio_util::sync::CancellationToken;
use tower::{Layer as _, service_fn};
use tower_sentinel::{
    Job, SentinelLayer, SettlePolicy, Verdict, ack_on_success,
    cancel::Cancellation,
    outcome::CancelReason,
    settle::{Messaging, Unsettled},
};
use tracing::{
    Event, Instrument, Subscriber,
    field::{Field, Visit},
    info_span,
    span::{Attributes, Id, Record},
    subscriber::DefaultGuard,
};
use tracing_subscriber::{
    Layer, Registry,
    layer::{Context, SubscriberExt},
    registry::LookupSpan,
};

use crate::support::{Refused, call, raise, tag::Tag};

// === records ===

type Fields = BTreeMap<&'static str, String>;

#[derive(Debug, Default)]
struct Recorded {
    /// Each span with its level, name and parent, when it is closed.
    spans: Vec<(String, Fields)>,
    /// Each event with its level and span.
    events: Vec<(String, Fields)>,
}

#[derive(Clone, Default)]
struct Recording(Arc<Mutex<Recorded>>);

impl Recording {
    /// Records on this thread, which is the only one of these runtimes.
    fn start() -> (Self, DefaultGuard) {
        let recording = Self::default();
        let registry = Registry::default().with(recording.clone());
        (recording, tracing::subscriber::set_default(registry))
    }

    fn take(&self) -> Recorded {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

struct Visitor<'a>(&'a mut Fields);

impl Visit for Visitor<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.insert(field.name(), format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name(), value.to_owned());
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Recording {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut fields = Fields::default();
        attributes.record(&mut Visitor(&mut fields));
        let span = context.span(id).unwrap();
        span.extensions_mut().insert(fields);
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        let span = context.span(id).unwrap();
        let mut extensions = span.extensions_mut();
        values.record(&mut Visitor(extensions.get_mut().unwrap()));
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut Visitor(&mut fields));
        let span = context.event_span(event).map_or("none", |span| span.name());
        let title = format!("{} in {span}", event.metadata().level());
        self.0.lock().unwrap().events.push((title, fields));
    }

    fn on_close(&self, id: Id, context: Context<'_, S>) {
        let span = context.span(&id).unwrap();
        let parent = span.parent().map_or("none", |parent| parent.name());
        let title = format!("{} {} under {parent}", span.metadata().level(), span.name());
        let fields = span.extensions().get::<Fields>().unwrap().clone();
        self.0.lock().unwrap().spans.push((title, fields));
    }
}

fn fields<const N: usize>(fields: [(&'static str, &str); N]) -> Fields {
    let owned = |(name, value): (_, &str)| (name, value.to_owned());
    fields.map(owned).into_iter().collect()
}

// === the job and its tag ===

/// Result of a settlement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Works,
    Fails,
    Hangs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Value,
    Error,
    Panic,
    Hang,
    LosesItsLease,
    ShutDown,
}

#[derive(Clone, Debug)]
struct Delivery {
    fate: Fate,
    tag: Tag,
}

impl Job for Delivery {
    type Tag = Tag;

    fn tag(&self) -> Tag {
        self.tag.clone()
    }
}

async fn process(delivery: Delivery) -> io::Result<()> {
    match delivery.fate {
        Fate::Value => return Ok(()),
        Fate::Error => return Err(io::Error::other("no such user")),
        Fate::Panic => raise("index 7"),
        Fate::LosesItsLease => Cancellation::current().cancel(CancelReason::LeaseLost),
        Fate::Hang | Fate::ShutDown => {}
    }
    pending().await
}

/// Runs a job from within a span `caller`, and returns the record.
async fn record(fate: Fate, tag: Tag) -> Recorded {
    let (recording, _guard) = Recording::start();
    let shutdown = CancellationToken::new();
    if fate == Fate::ShutDown {
        shutdown.cancel();
    }
    let mut sentinel = SentinelLayer::new(SettlePolicy::new(ack_on_success()))
        .timeout(Duration::from_secs(10))
        .shutdown(shutdown)
        .process_span()
        .layer(service_fn(process));
    let response = call(&mut sentinel, Delivery { fate, tag }).instrument(info_span!("caller"));
    drop(response.await);
    recording.take()
}

fn described(way: Way) -> Tag {
    let tag = Tag::new().describing(|| {
        let messaging = Messaging::new("rabbitmq", "orders");
        let messaging = messaging.consumer_group("billing");
        Some(messaging.message_id("m-7").delivery_tag(42))
    });
    match way {
        Way::Works => tag,
        Way::Fails => tag.failing(|_| Unsettled::last(Refused)),
        Way::Hangs => tag.settling(|_| pending()),
    }
}

/// The fields of the span of a job that has completed.
fn process_fields() -> Fields {
    fields([
        ("otel.name", "process orders"),
        ("otel.kind", "consumer"),
        ("messaging.operation.name", "process"),
        ("messaging.operation.type", "process"),
        ("messaging.system", "rabbitmq"),
        ("messaging.destination.name", "orders"),
        ("messaging.consumer.group.name", "billing"),
        ("messaging.message.id", "m-7"),
        ("messaging.rabbitmq.message.delivery_tag", "42"),
    ])
}

fn settle_fields(verdict: &str) -> Fields {
    let mut expected = process_fields();
    expected.extend(fields([
        ("otel.name", &*format!("{verdict} orders")),
        ("otel.kind", "client"),
        ("messaging.operation.name", verdict),
        ("messaging.operation.type", "settle"),
    ]));
    expected
}

#[tokio::test(start_paused = true)]
async fn a_job_has_one_process_span_and_one_settle_span_within_the_callers() {
    let error = [("error.type", "x"), ("otel.status_code", "ERROR")];
    let failed = |error_type| {
        let mut error = error;
        error[0].1 = error_type;
        fields(error)
    };
    let mut refused = failed("std::io::error::Error");
    refused.extend(fields([("error.message", "no such user")]));
    let table = [
        (Fate::Value, "ack", Fields::new()),
        (Fate::Error, "retry", refused),
        (Fate::Panic, "retry", failed("panic")),
        (Fate::Hang, "retry", failed("timeout")),
        (
            Fate::LosesItsLease,
            "abandon",
            fields([("error.type", "lease_lost")]),
        ),
        // To be shut down is no failure.
        (Fate::ShutDown, "release", Fields::new()),
    ];
    for (fate, verdict, marks) in table {
        let recorded = record(fate, described(Way::Works)).await;
        let mut process = process_fields();
        process.extend(marks);
        let expected = [
            (
                "INFO settle under process".to_owned(),
                settle_fields(verdict),
            ),
            ("INFO process under caller".to_owned(), process),
            ("INFO caller under none".to_owned(), Fields::new()),
        ];
        assert_eq!(recorded.spans, expected, "{fate:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_outcome_that_is_not_completed_is_one_event_in_the_jobs_span() {
    let table = [
        (Fate::Value, None),
        (
            Fate::Error,
            Some((
                "WARN in process",
                fields([
                    ("message", "the job failed"),
                    ("error.type", "std::io::error::Error"),
                    ("error.message", "no such user"),
                    ("verdict", "retry"),
                    ("messaging.destination.name", "orders"),
                    ("messaging.message.id", "m-7"),
                    ("messaging.rabbitmq.message.delivery_tag", "42"),
                ]),
            )),
        ),
        (
            Fate::Panic,
            Some((
                "ERROR in process",
                fields([
                    ("message", "the job panicked"),
                    ("exception.message", "index 7"),
                    ("verdict", "retry"),
                    ("messaging.destination.name", "orders"),
                    ("messaging.message.id", "m-7"),
                    ("messaging.rabbitmq.message.delivery_tag", "42"),
                ]),
            )),
        ),
        (
            Fate::Hang,
            Some((
                "WARN in process",
                fields([
                    ("message", "the job passed its time limit"),
                    ("limit", "10s"),
                    ("verdict", "retry"),
                    ("messaging.destination.name", "orders"),
                    ("messaging.message.id", "m-7"),
                    ("messaging.rabbitmq.message.delivery_tag", "42"),
                    ("stopped", "true"),
                ]),
            )),
        ),
        (
            Fate::ShutDown,
            Some((
                "INFO in process",
                fields([
                    ("message", "the job was cancelled"),
                    ("reason", "shutdown"),
                    ("verdict", "release"),
                    ("messaging.destination.name", "orders"),
                    ("messaging.message.id", "m-7"),
                    ("messaging.rabbitmq.message.delivery_tag", "42"),
                    ("started", "false"),
                    ("stopped", "true"),
                ]),
            )),
        ),
    ];
    for (fate, event) in table {
        let recorded = record(fate, described(Way::Works)).await;
        let expected: Vec<_> = event
            .map(|(title, fields)| (title.to_owned(), fields))
            .into_iter()
            .collect();
        assert_eq!(recorded.events, expected, "{fate:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_settlement_that_fails_is_marked_in_its_own_span_alone() {
    for (way, error_type) in [
        (Way::Fails, "it::support::Refused"),
        (Way::Hangs, "timeout"),
    ] {
        let recorded = record(Fate::Value, described(way)).await;
        let mut settle = settle_fields("ack");
        settle.extend(fields([
            ("error.type", error_type),
            ("otel.status_code", "ERROR"),
        ]));
        assert_eq!(recorded.spans[0].1, settle, "{way:?}");
        assert_eq!(recorded.spans[1].1, process_fields(), "{way:?}");
        // The event of the try that failed is within that span.
        let titles: Vec<_> = recorded.events.iter().map(|(title, _)| title).collect();
        assert_eq!(titles, ["WARN in settle"], "{way:?}");
    }
}

#[tokio::test]
async fn a_tag_that_describes_nothing_has_the_spans_all_the_same() {
    let recorded = record(Fate::Value, Tag::new()).await;
    let titles: Vec<_> = recorded.spans.iter().map(|(title, _)| title).collect();
    assert_eq!(
        titles,
        [
            "INFO settle under process",
            "INFO process under caller",
            "INFO caller under none"
        ]
    );
    assert!(!recorded.spans[1].1.contains_key("messaging.system"));
}

#[tokio::test]
async fn the_span_of_a_job_has_the_age_of_its_message_and_its_retries() {
    const AGE: Duration = Duration::from_secs(100);
    let now = SystemTime::now();
    let table = [
        (Tag::new(), None, None),
        (Tag::new().published(now - AGE), Some(100.0), None),
        (Tag::new().published(now + AGE), Some(0.0), None),
        (Tag::new().delivered(1), None, Some("0")),
        (
            Tag::new().delivered(3).published(now - AGE),
            Some(100.0),
            Some("2"),
        ),
    ];
    for (tag, age, retries) in table {
        let recorded = record(Fate::Value, tag).await;
        let [(_, settle), (_, process), _] = &*recorded.spans else {
            panic!("{:?}", recorded.spans);
        };
        let seconds = process.get("tower_sentinel.queue.duration");
        let seconds = seconds.map(|it| it.parse::<f64>().unwrap().floor());
        assert_eq!(seconds, age);
        let found = process.get("tower_sentinel.retries");
        assert_eq!(found.map(|it| &**it), retries);
        assert!(!settle.keys().any(|it| it.starts_with("tower_sentinel")));
    }
}

#[tokio::test]
async fn nobody_is_asked_to_describe_a_delivery_where_no_span_is_enabled() {
    let _guard = tracing::subscriber::set_default(tracing::subscriber::NoSubscriber::new());
    let mut sentinel = SentinelLayer::new(SettlePolicy::new(ack_on_success()))
        .process_span()
        .layer(service_fn(|_: Tag| ready(Ok::<_, Refused>(()))));
    static ASKED: AtomicUsize = AtomicUsize::new(0);
    let silent = Tag::new().describing(|| {
        ASKED.fetch_add(1, Ordering::Relaxed);
        None
    });
    for _ in 0..3 {
        let settled = call(&mut sentinel, silent.clone()).await.unwrap();
        assert_eq!(settled.verdict, Verdict::Ack);
    }
    // The policy asks once for its metrics.
    let asked = usize::from(cfg!(feature = "metrics"));
    assert_eq!(ASKED.load(Ordering::Relaxed), asked);
}
