//! `examples/rabbitmq.rs` against the broker at `AMQP_ADDR`, by default 127.0.0.1:5672.
//!
//! What is unacked is asked of `rabbitmqctl`, which wants root or the broker's own user; the
//! node is the one that its environment names.

use std::{
    env,
    io::{BufRead, BufReader, Lines, Read},
    process::{Child, ChildStdout, Command, Stdio},
};

const JOBS: u32 = 200;
const PREFETCH: u32 = 4;

/// Returns a command for the example, built as a user builds it.
fn example() -> Command {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .args(["run", "--quiet", "--example", "rabbitmq"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .stdin(Stdio::null());
    command
}

/// A run of the example, with its standard output.
struct Run {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    queue: String,
}

impl Run {
    /// Starts the example, and waits until it consumes.
    fn start() -> Self {
        let mut child = example()
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
        let queue = words.unwrap_or_else(|| panic!("{first}")).to_owned();
        Self {
            child,
            lines,
            queue,
        }
    }

    /// Waits for its end, and returns the lines that are left.
    fn finish(mut self) -> Vec<String> {
        let lines: Vec<_> = self.lines.by_ref().map(Result::unwrap).collect();
        let errors = errors(&mut self.child);
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}: {lines:#?}{errors}");
        assert_eq!(errors, "", "no noise of the jobs that panic");
        lines
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

/// Returns the ready and the unacked messages of `queue`, if it exists.
fn counts(queue: &str) -> Option<(u32, u32)> {
    let output = Command::new("rabbitmqctl")
        .args(["--quiet", "list_queues", "--no-table-headers"])
        .args(["name", "messages_ready", "messages_unacknowledged"])
        .stdin(Stdio::null())
        .output()
        .expect("`rabbitmqctl` comes with RabbitMQ");
    let stdout = String::from_utf8_lossy(&output.stdout);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stdout}{stderr}");
    stdout.lines().find_map(|line| {
        let mut columns = line.split('\t');
        (columns.next()? == queue).then(|| {
            [(); 2]
                .map(|()| columns.next().unwrap().parse().unwrap())
                .into()
        })
    })
}

/// What the example prints when every job has its answer.
const LAST_LINES: [&str; 6] = [
    "  180 completed: Acked",
    "   60 failed: GivenBack",
    "   20 failed: DeadLettered",
    "   20 panicked: GivenBack",
    "   20 timed_out: GivenBack",
    "the broker counts: ready = 0, unacked = 0, dead-lettered = 20; poison jobs = 20",
];

#[test]
fn the_broker_counts_what_the_example_holds_and_nothing_once_it_is_done() {
    let run = Run::start();
    let (ready, unacked) = loop {
        let (ready, unacked) = counts(&run.queue).expect("asked while the example runs");
        assert!(unacked <= PREFETCH, "{unacked}");
        // It may be none in the moment between the answers and the next jobs.
        if unacked > 0 {
            break (ready, unacked);
        }
    };
    assert!(ready > 0 && ready + unacked <= JOBS, "{ready} + {unacked}");

    let names = [
        run.queue.clone(),
        run.queue.replace(".jobs", ".dead-letters"),
    ];
    assert_eq!(run.finish(), LAST_LINES);
    for name in names {
        assert_eq!(counts(&name), None, "{name} is deleted");
    }
}

#[test]
fn two_runs_at_once_do_not_disturb_each_other() {
    let runs = [Run::start(), Run::start()];
    assert_ne!(runs[0].queue, runs[1].queue);
    for run in runs {
        assert_eq!(run.finish(), LAST_LINES);
    }
}

#[test]
fn a_run_that_is_killed_leaves_no_queue() {
    let run = Run::start();
    let queue = run.queue.clone();
    assert_ne!(counts(&queue), None);
    drop(run);
    // The broker notices that the connection is gone in a moment of its own.
    let gone = (0..20).any(|_| counts(&queue).is_none());
    assert!(gone, "{queue}");
}

#[test]
fn a_broker_that_is_out_of_reach_is_one_line_that_names_the_address() {
    // Port 1 is refused; the password is nobody's business.
    let output = example()
        .env("AMQP_ADDR", "amqp://someone:secret@127.0.0.1:1/%2f")
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(
        stderr.starts_with("error: no broker at amqp://127.0.0.1:1/%2f: "),
        "{stderr}"
    );
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "");
}
