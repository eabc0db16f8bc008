//! Celery with its prefork pool.

use std::{
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use tokio::time::sleep;
use tower_sentinel::broker::redis::redis::{AsyncCommands, RedisError};

use super::{BODY, Figures, IN_FLIGHT, PROCESSES, python::interpreter, queue::Queue};

const PROGRAM: &str = include_str!("tasks.py");

/// How long a worker may take to start.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs jobs in rounds, with a worker for each.
pub(crate) async fn queued(
    figures: &mut Figures,
    queue: &mut Queue,
    jobs: u32,
    rounds: usize,
) -> Result<(), String> {
    for round in 0..rounds {
        let prefix = format!("{}-celery-{round}-", queue.prefix);
        let publishing = program(queue, &prefix, &["publish", BODY, &jobs.to_string()]).output();
        let output = publishing.map_err(|error| format!("no Python: {error}"))?;
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr);
            return Err(text.lines().last().unwrap_or("it failed").to_owned());
        }
        let (processes, each) = (PROCESSES.to_string(), (IN_FLIGHT / PROCESSES).to_string());
        let worker = program(queue, &prefix, &["work", &processes, &each]).spawn();
        let _worker = Worker(worker.map_err(|error| format!("no Python: {error}"))?);
        let time = until_done(queue, &prefix, jobs).await?;
        figures.add("Celery, prefork", time, jobs);
    }
    Ok(())
}

fn program(queue: &Queue, prefix: &str, arguments: &[&str]) -> Command {
    let mut python = interpreter();
    python
        .args(["-c", PROGRAM, &queue.address, prefix])
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    python
}

struct Worker(Child);

impl Drop for Worker {
    fn drop(&mut self) {
        // Its first signal is a stop that waits for its processes.
        let id = self.0.id().to_string();
        drop(Command::new("kill").args(["-TERM", &id]).status());
        drop(self.0.wait());
    }
}

/// Waits until the worker has taken the first job, and returns the time from there to the last ack.
// The wall clock, not tokio's: this is a benchmark.
#[allow(clippy::disallowed_methods)]
async fn until_done(queue: &mut Queue, prefix: &str, jobs: u32) -> Result<Duration, String> {
    let (waiting, unacked) = (format!("{prefix}celery"), format!("{prefix}unacked"));
    let started = Instant::now();
    let mut begun = None;
    loop {
        let left: u32 = queue.connection.llen(&waiting).await.map_err(text)?;
        match begun {
            None if left < jobs => begun = Some(Instant::now()),
            None if started.elapsed() > PATIENCE => {
                return Err("the worker has taken no job".to_owned());
            }
            Some(begun) if left == 0 => {
                let unacked: u32 = queue.connection.hlen(&unacked).await.map_err(text)?;
                if unacked == 0 {
                    return Ok(begun.elapsed());
                }
            }
            _ => {}
        }
        sleep(Duration::from_millis(2)).await;
    }
}

#[allow(clippy::needless_pass_by_value)] // for `map_err`
fn text(error: RedisError) -> String {
    error.to_string()
}
