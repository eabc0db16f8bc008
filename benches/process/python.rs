//! Python's `multiprocessing.Pool`.

use std::{
    env,
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::Duration,
};

use super::{Figures, PROCESSES};

/// Reads lines `kind jobs`, and writes the seconds that they took.
const PROGRAM: &str = include_str!("pool.py");

/// The interpreter that runs the peers.
pub(crate) fn interpreter() -> Command {
    Command::new(env::var_os("PYTHON").unwrap_or_else(|| "python3".into()))
}

/// A Python program with a pool.
pub(crate) struct Pool {
    process: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Pool {
    pub(crate) fn start() -> Result<Self, String> {
        let mut process = interpreter()
            .args(["-c", PROGRAM, &PROCESSES.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("no Python: {error}"))?;
        let requests = process.stdin.take().expect("it is piped");
        let answers = process.stdout.take().expect("it is piped");
        Ok(Self {
            process,
            requests,
            answers: BufReader::new(answers),
        })
    }

    pub(crate) fn one_at_a_time(&mut self, figures: &mut Figures, jobs: u32) {
        let time = self.run("one", jobs);
        figures.add("multiprocessing.Pool.apply", time, jobs);
    }

    pub(crate) fn many(&mut self, figures: &mut Figures, jobs: u32) {
        let time = self.run("many", jobs);
        figures.add("multiprocessing.Pool.imap_unordered", time, jobs);
    }

    fn run(&mut self, kind: &str, jobs: u32) -> Duration {
        writeln!(self.requests, "{kind} {jobs}").expect("the pool reads");
        let mut answer = String::new();
        self.answers
            .read_line(&mut answer)
            .expect("the pool answers");
        Duration::from_secs_f64(answer.trim().parse().expect("a number of seconds"))
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        drop(self.process.kill());
        drop(self.process.wait());
    }
}
