//! The children, and a pool of them.

use std::{
    future::pending,
    io::Write,
    net::Shutdown,
    process::{Command, abort, exit},
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::Duration,
};

use rustix::{
    process::{Signal, getpid, getpriority_process, kill_process},
    time::{ClockId, clock_gettime},
};
use tokio::time::timeout;
use tower::service_fn;
use tower_sentinel::{
    cancel::{Cancellation, time_left},
    cancelled, panic_hook,
    process::{ProcessError, ProcessPool, Request, serve},
};

use crate::socket::{holder, socket};

/// Result of a job as a text: `Ok` with a `+`, `Err` with a `-` in front.
pub(crate) type Decode = fn(&[u8]) -> Result<Result<String, String>, std::str::Utf8Error>;

pub(crate) type Answer = Result<String, ProcessError<String, std::str::Utf8Error>>;

/// Reads a result.
pub(crate) fn decode(bytes: &[u8]) -> Result<Result<String, String>, std::str::Utf8Error> {
    let text = std::str::from_utf8(bytes)?;
    let (sign, text) = text.split_at(1);
    Ok(match sign {
        "+" => Ok(text.to_owned()),
        _ => Err(text.to_owned()),
    })
}

/// Writes a result.
pub(crate) fn encode<E: std::fmt::Display>(result: Result<String, E>) -> Vec<u8> {
    match result {
        Ok(text) => format!("+{text}").into_bytes(),
        Err(error) => format!("-{error}").into_bytes(),
    }
}

/// Returns the arguments by which this program runs one ignored test.
pub(crate) fn this_test(module: &str, test: &str) -> [String; 4] {
    let module = module.split_once("::").unwrap().1;
    [
        "--exact".to_owned(),
        format!("{module}::{test}"),
        "--include-ignored".to_owned(),
        "--nocapture".to_owned(),
    ]
}

/// A pool of children that do what the text of a job says.
pub(crate) fn pool(processes: usize) -> ProcessPool<Decode> {
    ProcessPool::new(processes, decode as Decode).arguments(this_test(module_path!(), "child"))
}

#[test]
#[ignore = "it is a process that the other tests start"]
fn child() {
    panic_hook::install();
    serve(service_fn(job), |result| match result {
        // No text at all.
        Err(text) if text == "undecodable" => vec![0xff, 0xff],
        result => encode(result),
    });
}

/// Number of jobs so far.
static JOBS: AtomicU64 = AtomicU64::new(0);

async fn job(request: Request) -> Result<String, String> {
    let number = JOBS.fetch_add(1, Ordering::Relaxed) + 1;
    let text = String::from_utf8_lossy(request.as_ref()).into_owned();
    let mut job = text.as_str();
    // A file that it makes when it has begun.
    if let Some((file, rest)) = job
        .strip_prefix("at ")
        .and_then(|rest| rest.split_once(' '))
    {
        std::fs::write(file, "").unwrap();
        job = rest;
    }
    // It does as it likes when it is told to stop.
    if let Some(rest) = job.strip_prefix("told ") {
        cancelled().await;
        job = rest;
    }
    if let Some((name, number)) = job.split_once(' ').and_then(|(name, number)| {
        let number: u64 = number.parse().ok()?;
        Some((name, number))
    }) {
        match name {
            // So many MiB, for ever.
            "leak" => {
                std::mem::forget(vec![1_u8; (number as usize) << 20]);
                return Ok(getpid().as_raw_nonzero().to_string());
            }
            // So many milliseconds of CPU time.
            "burn" => {
                let used = || {
                    let used = clock_gettime(ClockId::ProcessCPUTime);
                    Duration::try_from(used).unwrap()
                };
                let until = used() + Duration::from_millis(number);
                while used() < until {
                    std::hint::spin_loop();
                }
                return Ok(getpid().as_raw_nonzero().to_string());
            }
            _ => {}
        }
    }
    match job {
        "pid" => Ok(getpid().as_raw_nonzero().to_string()),
        "fail" => Err("it has failed".to_owned()),
        "undecodable" => Err(text),
        "panic" => panic!("it has panicked"),
        "abort" => abort(),
        // The handler of Rust's standard library swallows the first one that is no fault.
        "segv" => loop {
            kill_process(getpid(), Signal::SEGV).unwrap();
        },
        "overflow" => Ok(overflow(0).to_string()),
        "allocate" => {
            let mut kept = Vec::new();
            // Not all of the machine's, if nobody stops it.
            while kept.len() < 2_000 {
                kept.push(vec![1_u8; 1 << 20]);
                thread::sleep(Duration::from_millis(1));
            }
            Ok(kept.len().to_string())
        }
        // More than the address space has.
        "reserve" => Ok(Vec::<u8>::with_capacity(4 << 30).capacity().to_string()),
        "open" => {
            let mut files = Vec::new();
            let error = loop {
                match std::fs::File::open("/dev/null") {
                    Ok(file) => files.push(file),
                    Err(error) => break error,
                }
            };
            Err(format!("{} {error}", files.len()))
        }
        "nice" => Ok(getpriority_process(None).unwrap().to_string()),
        "exit 0" => exit(0),
        "exit 3" => exit(3),
        // It inherits the variable by which a child knows that it is one.
        "start the program again" => {
            let mut program = Command::new(std::env::current_exe().unwrap());
            let ended = program.args(this_test(module_path!(), "child")).status();
            Ok(ended.unwrap().success().to_string())
        }
        "spin" => loop {
            std::hint::spin_loop();
        },
        "spin on all threads" => {
            for _ in 0..8 {
                tokio::spawn(async {
                    loop {
                        std::hint::spin_loop();
                    }
                });
            }
            loop {
                std::hint::spin_loop();
            }
        }
        "block" => loop {
            thread::sleep(Duration::from_secs(1_000));
        },
        "wait" => pending().await,
        "stop" => {
            cancelled().await;
            Ok("told to stop".to_owned())
        }
        "is told" => {
            let told = timeout(Duration::from_millis(5), cancelled()).await;
            Ok(told.is_ok().to_string())
        }
        // It tells the test that it has begun.
        text if text.starts_with("begin ") => {
            std::fs::write(text.trim_start_matches("begin "), "").unwrap();
            loop {
                std::hint::spin_loop();
            }
        }
        // It blocks its thread all the time.
        text if text.starts_with("heed ") => {
            std::fs::write(text.trim_start_matches("heed "), "").unwrap();
            let stop = Cancellation::current();
            while !stop.is_cancelled() {
                thread::sleep(Duration::from_millis(1));
            }
            Ok("told to stop".to_owned())
        }
        "left" => Ok(time_left()
            .map_or(u128::MAX, |left| left.as_millis())
            .to_string()),
        "garbage" => {
            socket().write_all(b"\0\0\0\x01\xff").unwrap();
            pending().await
        }
        "answer twice" => {
            let mut answer = b"\0\0\0\x0f\x03".to_vec();
            answer.extend(number.to_be_bytes());
            answer.extend(b"+first");
            socket().write_all(&answer).unwrap();
            Ok("second".to_owned())
        }
        "close" => {
            socket().shutdown(Shutdown::Both).unwrap();
            pending().await
        }
        "hold and abort" => {
            holder();
            abort()
        }
        // A process that outlives the job, and holds what it has inherited.
        "fork" => Ok(sleeper()),
        "fork and abort" => {
            sleeper();
            abort()
        }
        "fork and spin" => {
            sleeper();
            loop {
                std::hint::spin_loop();
            }
        }
        text => Ok(text.len().to_string()),
    }
}

#[expect(unconditional_recursion, reason = "its end is the point")]
fn overflow(depth: u64) -> u64 {
    let kept = std::hint::black_box([depth; 1_000]);
    overflow(depth + 1) + kept[0]
}

#[expect(clippy::zombie_processes, reason = "it is to outlive its job")]
fn sleeper() -> String {
    let sleeper = Command::new("sleep").arg("1000").spawn().unwrap();
    sleeper.id().to_string()
}
