//! Consumers in their own processes: copies of this test binary that run one of its tests.

use std::{
    env,
    fmt::{Debug, Display},
    fs,
    future::Future,
    io::{Read, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::{sync::oneshot, time::sleep};
use tower::{Service, service_fn};
use tower_sentinel::{
    Outcome, Report, SettlePolicy, Verdict,
    settle::{Settle, SettleError, Settled, decision::Decision},
};

const PREFIX: &str = "TOWER_SENTINEL_TEST_";

/// Returns the setting `name` of this process, if it is a [`Child`].
pub(crate) fn setting(name: &str) -> Option<String> {
    env::var(format!("{PREFIX}{name}")).ok()
}

/// Resolves when the test lets this process end, or is gone itself.
pub(crate) async fn asked_to_end() {
    let (ended, end) = oneshot::channel();
    // A thread, as it could not be stopped on a runtime.
    thread::spawn(move || {
        drop(std::io::stdin().read_to_end(&mut Vec::new()));
        ended.send(()).ok();
    });
    drop(end.await);
}

/// A running copy; killed when it is dropped.
pub(crate) struct Child {
    process: std::process::Child,
    ledger: PathBuf,
    errors: PathBuf,
}

impl Child {
    /// Runs the test `module::test` of this binary, with settings.
    ///
    /// `module` is its `module_path!`.
    pub(crate) fn start(module: &str, test: &str, settings: &[(&str, &str)]) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let nth = COUNT.fetch_add(1, Ordering::Relaxed);
        // Not its id, which a test in another tree of .ci/in-suite may have too.
        let name = format!("{test}-{}-{nth}", now().as_nanos());
        let file =
            |ending: &str| Path::new(env!("CARGO_TARGET_TMPDIR")).join(name.clone() + ending);
        let (ledger, errors) = (file(".ledger"), file(".errors"));
        let module = module.split_once("::").unwrap().1;
        let settings = settings
            .iter()
            .map(|(name, value)| (format!("{PREFIX}{name}"), *value));
        let process = Command::new(env::current_exe().unwrap())
            .args(["--exact", &format!("{module}::{test}")])
            .args(["--include-ignored", "--nocapture"])
            .envs(settings)
            .env(format!("{PREFIX}LEDGER"), &ledger)
            // It would take more time than the jobs that panic.
            .env("RUST_BACKTRACE", "0")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(fs::File::create(&errors).unwrap())
            .spawn()
            .unwrap();
        Self {
            process,
            ledger,
            errors,
        }
    }

    /// Returns the lines that it wrote down as `word`, in this order.
    pub(crate) fn told(&self, word: &str) -> Vec<String> {
        let entries = self.entries().into_iter();
        entries
            .filter(|entry| entry.word == word)
            .map(|entry| entry.text)
            .collect()
    }

    /// Returns all lines that it wrote down, in this order.
    pub(crate) fn entries(&self) -> Vec<Entry> {
        let ledger = fs::read_to_string(&self.ledger).unwrap_or_default();
        // The last line may be half written.
        let lines = ledger
            .split_inclusive('\n')
            .filter_map(|line| line.strip_suffix('\n'));
        lines.filter_map(Entry::parse).collect()
    }

    /// Returns what it wrote to its standard error.
    pub(crate) fn printed(&self) -> String {
        fs::read_to_string(&self.errors).unwrap_or_default()
    }

    /// Waits until it has ended by itself.
    pub(crate) async fn ended(&mut self) {
        while self.process.try_wait().unwrap().is_none() {
            sleep(Duration::from_millis(10)).await;
        }
    }

    /// Kills it with SIGKILL.
    pub(crate) fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// Asks it to end, and waits until it did.
    pub(crate) fn end(&mut self) {
        drop(self.process.stdin.take());
        let status = self.process.wait().unwrap();
        assert!(status.success(), "{status}: {}", self.printed());
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // Fails, and has nothing to do, if it has ended.
        self.process.kill().ok();
        self.process.wait().ok();
        fs::remove_file(&self.ledger).ok();
        fs::remove_file(&self.errors).ok();
    }
}

/// File in which a [`Child`] writes down its actions.
#[derive(Clone, Debug)]
pub(crate) struct Ledger(PathBuf);

impl Ledger {
    /// Returns the one of this process, which is a [`Child`].
    pub(crate) fn own() -> Self {
        Self(setting("LEDGER").unwrap().into())
    }

    /// Writes down a line, with the time.
    pub(crate) fn write(&self, word: &str, text: &str) {
        let file = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.0);
        let line = format!("{} {word} {text}\n", now().as_millis());
        file.unwrap().write_all(line.as_bytes()).unwrap();
    }
}

/// Line of a [`Ledger`].
pub(crate) struct Entry {
    /// Since the Unix epoch, to the millisecond.
    #[allow(dead_code)] // only `clusters` uses it
    pub(crate) time: Duration,
    pub(crate) word: String,
    pub(crate) text: String,
}

impl Entry {
    fn parse(line: &str) -> Option<Self> {
        let (time, line) = line.split_once(' ')?;
        let (word, text) = line.split_once(' ')?;
        Some(Self {
            time: Duration::from_millis(time.parse().ok()?),
            word: word.to_owned(),
            text: text.to_owned(),
        })
    }
}

/// Returns the time since the Unix epoch.
pub(crate) fn now() -> Duration {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.expect("the clock is set")
}

/// Settles as `decision` says, and writes down the results of the jobs that are acked, and the errors of those
/// that are retried or rejected.
pub(crate) fn recording<D, Tag, E>(
    decision: D,
    ledger: Ledger,
) -> impl Service<
    Report<Tag, String, E>,
    Response = Settled,
    Error = SettleError<Tag::Error>,
    Future = impl Future<Output = Result<Settled, SettleError<Tag::Error>>> + Send + 'static,
> + Clone
+ Send
where
    D: Decision<Tag, String, E> + Clone + Send + 'static,
    Tag: Settle<Error: Send, Future: Send> + Debug + Send + 'static,
    E: Display + Send + 'static,
{
    let policy = SettlePolicy::new(decision);
    service_fn(move |report: Report<Tag, String, E>| {
        let ledger = ledger.clone();
        let body = match &report.outcome {
            Outcome::Completed(body) => Some(body.clone()),
            Outcome::Failed(error) => Some(error.to_string()),
            _ => None,
        };
        let settling = policy.clone().call(report);
        async move {
            let settled = settling.await?;
            let word = match settled.verdict {
                Verdict::Ack => "acked",
                Verdict::Retry { .. } => "retried",
                Verdict::Reject => "rejected",
                Verdict::Release { .. } | Verdict::Abandon => return Ok(settled),
            };
            if let Some(body) = body {
                ledger.write(word, &body);
            }
            Ok(settled)
        }
    })
}
