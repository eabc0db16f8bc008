//! The examples that need a broker, each with a private server.

use std::{
    env,
    io::{BufRead, BufReader, Lines, Read},
    process::{Child, ChildStdout, Command, Stdio},
};

use rustix::process::{Pid, Signal, kill_process};

mod nats;
mod rabbitmq;
mod redis;
mod redrive;
mod worker;

const JOBS: u64 = 200;
const PREFETCH: u64 = 4;

/// Returns a command for the example, built as a user builds it.
///
/// In the tree of a suite there is no compiler, so there it must have been built before.
fn example(name: &str) -> Command {
    if env::var_os("IN_SUITE").is_some() {
        return built(name);
    }
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .args(["run", "--quiet", "--all-features", "--example", name, "--"])
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .stdin(Stdio::null());
    // Cargo sets them for a test. Build scripts that read them, such as ring's, would run again, and so would the
    // compiler, on the program of this very test.
    let of_cargo =
        |name: &str| name.starts_with("CARGO_MANIFEST_") || name.starts_with("CARGO_PKG_");
    for (name, _) in env::vars().filter(|(name, _)| of_cargo(name)) {
        command.env_remove(name);
    }
    command
}

/// Returns a command for the example, which is built.
fn built(name: &str) -> Command {
    let test = env::current_exe().unwrap();
    let built = test.ancestors().nth(2).unwrap();
    let built = built.join("examples").join(name);
    assert!(built.exists(), "`cargo build --all-features --examples`");
    let mut command = Command::new(built);
    command.stdin(Stdio::null());
    command
}

/// A run of one of the examples that have their program in common, with its standard output.
struct Run {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    /// The queue, or the stream, that it works on.
    name: String,
}

impl Run {
    /// Starts the example, and waits until it consumes.
    fn start(mut example: Command) -> Self {
        let mut child = example
            .env("PREFETCH", PREFETCH.to_string())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let Some(first) = lines.next() else {
            panic!("no output: {}", errors(&mut child));
        };
        let first = first.unwrap();
        let words = first
            .strip_prefix(&format!("consuming {JOBS} jobs from "))
            .and_then(|words| words.strip_suffix(&format!(", {PREFETCH} at a time")));
        let name = words.unwrap_or_else(|| panic!("{first}")).to_owned();
        Self { child, lines, name }
    }

    /// Calls `ask` while the run stands still, since a slow answer could come after its end. Jobs may pass their limit
    /// then.
    fn paused<T>(&self, ask: impl FnOnce() -> T) -> T {
        // Invariant: the child is not waited for, so its id is its own.
        let pid = Pid::from_child(&self.child);
        kill_process(pid, Signal::STOP).unwrap();
        let answer = ask();
        kill_process(pid, Signal::CONT).unwrap();
        answer
    }

    /// Asks for the ready and the unacked jobs until some are unacked.
    fn holds_no_more_than_its_prefetch(&self, mut counts: impl FnMut(&str) -> (u64, u64)) {
        let (ready, unacked) = loop {
            let (ready, unacked) = counts(&self.name);
            assert!(unacked <= PREFETCH, "{unacked}");
            // It may be zero in the moment between the settlements and the next jobs.
            if unacked > 0 {
                break (ready, unacked);
            }
        };
        // A job that is published anew for its retry is there twice for a moment.
        let most = JOBS + PREFETCH;
        assert!(ready > 0 && ready + unacked <= most, "{ready} + {unacked}");
    }

    /// Waits for its end, and compares the lines that are left.
    fn settles_every_job(mut self) {
        let lines: Vec<_> = self.lines.by_ref().map(Result::unwrap).collect();
        let errors = errors(&mut self.child);
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}: {lines:#?}{errors}");
        assert_eq!(errors, "", "no noise of the jobs that panic");
        assert_eq!(lines, LAST_LINES);
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // Fails, and has nothing to do, if it has ended.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn errors(child: &mut Child) -> String {
    let mut errors = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut errors)
        .unwrap();
    errors
}

/// Last line of an example when every job is settled.
const LAST_LINES: [&str; 6] = [
    "  180 completed: ack",
    "   20 failed: reject",
    "   60 failed: retry",
    "   20 panicked: retry",
    "   20 timed_out: retry",
    "the broker counts: ready = 0, unacked = 0, dead-lettered = 20; poison jobs = 20",
];

/// Checks the output of `example` for an address with a password at which nobody listens.
fn fails_in_one_line(mut example: Command, expected: &str) {
    let output = example.output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.starts_with(expected), "{stderr}");
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "");
}
