//! The worker, and its side in a test.

use std::{
    env, fmt,
    future::pending,
    io::{BufRead, BufReader, Lines, Write},
    mem,
    path::Path,
    process::{Child, ChildStdout, Command, ExitStatus, Stdio, abort, exit},
    str::Utf8Error,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::Duration,
};

use rustix::{
    process::{Signal, getpid, kill_process},
    time::{ClockId, clock_gettime},
};
use tokio::runtime::{Builder, Handle, Runtime};
use tower::{Service, service_fn};
use tower_sentinel::{
    Consumer, Outcome, SentinelLayer, SettlePolicy, Verdict,
    broker::memory::{Broker, Delivery, DeliveryTag},
    process::{ProcessPool, Request, serve},
    settle::Settle,
};

/// Number of good jobs beside the bad one.
pub(crate) const GOOD: usize = 3;

/// Time limit of a job that does not end by itself: it has begun by then, also on a busy machine.
const LIMIT: Duration = Duration::from_millis(700);

const MIB: usize = 1 << 20;

/// Columns of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Isolation {
    Task,
    Runtime,
    Process,
}

pub(crate) const ALL: [Isolation; 3] = [Isolation::Task, Isolation::Runtime, Isolation::Process];

/// Number of jobs that were run in this process.
static JOBS: AtomicU64 = AtomicU64::new(0);

/// Whether a job blocks a thread of this process.
static IS_BLOCKED: AtomicBool = AtomicBool::new(false);

/// A line for the test. The harness writes others.
fn tell(text: impl fmt::Display) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "\n@ {text}").unwrap();
    out.flush().unwrap();
}

// === in the worker ===

#[test]
#[ignore = "it is a process that the other tests start"]
fn worker() {
    serve(
        service_fn(|request: Request| async move { job(request.as_ref()).await }),
        |result: Result<String, String>| result.unwrap_or_else(|error| format!("-{error}")).into(),
    );
    let (Ok(isolation), Ok(bad)) = (env::var("ISOLATION"), env::var("BAD")) else {
        return;
    };
    let threads = env::var("THREADS").map_or(2, |threads| threads.parse().unwrap());
    let runtime = runtime(threads);
    let in_worker =
        service_fn(|delivery: Delivery<String>| async move { job(delivery.as_ref()).await });
    match &*isolation {
        "Task" => {
            wake(runtime.handle().clone());
            runtime.block_on(work(bad, in_worker, None));
        }
        "Runtime" => {
            let jobs = runtime.handle().clone();
            Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap()
                .block_on(work(bad, in_worker, Some(jobs)));
        }
        _ => {
            let decode = |bytes: &[u8]| -> Result<Result<String, String>, Utf8Error> {
                let text = std::str::from_utf8(bytes)?;
                Ok(match text.strip_prefix('-') {
                    Some(error) => Err(error.to_owned()),
                    None => Ok(text.to_owned()),
                })
            };
            let mut pool = ProcessPool::new(2, decode)
                .arguments(arguments())
                .memory(256 * MIB as u64);
            if let Ok(program) = env::var("PROGRAM") {
                pool = pool.program(program);
            }
            match &*bad {
                "leak" => pool = pool.max_jobs(1),
                "burn without end" => pool = pool.cpu_time(Duration::from_secs(1)),
                _ => {}
            }
            runtime.block_on(work(bad, pool, None));
        }
    }
    tell(format_args!("resident {}", resident()));
    tell(format_args!("jobs {}", JOBS.load(Ordering::SeqCst)));
    // The test frees it.
    while IS_BLOCKED.load(Ordering::SeqCst) {
        thread::sleep(Duration::from_millis(1));
    }
    runtime.shutdown_background();
}

fn runtime(threads: usize) -> Runtime {
    let mut builder = Builder::new_multi_thread();
    builder
        .worker_threads(threads)
        .enable_all()
        .build()
        .unwrap()
}

/// Wakes a runtime again and again, so that a free thread looks at the timers when another one is blocked.
fn wake(runtime: Handle) {
    thread::spawn(move || {
        loop {
            drop(runtime.spawn(async {}));
            thread::sleep(Duration::from_millis(5));
        }
    });
}

/// Runs the jobs until each is settled.
async fn work<S, E>(bad: String, service: S, jobs: Option<Handle>)
where
    S: Service<Delivery<String>, Response = String, Error = E> + Clone + Send + 'static,
    S::Future: Send + 'static,
    E: fmt::Debug + fmt::Display + Send + Sync + 'static,
{
    let limit = match bad.starts_with("block") || ["hang", "fork"].contains(&&*bad) {
        true => LIMIT,
        false => Duration::from_secs(100),
    };
    let queue = Broker::new().queue("jobs").declare();
    queue.publish(bad);
    for _ in 0..GOOD {
        queue.publish("good".to_owned());
    }
    let decide = |tag: &DeliveryTag<String>, outcome: &Outcome<String, E>| {
        let is_bad = tag
            .messaging()
            .is_some_and(|it| it.message_id.as_deref() == Some("1"));
        if !is_bad && !outcome.is_completed() {
            // It has waited for the bad one.
            tell("delayed");
            return Verdict::release();
        }
        let text = format!("outcome {outcome:?}").replace('\n', " ");
        tell(format_args!("{text} stopped={}", outcome.is_stopped()));
        Verdict::Ack
    };
    let mut layer = SentinelLayer::new(SettlePolicy::new(decide))
        .timeout(limit)
        .stop_wait(Duration::from_millis(100));
    if let Some(jobs) = jobs {
        layer = layer.runtime(jobs);
    }
    let emptied = queue.clone();
    Consumer::new(queue.subscribe(1 + GOOD).unwrap(), service)
        .sentinel(layer)
        .with_graceful_shutdown(async move { emptied.emptied().await })
        .run()
        .await
        .unwrap();
}

/// Panics when it is dropped.
struct Trap;

impl Drop for Trap {
    fn drop(&mut self) {
        panic!("the second panic");
    }
}

async fn job(bytes: &[u8]) -> Result<String, String> {
    JOBS.fetch_add(1, Ordering::SeqCst);
    let text = String::from_utf8_lossy(bytes).into_owned();
    match &*text {
        "fail" => return Err("it has failed".to_owned()),
        "panic" => panic!("it has panicked"),
        "hang" => pending().await,
        "abort" => abort(),
        "segv" => loop {
            // The handler of Rust's standard library swallows the first one that is no fault.
            kill_process(getpid(), Signal::SEGV).unwrap();
        },
        "overflow" => return Ok(overflow(0).to_string()),
        "panic twice" => {
            let _trap = Trap;
            panic!("the first panic");
        }
        "exit" => exit(3),
        // All of the address space of the worker. Nothing is written, so the machine has its memory.
        "reserve" => {
            let mut kept = Vec::new();
            loop {
                kept.push(std::hint::black_box(Vec::<u8>::with_capacity(16 * MIB)));
            }
        }
        "allocate" => {
            let mut kept = Vec::new();
            // Less than a worker may have, if nobody stops it.
            while kept.len() < 1_000 {
                kept.push(vec![1_u8; MIB]);
                thread::sleep(Duration::from_millis(1));
            }
        }
        "fork" => {
            let sleeper = sleeper();
            tell(format_args!("sleeper {sleeper}"));
            pending::<()>().await;
        }
        "burn" => {
            let used = || Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap();
            while used() < Duration::from_millis(1_500) {
                std::hint::spin_loop();
            }
        }
        // The system counts ticks, and only some of those of a busy machine.
        "burn without end" => loop {
            std::hint::spin_loop();
        },
        "leak" => {
            mem::forget(vec![1_u8; 64 * MIB]);
            tell(format_args!("leaked in {}", getpid().as_raw_nonzero()));
        }
        text if text.starts_with("block ") => {
            IS_BLOCKED.store(true, Ordering::SeqCst);
            tell("blocked");
            let until = Path::new(text.trim_start_matches("block "));
            while !until.exists() {
                thread::sleep(Duration::from_millis(1));
            }
            tell("no longer blocked");
            IS_BLOCKED.store(false, Ordering::SeqCst);
            // It is stopped at its next await, if it is not stopped before.
            pending::<()>().await;
        }
        _ => {}
    }
    Ok(text)
}

#[expect(unconditional_recursion, reason = "its end is the point")]
fn overflow(depth: u64) -> u64 {
    let kept = std::hint::black_box([depth; 1_000]);
    overflow(depth + 1) + kept[0]
}

fn sleeper() -> u32 {
    // It holds no pipe of the test.
    let mut sleeper = Command::new("sleep");
    sleeper
        .arg("1000")
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    sleeper.spawn().unwrap().id()
}

/// Returns the number of bytes that this process has in memory.
fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: usize = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * rustix::param::page_size()
}

// === in the test ===

fn arguments() -> [&'static str; 4] {
    [
        "--exact",
        "worker::worker",
        "--include-ignored",
        "--nocapture",
    ]
}

/// A worker that runs.
pub(crate) struct Worker {
    process: Child,
    lines: Lines<BufReader<ChildStdout>>,
    seen: Vec<String>,
}

/// The end of a worker.
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) lines: Vec<String>,
}

impl Worker {
    /// Starts a worker with some more variables.
    pub(crate) fn start(isolation: Isolation, bad: &str, variables: &[(&str, &str)]) -> Self {
        // A job that uses all memory is to use all of its own.
        let mut process = Command::new("/bin/sh")
            .args(["-c", "ulimit -c 0; ulimit -v 1500000; exec \"$0\" \"$@\""])
            .arg(env::current_exe().unwrap())
            .args(arguments())
            .env("ISOLATION", format!("{isolation:?}"))
            .env("BAD", bad)
            .env_remove("RUST_BACKTRACE")
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        Self {
            process,
            lines,
            seen: Vec::new(),
        }
    }

    /// Waits for a line that starts so, and returns its rest.
    pub(crate) fn told(&mut self, start: &str) -> String {
        loop {
            let Some(line) = self.next() else {
                panic!("no {start:?}: {:?}", self.seen);
            };
            if let Some(rest) = line.strip_prefix(start) {
                return rest.trim().to_owned();
            }
        }
    }

    pub(crate) fn next(&mut self) -> Option<String> {
        loop {
            let line = self.lines.next()?.unwrap();
            if let Some(line) = line.strip_prefix("@ ") {
                self.seen.push(line.to_owned());
                return Some(line.to_owned());
            }
        }
    }

    /// Waits for its end.
    pub(crate) fn end(mut self) -> Ended {
        while self.next().is_some() {}
        Ended {
            status: self.process.wait().unwrap(),
            lines: mem::take(&mut self.seen),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

impl Ended {
    /// Returns the outcomes of the bad job, after a look at the others.
    pub(crate) fn bad(&self) -> Vec<&str> {
        assert!(self.status.success(), "{:?} {:?}", self.status, self.lines);
        let outcomes = self
            .lines
            .iter()
            .filter_map(|line| line.strip_prefix("outcome "));
        let (good, bad): (Vec<_>, Vec<_>) =
            outcomes.partition(|outcome| outcome.starts_with("Completed(\"good\")"));
        assert_eq!(good.len(), GOOD, "{:?}", self.lines);
        bad
    }

    /// Returns the rest of a line.
    pub(crate) fn line(&self, start: &str) -> &str {
        let mut lines = self.lines.iter();
        lines
            .find_map(|line| line.strip_prefix(start))
            .unwrap()
            .trim()
    }
}

/// Runs a worker to its end.
pub(crate) fn run(isolation: Isolation, bad: &str) -> Ended {
    Worker::start(isolation, bad, &[]).end()
}
