//! G7: the caller's span, and the job's, are current inside the task and in the policy.

use std::{
    convert::Infallible,
    fmt,
    future::{self, Future},
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};

use futures_util::poll;
use tokio::{
    runtime::Builder,
    task::yield_now,
    time::{sleep, timeout},
};
use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
use tower_sentinel::{Report, SentinelError, SentinelLayer, sentinel::OnDrop};
use tracing::{
    Event, Instrument, Span,
    field::{Field, Visit},
    info_span,
    span::{Attributes, Id},
    subscriber::DefaultGuard,
};
use tracing_subscriber::{
    Layer, Registry,
    layer::{Context as LayerContext, SubscriberExt},
    registry::LookupSpan,
};

// === Records ===

/// Record of all events in order: spans that open and close, events, and the notes of jobs.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<String>>>);

impl Log {
    /// Records on this thread, which is the only one of these runtimes.
    fn start() -> (Self, DefaultGuard) {
        let log = Self::default();
        let guard = tracing::subscriber::set_default(Registry::default().with(log.clone()));
        (log, guard)
    }

    fn push(&self, entry: impl Into<String>) {
        self.0.lock().unwrap().push(entry.into());
    }

    /// Notes in which span `what` happens.
    fn note(&self, what: &str) {
        let name = Span::current()
            .metadata()
            .map_or("none", |span| span.name());
        self.push(format!("{what} in {name}"));
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl<S: tracing::Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Log {
    fn on_new_span(&self, _: &Attributes<'_>, id: &Id, context: LayerContext<'_, S>) {
        let span = context.span(id).unwrap();
        let parent = span.parent().map_or("none", |parent| parent.name());
        self.push(format!("open {} under {parent}", span.name()));
    }

    fn on_event(&self, event: &Event<'_>, context: LayerContext<'_, S>) {
        let span = context.event_span(event).map_or("none", |span| span.name());
        let mut fields = Fields::default();
        event.record(&mut fields);
        let Fields { message, error } = fields;
        let level = event.metadata().level();
        self.push(format!("{level} {message}: {error} in {span}"));
    }

    fn on_close(&self, id: Id, context: LayerContext<'_, S>) {
        self.push(format!("close {}", context.span(&id).unwrap().name()));
    }
}

#[derive(Default)]
struct Fields {
    message: String,
    error: String,
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        match field.name() {
            "message" => self.message = format!("{value:?}"),
            "error" => self.error = format!("{value:?}"),
            _ => {}
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }
}

// === The job and the policy ===

#[derive(Clone, Copy, Debug, PartialEq)]
enum Work {
    Returns,
    Hangs,
}

/// Says where its call, its polls and its destructor happen.
#[derive(Clone)]
struct Worker(Log);

struct SaysDrop(Log);

impl Drop for SaysDrop {
    fn drop(&mut self) {
        self.0.note("job dropped");
    }
}

impl Service<Arc<Work>> for Worker {
    type Response = ();
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<(), Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, work: Arc<Work>) -> Self::Future {
        let log = self.0.clone();
        log.note("job called");
        Box::pin(async move {
            let _says_drop = SaysDrop(log.clone());
            log.note("job begun");
            yield_now().await;
            log.note("job resumed");
            match *work {
                Work::Returns => Ok(()),
                Work::Hangs => future::pending().await,
            }
        })
    }
}

const JOB: [&str; 4] = ["job called", "job begun", "job resumed", "job dropped"];
const POLICY: [&str; 3] = ["policy ready", "policy called", "policy resumed"];

#[derive(Clone, Copy, Debug, PartialEq)]
enum Answer {
    Settles,
    Fails,
    Panics,
    Hangs,
}

#[derive(Clone)]
struct Policy(Log, Answer);

impl<R> Service<R> for Policy {
    type Response = ();
    type Error = &'static str;
    type Future = Pin<Box<dyn Future<Output = Result<(), &'static str>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), &'static str>> {
        self.0.note("policy ready");
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: R) -> Self::Future {
        let Self(log, answer) = self.clone();
        log.note("policy called");
        Box::pin(async move {
            // Long enough for a caller to drop meanwhile.
            sleep(Duration::from_secs(1)).await;
            log.note("policy resumed");
            match answer {
                Answer::Settles => Ok(()),
                Answer::Fails => Err("channel closed"),
                Answer::Panics => panic!("no channel"),
                Answer::Hangs => future::pending().await,
            }
        })
    }
}

fn in_span(notes: &[&str], span: &str) -> Vec<String> {
    notes
        .iter()
        .map(|note| format!("{note} in {span}"))
        .collect()
}

fn job_span(_: &Arc<Work>) -> Span {
    info_span!("job")
}

/// Time at which the caller drops the response future, in the time of the test.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Drops {
    Never,
    BeforeTheFirstPoll,
    WhileTheJobRuns,
    WhileThePolicySettles,
}

const DROPS: [Drops; 4] = [
    Drops::Never,
    Drops::BeforeTheFirstPoll,
    Drops::WhileTheJobRuns,
    Drops::WhileThePolicySettles,
];

/// Makes one call in a span `caller`, and lets everything end.
async fn call<S>(mut service: S, work: Work, drops: Drops)
where
    S: Service<Arc<Work>, Error: fmt::Debug>,
{
    let caller = info_span!("caller");
    service.ready().await.unwrap();
    let response = caller.in_scope(|| service.call(Arc::new(work)));
    // The caller polls outside of its span: that the policy is in it is the sentinel's doing.
    drop(caller);
    match drops {
        Drops::Never => {
            response.await.ok();
        }
        Drops::BeforeTheFirstPoll => drop(response),
        Drops::WhileTheJobRuns => {
            let mut response = Box::pin(response);
            assert!(poll!(&mut response).is_pending());
            yield_now().await;
        }
        Drops::WhileThePolicySettles => {
            // The limit is at 10 s, and the policy takes a second.
            let patience = match work {
                Work::Returns => Duration::from_millis(500),
                Work::Hangs => Duration::from_millis(10_500),
            };
            assert!(timeout(patience, response).await.is_err());
        }
    }
    sleep(Duration::from_secs(60)).await;
}

fn layer(log: &Log, answer: Answer, on_drop: OnDrop) -> SentinelLayer<Policy> {
    SentinelLayer::new(Policy(log.clone(), answer))
        .timeout(Duration::from_secs(10))
        .settle_timeout(Duration::from_secs(5))
        .on_drop(on_drop)
}

/// Expected notes of the job: one that is dropped before it began has none.
fn job_notes(work: Work, drops: Drops, on_drop: OnDrop) -> &'static [&'static str] {
    let stopped = match on_drop {
        OnDrop::Abort => drops,
        OnDrop::Detach => Drops::Never,
    };
    match (stopped, work) {
        (Drops::BeforeTheFirstPoll, _) => &[],
        // Aborted after its first poll.
        (Drops::WhileTheJobRuns, _) => &["job called", "job begun", "job dropped"],
        (Drops::Never | Drops::WhileThePolicySettles, _) => &JOB,
    }
}

/// The event of an outcome that is not `Completed`.
fn event(work: Work, drops: Drops, on_drop: OnDrop, span: &str) -> Option<String> {
    let event = match (on_drop, drops, work) {
        (OnDrop::Abort, Drops::BeforeTheFirstPoll | Drops::WhileTheJobRuns, _) => {
            "INFO the job was cancelled"
        }
        (_, _, Work::Hangs) => "WARN the job passed its time limit",
        (_, _, Work::Returns) => return None,
    };
    Some(format!("{event}:  in {span}"))
}

#[tokio::test(start_paused = true)]
async fn g7_the_callers_span_is_current_in_the_job_and_in_the_policy() {
    let (log, _guard) = Log::start();
    for on_drop in [OnDrop::Abort, OnDrop::Detach] {
        for drops in DROPS {
            for work in [Work::Returns, Work::Hangs] {
                let service = ServiceBuilder::new()
                    .layer(layer(&log, Answer::Settles, on_drop))
                    .service(Worker(log.clone()));
                call(service, work, drops).await;

                let mut expected = vec!["open caller under none".to_owned()];
                expected.extend(in_span(job_notes(work, drops, on_drop), "caller"));
                expected.extend(event(work, drops, on_drop, "caller"));
                expected.extend(in_span(&POLICY, "caller"));
                expected.push("close caller".to_owned());
                assert_eq!(log.take(), expected, "{work:?}, {drops:?}, {on_drop:?}");
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn g7_the_jobs_span_is_current_in_both_and_its_parent_is_the_callers() {
    let (log, _guard) = Log::start();
    for on_drop in [OnDrop::Abort, OnDrop::Detach] {
        for drops in DROPS {
            for work in [Work::Returns, Work::Hangs] {
                let service = ServiceBuilder::new()
                    .layer(layer(&log, Answer::Settles, on_drop).make_span(job_span))
                    .service(Worker(log.clone()));
                call(service, work, drops).await;

                let mut expected = vec![
                    "open caller under none".to_owned(),
                    "open job under caller".to_owned(),
                ];
                expected.extend(in_span(job_notes(work, drops, on_drop), "job"));
                expected.extend(event(work, drops, on_drop, "job"));
                expected.extend(in_span(&POLICY, "job"));
                // After the settlement, which is all that the span is about.
                expected.extend(["close job".to_owned(), "close caller".to_owned()]);
                assert_eq!(log.take(), expected, "{work:?}, {drops:?}, {on_drop:?}");
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn g7_the_jobs_span_is_closed_before_the_caller_has_its_answer() {
    let (log, _guard) = Log::start();
    let mut service = ServiceBuilder::new()
        .layer(layer(&log, Answer::Settles, OnDrop::Abort).make_span(job_span))
        .service(Worker(log.clone()));

    async {
        let response = service.ready().await.unwrap().call(Arc::new(Work::Returns));
        let mut response = Box::pin(response);
        response.as_mut().await.unwrap();
        log.note("answered");
        // The future itself is still there, and holds no span open.
        drop(response);
    }
    .instrument(info_span!("caller"))
    .await;

    let log = log.take();
    let end = &log[log.len() - 4..];
    assert_eq!(
        end,
        [
            "policy resumed in job",
            "close job",
            "answered in caller",
            "close caller"
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn g7_without_a_callers_span_there_is_none_and_the_jobs_span_is_a_root() {
    let (log, _guard) = Log::start();
    let plain = layer(&log, Answer::Settles, OnDrop::Abort);

    let mut service = ServiceBuilder::new()
        .layer(plain.clone())
        .service(Worker(log.clone()));
    let response = service.ready().await.unwrap().call(Arc::new(Work::Returns));
    response.await.unwrap();
    let expected = [in_span(&JOB, "none"), in_span(&POLICY, "none")].concat();
    assert_eq!(log.take(), expected);

    let mut service = ServiceBuilder::new()
        .layer(plain.make_span(job_span))
        .service(Worker(log.clone()));
    let response = service.ready().await.unwrap().call(Arc::new(Work::Returns));
    response.await.unwrap();
    assert_eq!(log.take()[0], "open job under none");
}

#[tokio::test(start_paused = true)]
async fn g7_jobs_side_by_side_are_each_in_their_own_span() {
    let (log, _guard) = Log::start();
    let mut service = ServiceBuilder::new()
        .layer(layer(&log, Answer::Settles, OnDrop::Abort))
        .service(Worker(log.clone()));

    let mut call = |span: Span| {
        let _entered = span.enter();
        service.call(Arc::new(Work::Returns))
    };
    let (first, second) = (call(info_span!("first")), call(info_span!("second")));
    // Polled in a third span, which belongs to neither.
    let (first, second) = async { tokio::join!(first, second) }
        .instrument(info_span!("third"))
        .await;
    first.unwrap();
    second.unwrap();

    let log = log.take();
    for note in JOB.iter().chain(&POLICY) {
        for (span, times) in [("first", 1), ("second", 1), ("third", 0)] {
            let entry = format!("{note} in {span}");
            assert_eq!(
                log.iter().filter(|&line| *line == entry).count(),
                times,
                "{entry}"
            );
        }
    }
}

// === Errors that nobody waits for ===

type Unsettled = SentinelError<Infallible, &'static str>;

/// Runs one job whose settlement ends as in `answer`, and returns the events about it.
async fn unsettled(answer: Answer, drops: Drops) -> Vec<String> {
    let (log, _guard) = Log::start();
    let hook = {
        let log = log.clone();
        move |error: Unsettled| log.note(&format!("hook: {error}"))
    };
    let service = ServiceBuilder::new()
        .layer(
            layer(&log, answer, OnDrop::Detach)
                .make_span(job_span)
                .on_unsettled(hook),
        )
        .service(Worker(log.clone()));
    call(service, Work::Returns, drops).await;
    let mut log = log.take();
    assert_eq!(log.pop().unwrap(), "close caller");
    assert_eq!(log.pop().unwrap(), "close job");
    let after = log
        .iter()
        .position(|line| line == "policy resumed in job")
        .unwrap();
    log.split_off(after + 1)
}

#[tokio::test(start_paused = true)]
async fn g7_an_error_that_nobody_waits_for_is_one_event_in_the_jobs_span() {
    for drops in [
        Drops::BeforeTheFirstPoll,
        Drops::WhileTheJobRuns,
        Drops::WhileThePolicySettles,
    ] {
        for (answer, brief, error) in [
            (
                Answer::Fails,
                "the policy failed",
                "the policy failed: channel closed",
            ),
            (
                Answer::Panics,
                "no channel",
                "the policy panicked: no channel",
            ),
            (
                Answer::Hangs,
                "the policy did not settle in time",
                "the policy did not settle within 5s",
            ),
        ] {
            let expected = [
                format!(
                    "ERROR settlement failed after the response future was dropped: {brief} in job"
                ),
                format!("hook: {error} in job"),
            ];
            assert_eq!(
                unsettled(answer, drops).await,
                expected,
                "{answer:?}, {drops:?}"
            );
        }
    }
}

#[tokio::test(start_paused = true)]
async fn g7_there_is_no_event_for_an_error_that_somebody_waits_for_nor_for_a_success() {
    let nothing: [String; 0] = [];
    for answer in [Answer::Fails, Answer::Panics, Answer::Hangs] {
        assert_eq!(unsettled(answer, Drops::Never).await, nothing, "{answer:?}");
    }
    for drops in DROPS {
        assert_eq!(
            unsettled(Answer::Settles, drops).await,
            nothing,
            "{drops:?}"
        );
    }
}

#[test]
fn g7_a_runtime_that_ends_before_a_job_is_settled_is_one_event_in_the_jobs_span() {
    let (log, _guard) = Log::start();
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let policy = service_fn(|_: Report<_, (), Infallible>| {
            // Not called: there is no runtime left to call it on.
            future::ready(Ok::<_, Infallible>(()))
        });
        let mut service = ServiceBuilder::new()
            .layer(
                SentinelLayer::new(policy)
                    .on_drop(OnDrop::Detach)
                    .make_span(job_span),
            )
            .service(Worker(log.clone()));
        drop(service.ready().await.unwrap().call(Arc::new(Work::Hangs)));
        yield_now().await;
    });
    drop(runtime);

    let log = log.take();
    let events = log.iter().filter(|line| line.starts_with("ERROR"));
    assert_eq!(
        events.collect::<Vec<_>>(),
        ["ERROR job not settled: its runtimes have ended:  in job"]
    );
    assert_eq!(log.last().unwrap(), "close job");
}

#[tokio::test(start_paused = true)]
async fn g7_a_hook_that_panics_is_not_taken_for_the_end_of_the_runtime() {
    let (log, _guard) = Log::start();
    let service = ServiceBuilder::new()
        .layer(
            layer(&log, Answer::Fails, OnDrop::Detach)
                .make_span(job_span)
                .on_unsettled(|_: Unsettled| std::panic::resume_unwind(Box::new("no hook"))),
        )
        .service(Worker(log.clone()));
    call(service, Work::Returns, Drops::BeforeTheFirstPoll).await;
    let log = log.take();
    let events = log.iter().filter(|line| line.starts_with("ERROR"));
    assert_eq!(
        events.collect::<Vec<_>>(),
        ["ERROR settlement failed after the response future was dropped: the policy failed in job"]
    );
}
