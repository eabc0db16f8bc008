//! The example `dashboard` from outside: its page in a browser, its text for Prometheus, and the
//! Grafana dashboard for that.
#![allow(clippy::unwrap_used)]

use std::{
    collections::BTreeSet,
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    panic,
    path::Path,
    process::Stdio,
    sync::LazyLock,
    thread,
    time::Duration,
};

use serde_json::Value;
use tokio::{net::TcpListener, process::Command, runtime::Runtime, time::timeout};
use tower_sentinel::outcome::OutcomeKind;

#[allow(dead_code, unreachable_pub)]
#[path = "../../examples/dashboard.rs"]
mod dashboard;

const KINDS: [OutcomeKind; 5] = [
    OutcomeKind::Completed,
    OutcomeKind::Failed,
    OutcomeKind::Panicked,
    OutcomeKind::TimedOut,
    OutcomeKind::Cancelled,
];

/// The address of the example, which runs until the process ends.
static ADDRESS: LazyLock<SocketAddr> = LazyLock::new(|| {
    // Intended panics need not be printed.
    let next = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        let location = info.location();
        if !location.is_some_and(|it| it.file().ends_with("examples/dashboard.rs")) {
            next(info);
        }
    }));
    let runtime = Runtime::new().unwrap();
    let (listener, app) = runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        (listener, dashboard::app().unwrap())
    });
    let address = listener.local_addr().unwrap();
    let serve = async { axum::serve(listener, app).await };
    thread::spawn(move || runtime.block_on(serve).unwrap());
    address
});

fn get(path: &str) -> String {
    let mut stream = TcpStream::connect(*ADDRESS).unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).unwrap();
    assert!(response.starts_with("HTTP/1.1 200"), "{path}: {response}");
    response.split_once("\r\n\r\n").unwrap().1.to_owned()
}

/// Waits until each outcome has occurred.
fn warm_up() {
    for _ in 0..300 {
        let state: Value = serde_json::from_str(&get("/state")).unwrap();
        let outcomes = state["outcomes"].as_array().unwrap();
        let count = |row: &Value| row["jobs"].as_f64().unwrap();
        let is_warm = outcomes.len() == KINDS.len() && outcomes.iter().all(|it| count(it) > 0.0);
        // A line needs two points.
        if is_warm && state["points"].as_array().unwrap().len() >= 2 {
            return;
        }
        thread::sleep(Duration::from_millis(100));
    }
    panic!("the load has not every outcome: {}", get("/state"));
}

// === the page ===

/// Returns the document that the page has become after 3 s of the browser's own time.
async fn browse() -> String {
    let folder = format!("chromium-{}", std::process::id());
    let profile = Path::new(env!("CARGO_TARGET_TMPDIR")).join(folder);
    let browser = Command::new("chromium")
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"])
        .arg("--virtual-time-budget=3000")
        .arg(format!("--user-data-dir={}", profile.display()))
        .arg(format!("http://{}/", *ADDRESS))
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = match timeout(Duration::from_secs(60), browser).await {
        Ok(Err(error)) if error.kind() == ErrorKind::NotFound => {
            panic!("this test needs a browser: apt-get install chromium")
        }
        result => result.expect("the browser takes too long").unwrap(),
    };
    std::fs::remove_dir_all(profile).ok();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {errors}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

/// Returns the text of the element with this id.
fn text<'a>(document: &'a str, id: &str) -> &'a str {
    let (_, element) = document
        .split_once(&format!(" id=\"{id}\""))
        .unwrap_or_else(|| panic!("no {id} in {document}"));
    let (_, text) = element.split_once('>').unwrap();
    text.split_once('<').unwrap().0
}

fn number(document: &str, id: &str) -> f64 {
    let text = text(document, id);
    let (number, unit) = text.split_once(' ').unwrap_or((text, ""));
    let number: f64 = number
        .parse()
        .unwrap_or_else(|_| panic!("{id} is {text:?}"));
    match unit {
        "" | "ms" => number,
        "s" => 1_000.0 * number,
        _ => panic!("{id} is {text:?}"),
    }
}

/// Returns the places that a line of a plot, or the border of an area, goes through.
fn places(document: &str, id: &str) -> Vec<(f64, f64)> {
    let (_, element) = document
        .split_once(&format!(" id=\"line-{id}\""))
        .unwrap_or_else(|| panic!("no line {id} in {document}"));
    let (_, path) = element.split_once(" d=\"").unwrap();
    let (path, _) = path.split_once('"').unwrap();
    let places = path.trim_end_matches('Z').split(['M', 'L']).skip(1);
    let place = |it: &str| {
        let (x, y) = it.split_once(' ')?;
        Some((x.parse().ok()?, y.parse().ok()?))
    };
    let places = places.map(|it| place(it).unwrap_or_else(|| panic!("{it:?} in {id}")));
    places.collect()
}

#[tokio::test]
async fn the_page_shows_in_a_browser_what_becomes_of_jobs() {
    tokio::task::spawn_blocking(warm_up).await.unwrap();
    let document = browse().await;

    assert!(number(&document, "throughput") > 0.0);
    for kind in KINDS {
        assert!(number(&document, kind.as_str()) > 0.0, "{kind}");
        let p50 = number(&document, &format!("{kind}-p50"));
        let p99 = number(&document, &format!("{kind}-p99"));
        assert!(0.0 < p50 && p50 <= p99, "{kind}: {p50}, {p99}");
    }
    // The limit of the example's sentinel.
    assert!(number(&document, "timed_out-p50") >= 49.0);
    for id in ["ready", "delayed"] {
        assert!(number(&document, id) >= 0.0, "{id}");
    }
    for (id, value) in [("connected", 1.0), ("reconnects", 0.0), ("stalled", 0.0)] {
        assert_eq!(number(&document, id), value, "{id}");
    }
    let state = text(&document, "consumer");
    let states = ["consuming", "saturated", "paused by the service"];
    assert!(states.contains(&state), "{state}");

    let rates = KINDS.map(|kind| format!("{kind}-rate"));
    let lines = [
        "p50",
        "p99",
        "running",
        "unsettled",
        "abandoned",
        "queue-p50",
        "queue-p99",
    ];
    for id in rates.iter().map(|it| &**it).chain(lines) {
        let places = places(&document, id);
        assert!(places.len() >= 2, "{id}: {places:?}");
        // Within its plot, and not all at one time.
        let is_within =
            |(x, y): &(f64, f64)| (0.0..1_000.0).contains(x) && (0.0..300.0).contains(y);
        assert!(places.iter().all(is_within), "{id}: {places:?}");
        assert!(places[0].0 < places[1].0, "{id}: {places:?}");
        // No job ends while the worker pauses.
        let now = format!("now-{id}");
        let is_known = text(&document, &now) != "–";
        assert!(!is_known || number(&document, &now) >= 0.0, "{id}");
    }
    let height = |id| places(&document, id).last().unwrap().1;
    // The greater value is above.
    assert!(height("p99") <= height("p50"));
    assert!(height("queue-p99") <= height("queue-p50"));
    let state = text(&document, "intensity");
    assert!(["running", "probing", "paused"].contains(&state), "{state}");
    assert!(document.contains("id=\"lost\" hidden"), "{document}");

    // If the page says that a job panicked, one does.
    let message = text(&document, "panic-0");
    let location = text(&document, "location-0");
    let (file, place) = location.split_once(".rs:").unwrap();
    assert!(file.ends_with("examples/dashboard"), "{location}");
    let line = place.split_once(':').unwrap().0.parse::<usize>().unwrap();
    let mut source = include_str!("../../examples/dashboard.rs").lines();
    let line = source.nth(line - 1).unwrap();
    let panics = match message.ends_with("is poison") {
        true => "panic!(\"job {job} is poison\")",
        false => ".expect(\"a number in the body\")",
    };
    assert!(line.contains(panics), "{message}: {location}: {line}");
}

// === Grafana ===

/// Returns each string that is called `key` in `json`.
fn strings<'a>(json: &'a Value, key: &str) -> Vec<&'a str> {
    match json {
        Value::Array(items) => items.iter().flat_map(|it| strings(it, key)).collect(),
        Value::Object(entries) => {
            let inner = entries.values().flat_map(|it| strings(it, key));
            let own = entries.get(key).and_then(Value::as_str);
            own.into_iter().chain(inner).collect()
        }
        _ => Vec::new(),
    }
}

/// Removes the text between `open` and `close`, and returns it too.
fn cut<'a>(text: &'a str, open: &str, close: char) -> (String, Vec<&'a str>) {
    let mut parts = text.split(open);
    let mut rest = parts.next().unwrap().to_owned();
    let mut cut = Vec::new();
    for part in parts {
        let (inner, after) = part.split_once(close).expect(text);
        cut.push(inner);
        rest.push(' ');
        rest.push_str(after);
    }
    (rest, cut)
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    let is_part = |it: char| it.is_ascii_alphanumeric() || it == '_' || it == ':';
    text.split(move |it| !is_part(it))
        .filter(|it| !it.is_empty())
}

/// Returns the names of the metrics in a query, and of the labels that it groups by.
fn names(query: &str) -> (Vec<String>, Vec<String>) {
    let (query, _) = cut(query, "{", '}');
    let (query, _) = cut(&query, "[", ']');
    let (query, groups) = cut(&query, "by (", ')');
    let labels = groups.into_iter().flat_map(words).map(ToOwned::to_owned);
    let labels = labels.collect();
    const FUNCTIONS: [&str; 7] = [
        "histogram_quantile",
        "increase",
        "max",
        "or",
        "rate",
        "sum",
        "vector",
    ];
    let is_number = |it: &str| it.starts_with(|it: char| it.is_ascii_digit());
    let metrics = words(&query).filter(|it| !FUNCTIONS.contains(it) && !is_number(it));
    (metrics.map(ToOwned::to_owned).collect(), labels)
}

#[test]
fn names_are_found_in_a_query() {
    let query = r#"sum by (a, b) (rate(x_sum{c="d"}[5m])) / max(y) + 0.5 * z{e=~"f|g"}"#;
    let (metrics, labels) = names(query);
    assert_eq!(metrics, ["x_sum", "y", "z"]);
    assert_eq!(labels, ["a", "b"]);
}

#[test]
fn grafana_is_asked_for_all_that_there_is_and_nothing_else() {
    warm_up();
    let text = get("/metrics");
    let samples = text.lines().filter(|it| !it.starts_with('#'));
    let exported: BTreeSet<&str> = samples.filter_map(|it| words(it).next()).collect();
    // Ours, whether or not they have a sample.
    let families = text.lines().filter_map(|it| it.strip_prefix("# TYPE "));
    let families: BTreeSet<&str> = families.filter_map(|it| words(it).next()).collect();
    assert_eq!(families.len(), 12, "{families:?}");

    let grafana = include_str!("../../examples/grafana.json");
    let grafana: Value = serde_json::from_str(grafana).unwrap();
    let queries = strings(&grafana, "expr");
    let mut asked = BTreeSet::new();
    for query in queries {
        let (metrics, labels) = names(query);
        assert!(!metrics.is_empty(), "{query}");
        for name in metrics {
            // No consumer of the example is a zombie.
            let is_rare = name == "tower_sentinel_consumer_stalled";
            let is_exported = exported.contains(&*name);
            assert!(is_exported || is_rare, "{name} in {query}: {text}");
            let parts = ["_bucket", "_sum", "_count"].into_iter();
            let family = parts.filter_map(|it| name.strip_suffix(it)).next();
            asked.insert(family.unwrap_or(&name).to_owned());
        }
        for label in labels {
            // Prometheus adds the one, and a user the other.
            let is_foreign = ["instance", "messaging_destination_name"].contains(&&*label);
            let is_exported = text.contains(&format!("{label}=\""));
            assert!(is_foreign || is_exported, "{label} in {query}: {text}");
        }
    }
    for family in families {
        assert!(asked.contains(family), "Grafana is not asked for {family}");
    }
}
