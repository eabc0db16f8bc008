//! Events and output of a child, as events of this process.

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    fmt, fs,
    io::Write,
    path::Path,
    process::abort,
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use tokio::time::sleep;
use tower::{Layer as _, Service, ServiceExt, service_fn};
use tower_sentinel::{
    Outcome, Report, SentinelLayer,
    process::{Output, ProcessError, ProcessPool, Request, serve},
};
use tracing::{
    Dispatch, Event, Level, Subscriber, debug, error, field, info, info_span, subscriber, trace,
    warn,
};
use tracing_subscriber::{
    Layer,
    layer::{Context, SubscriberExt},
    registry,
    registry::LookupSpan,
};

use crate::{
    child::{Decode, decode, encode, this_test},
    ends::runs,
};

/// A pool of children that tell.
fn pool(child: &str) -> ProcessPool<Decode> {
    ProcessPool::new(1, decode as Decode).arguments(this_test(module_path!(), child))
}

#[test]
#[ignore = "it is a process that the other tests start"]
fn child() {
    serve(service_fn(job), encode);
}

#[test]
#[ignore = "it is a process that the other tests start"]
fn child_with_a_subscriber() {
    let subscriber = tracing_subscriber::fmt().with_writer(std::io::sink);
    subscriber::set_global_default(subscriber.finish()).unwrap();
    serve(service_fn(job), encode);
}

/// `Debug` that panics.
struct Unprintable;

impl fmt::Debug for Unprintable {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        panic!("it can't be printed")
    }
}

async fn job(request: Request) -> Result<String, Infallible> {
    let text = String::from_utf8_lossy(request.as_ref()).into_owned();
    match text.as_str() {
        "log" => log(),
        "log a text" => warn!("{}", "ä".repeat(10 << 10)),
        "log and abort" => {
            error!("last words");
            abort()
        }
        "log what panics" => info!(field = ?Unprintable, "it"),
        "log without end" => loop {
            info!("again");
        },
        "log without end beside" => {
            for _ in 0..3 {
                thread::spawn(|| {
                    loop {
                        info!("again");
                    }
                });
            }
        }
        "panic" => panic!("it has panicked"),
        "print" => {
            println!("one\r");
            eprintln!("two");
            print!("three\n\nfour, without an end");
            std::io::stdout().flush().unwrap();
        }
        "print a text" => println!("{}", "x".repeat(20 << 10)),
        "print no text" => std::io::stderr().write_all(b"\xff\n").unwrap(),
        "print and abort" => {
            eprint!("last words");
            abort()
        }
        "print without end" => loop {
            println!("again");
        },
        "print without end beside" => drop(thread::spawn(|| {
            loop {
                println!("{}", "again ".repeat(100));
            }
        })),
        "pid" => return Ok(std::process::id().to_string()),
        _ => {}
    }
    Ok(text)
}

/// An event of each level.
fn log() {
    // What it would take is more than the pool asks for.
    let _verbose = Dispatch::new(registry());
    let span = info_span!("of the child", secret = "pony");
    let _entered = span.enter();
    error!(target: "app::orders", order = 7, tenant = "acme", "failed: {}", "no such user");
    warn!("a warning");
    info!(number = 1.5);
    debug!(debugged = ?Some("it"), "details");
    trace!("too much");
}

/// An event of this process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Seen {
    level: String,
    span: Option<&'static str>,
    fields: BTreeMap<&'static str, String>,
}

impl Seen {
    fn of(&self, name: &str) -> &str {
        self.fields.get(name).map_or("", String::as_str)
    }

    fn message(&self) -> &str {
        self.of("message")
    }
}

impl field::Visit for Seen {
    fn record_debug(&mut self, field: &field::Field, value: &dyn fmt::Debug) {
        self.fields.insert(field.name(), format!("{value:?}"));
    }

    fn record_str(&mut self, field: &field::Field, value: &str) {
        self.fields.insert(field.name(), value.to_owned());
    }
}

/// The events of children, up to a number.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<Seen>>>);

impl Log {
    fn install() -> (Self, subscriber::DefaultGuard) {
        let log = Self::default();
        let installed = subscriber::set_default(registry().with(log.clone()));
        (log, installed)
    }

    /// Returns the events so far, but not what the harness of the child prints.
    fn take(&self) -> Vec<Seen> {
        let mut seen = std::mem::take(&mut *self.0.lock().unwrap());
        seen.retain(|seen| seen.message() != "running 1 test" && seen.span.is_some());
        seen
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Log {
    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        if event.metadata().target() != "tower_sentinel::process" {
            return;
        }
        let mut seen = Seen {
            level: event.metadata().level().to_string(),
            span: context.event_span(event).map(|span| span.name()),
            ..Seen::default()
        };
        event.record(&mut seen);
        let mut log = self.0.lock().unwrap();
        if log.len() < 1_000 {
            log.push(seen);
        }
    }
}

type Ends = Outcome<String, ProcessError<String, std::str::Utf8Error>>;

/// Runs a job in a span under a sentinel.
async fn run(pool: &ProcessPool<Decode>, job: &str, limit: Option<Duration>) -> Ends {
    let policy =
        service_fn(|report: Report<(), _, _>| async { Ok::<Ends, Infallible>(report.outcome) });
    let layer = SentinelLayer::with_tag(policy, |_: &String| ());
    let layer = layer.make_span(|()| info_span!("job"));
    let layer = match limit {
        Some(limit) => layer.timeout(limit),
        None => layer.no_timeout(),
    };
    let mut sentinel = layer.layer(pool.clone());
    let outcome = sentinel.ready().await.unwrap().call(job.to_owned());
    outcome.await.unwrap()
}

#[tokio::test]
async fn events_of_a_child_are_in_the_span_of_its_job() {
    let (log, _installed) = Log::install();
    let pool = pool("child").events(Level::DEBUG);
    for _ in 0..2 {
        assert!(run(&pool, "log", None).await.is_completed());
        let seen = log.take();
        let told = seen.iter().map(|seen| {
            assert_eq!(seen.span, Some("job"));
            assert_ne!(seen.of("process.pid"), std::process::id().to_string());
            assert!(seen.of("process.pid").parse::<u32>().is_ok());
            (&*seen.level, seen.message(), seen.of("child.fields"))
        });
        assert_eq!(
            Vec::from_iter(told),
            [
                ("ERROR", "failed: no such user", r#"order=7 tenant="acme""#),
                ("WARN", "a warning", ""),
                ("INFO", "", "number=1.5"),
                ("DEBUG", "details", r#"debugged=Some("it")"#),
            ]
        );
        assert_eq!(seen[0].of("child.target"), "app::orders");
        assert_eq!(seen[1].of("child.target"), module_path!());
        assert!(!seen[1].fields.contains_key("child.fields"));
    }
    // The parent's sentinel says that, with more.
    run(&pool, "panic", None).await;
    assert_eq!(log.take(), []);
}

#[tokio::test]
async fn events_stay_in_the_child_by_default_and_with_a_subscriber_of_its_own() {
    let (log, _installed) = Log::install();
    for pool in [
        pool("child"),
        pool("child_with_a_subscriber").events(Level::TRACE),
    ] {
        assert!(run(&pool, "log", None).await.is_completed());
        assert_eq!(log.take(), []);
    }
}

#[tokio::test]
async fn the_last_event_before_a_crash_arrives() {
    let (log, _installed) = Log::install();
    let pool = pool("child").events(Level::INFO);
    for _ in 0..10 {
        let outcome = run(&pool, "log and abort", None).await;
        let Outcome::Failed(ProcessError::Crashed { .. }) = outcome else {
            panic!("{outcome:?}");
        };
        let seen = log.take();
        assert_eq!((seen.len(), seen[0].message()), (1, "last words"));
    }
}

#[tokio::test]
async fn a_long_event_is_cut_and_one_that_cannot_be_printed_costs_no_job() {
    let (log, _installed) = Log::install();
    let pool = pool("child").events(Level::INFO);
    assert!(run(&pool, "log a text", None).await.is_completed());
    assert_eq!(log.take()[0].message(), "ä".repeat(4 << 10));
    let outcome = run(&pool, "log what panics", None).await;
    assert!(outcome.is_completed(), "{outcome:?}");
    assert_eq!(log.take()[0].message(), "it");
}

#[tokio::test]
async fn a_child_that_tells_without_end_is_stopped() {
    let (log, _installed) = Log::install();
    for job in ["log without end", "print without end"] {
        let pool = pool("child").events(Level::INFO).output(Output::Events);
        let outcome = run(&pool, job, Some(Duration::from_millis(500))).await;
        assert!(
            matches!(&outcome, Outcome::TimedOut(it) if it.stopped()),
            "{outcome:?}"
        );
        assert!(log.take().iter().all(|seen| seen.message() == "again"));
        // The next one has a process of its own.
        assert!(run(&pool, "", None).await.is_completed(), "{job}");
    }
}

#[tokio::test]
async fn threads_that_tell_without_end_keep_no_answer_back() {
    let (log, _installed) = Log::install();
    for job in ["log without end beside", "print without end beside"] {
        let pool = pool("child").events(Level::INFO).output(Output::Events);
        // What it tells between two jobs is no reason to replace it.
        let mut pids = BTreeSet::new();
        for job in ["pid", job, "pid", "pid"] {
            // The runtime sees that there is something to read.
            sleep(Duration::from_millis(5)).await;
            let Outcome::Completed(answer) = run(&pool, job, None).await else {
                panic!("{job}");
            };
            if job == "pid" {
                pids.insert(answer);
            }
        }
        assert_eq!(pids.len(), 1, "{job}");
        // Its thread may not have begun yet.
        while log.take().is_empty() {
            assert!(run(&pool, "pid", None).await.is_completed(), "{job}");
        }
    }
}

/// A subscriber that is slower than any child.
struct Slow;

impl<S: Subscriber> Layer<S> for Slow {
    fn on_event(&self, _: &Event<'_>, _: Context<'_, S>) {
        thread::sleep(Duration::from_micros(100));
    }
}

#[tokio::test]
async fn a_child_that_tells_without_end_is_watched() {
    let _installed = subscriber::set_default(registry().with(Slow));
    let pool = pool("child").events(Level::INFO).output(Output::Events);
    for job in ["log without end", "print without end"] {
        // Its memory is looked at, though there is always something to read.
        let pool = pool.clone().memory(1);
        let outcome = run(&pool, job, None).await;
        let Outcome::Failed(ProcessError::OutOfMemory { limit: 1 }) = outcome else {
            panic!("{outcome:?}");
        };
    }
}

/// A subscriber that panics at each event of a child.
struct Panicking;

impl<S: Subscriber> Layer<S> for Panicking {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        if event.metadata().target() == "tower_sentinel::process" {
            panic!("no more events");
        }
    }
}

#[tokio::test]
async fn a_subscriber_that_panics_costs_no_job() {
    let _installed = subscriber::set_default(registry().with(Panicking));
    let pool = pool("child").events(Level::TRACE).output(Output::Events);
    for job in ["log", "print", "log"] {
        assert!(run(&pool, job, None).await.is_completed());
    }
}

// === output ===

#[tokio::test]
async fn each_line_of_output_is_an_event_in_the_span_of_its_job() {
    let (log, _installed) = Log::install();
    let pool = pool("child").output(Output::Events);
    for _ in 0..20 {
        assert!(run(&pool, "print", None).await.is_completed());
        let seen = log.take();
        let lines = |stream| {
            let seen = seen.iter();
            let seen = seen.filter(move |seen| seen.of("child.stream") == stream);
            Vec::from_iter(seen.map(|seen| {
                assert_eq!(seen.span, Some("job"));
                assert!(seen.of("process.pid").parse::<u32>().is_ok());
                (&*seen.level, seen.message())
            }))
        };
        assert_eq!(
            lines("stdout"),
            [
                ("INFO", "one"),
                ("INFO", "three"),
                ("INFO", ""),
                ("INFO", "four, without an end")
            ]
        );
        assert_eq!(lines("stderr"), [("WARN", "two")]);
    }
}

#[tokio::test]
async fn a_long_line_is_cut_and_other_bytes_than_text_are_replaced() {
    let (log, _installed) = Log::install();
    let pool = pool("child").output(Output::Events);
    assert!(run(&pool, "print a text", None).await.is_completed());
    let seen = log.take();
    assert!(seen.len() >= 3 && seen.iter().all(|seen| seen.message().len() <= 8 << 10));
    let length: usize = seen.iter().map(|seen| seen.message().len()).sum();
    assert_eq!(length, 20 << 10);
    assert!(run(&pool, "print no text", None).await.is_completed());
    assert_eq!(log.take()[0].message(), "\u{fffd}");
}

#[tokio::test]
async fn the_last_words_of_a_process_are_in_the_span_of_its_job() {
    let (log, _installed) = Log::install();
    let pool = pool("child").output(Output::Events);
    for _ in 0..10 {
        assert!(run(&pool, "print and abort", None).await.is_failed());
        let seen = log.take();
        assert_eq!((seen.len(), seen[0].message()), (1, "last words"));
    }
}

#[tokio::test]
async fn a_process_that_cannot_start_says_why() {
    let (log, _installed) = Log::install();
    let mut pool = pool("child")
        .program("/bin/sh")
        .arguments(["-c", "echo no such library >&2; exit 1"])
        .output(Output::Events);
    tokio::select! {
        _ = ServiceExt::<String>::ready(&mut pool) => panic!("it is ready"),
        () = async {
            while !log.0.lock().unwrap().iter().any(|it| it.message() == "no such library") {
                sleep(Duration::from_millis(5)).await;
            }
        } => {}
    }
}

#[tokio::test]
async fn an_answer_and_what_is_printed_before_count_though_the_process_has_ended() {
    let (log, _installed) = Log::install();
    let name = format!("process-ended-{}-{}", std::process::id(), fastrand::u64(..));
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let script = format!(
        r"printf '\000\000\000\001\000' >&0; dd bs=1M count=1 >/dev/null 2>&1;
        echo $$ >{0}.new; mv {0}.new {0}; sleep 0.1;
        echo last words; printf '\000\000\000\013\003\000\000\000\000\000\000\000\001+a' >&0",
        file.display()
    );
    let pool = pool("child").program("/bin/sh").arguments(["-c", &script]);
    let pool = pool.output(Output::Events);
    let answer = tokio::spawn(async move { run(&pool, "job", None).await });
    while !file.exists() {
        sleep(Duration::from_millis(5)).await;
    }
    let pid = fs::read_to_string(&file).unwrap();
    // The pool sees the answer and the end at once, since this keeps it from looking.
    while runs(pid.trim()) {
        thread::sleep(Duration::from_millis(5));
    }
    let outcome = answer.await.unwrap();
    assert!(
        matches!(&outcome, Outcome::Completed(text) if text == "a"),
        "{outcome:?}"
    );
    let seen = log.take();
    assert_eq!((seen.len(), seen[0].message()), (1, "last words"));
    fs::remove_file(file).unwrap();
}
