//! Cost of a job in a process of its own, beside Python's `multiprocessing` and Celery.
//!
//! Trivial jobs: first one at a time, then as many as keep two processes busy, then from a stream of Redis to its
//! acks. Each round runs all contenders. `cargo bench --features json,process,redis --bench process` prints the medians of
//! the rounds, in microseconds for each job, and jobs each second.
//!
//! The Python that `PYTHON` names (`python3`) runs the peers; Celery wants `pip install celery redis`. Redis is at
//! `REDIS_ADDR` (`redis://127.0.0.1:6379`). What is not there is not measured, and that is said.

mod celery;
mod ours;
mod python;
mod queue;

use std::{
    env,
    process::ExitCode,
    time::{Duration, Instant},
};

use tokio::runtime::Builder;

/// Number of processes that run jobs.
const PROCESSES: usize = 2;

/// Jobs that wait for a process or are in one.
const IN_FLIGHT: usize = 64;

/// What a job is; its result is the length.
const BODY: &str = "job";

const ROUNDS: usize = 11;

/// A measured way to run jobs.
struct Figure {
    name: &'static str,
    /// Of each round, for one job.
    times: Vec<Duration>,
}

impl Figure {
    fn median(&self) -> Duration {
        let mut times = self.times.clone();
        times.sort();
        times[times.len() / 2]
    }
}

/// The figures of one comparison, in the order in which they were first measured.
#[derive(Default)]
struct Figures(Vec<Figure>);

impl Figures {
    fn add(&mut self, name: &'static str, whole: Duration, jobs: u32) {
        let time = whole / jobs;
        match self.0.iter_mut().find(|figure| figure.name == name) {
            Some(figure) => figure.times.push(time),
            None => self.0.push(Figure {
                name,
                times: vec![time],
            }),
        }
    }

    fn print(&self, title: &str) {
        println!("\n{title:<44} us per job   jobs/s   slowest round");
        for figure in &self.0 {
            let median = figure.median().as_secs_f64();
            let slowest = figure.times.iter().max().map_or(0.0, Duration::as_secs_f64);
            println!(
                "{:<44} {:>10.1} {:>8.0} {:>13.1}",
                figure.name,
                median * 1e6,
                1.0 / median,
                slowest * 1e6,
            );
        }
    }
}

// The wall clock, not tokio's: this is a benchmark.
#[allow(clippy::disallowed_methods)]
async fn time(work: impl Future<Output = ()>) -> Duration {
    let started = Instant::now();
    work.await;
    started.elapsed()
}

fn main() -> ExitCode {
    // In a child this serves jobs, and does not return.
    ours::serve();
    // `cargo test --benches` only wants to know whether this runs.
    let is_bench = env::args().any(|argument| argument == "--bench");
    let (rounds, share) = match is_bench {
        true => (ROUNDS, 1),
        false => (1, 50),
    };
    let runtime = Builder::new_multi_thread()
        .worker_threads(PROCESSES)
        .enable_all()
        .build()
        .expect("a runtime starts");
    println!("medians of {rounds} rounds, {PROCESSES} processes");
    runtime.block_on(async {
        let (mut single, mut many, mut queued) = <(Figures, Figures, Figures)>::default();
        let mut python = python::Pool::start();
        let mut queue = queue::Queue::connect().await;
        for _ in 0..rounds {
            ours::one_at_a_time(&mut single, 10_000 / share).await;
            ours::many(&mut many, 20_000 / share).await;
            if let Ok(pool) = &mut python {
                pool.one_at_a_time(&mut single, 10_000 / share);
                pool.many(&mut many, 20_000 / share);
            }
            if let Ok(queue) = &mut queue {
                ours::queued(&mut queued, queue, 20_000 / share).await;
            }
        }
        let celery = match &mut queue {
            Ok(queue) => celery::queued(&mut queued, queue, 10_000 / share, rounds.min(3)).await,
            Err(error) => Err(error.clone()),
        };
        if let Ok(queue) = &mut queue {
            queue.clear().await;
        }
        single.print("one at a time");
        many.print("64 in flight");
        queued.print("from Redis, 64 in flight, to the last ack");
        for (name, error) in [
            ("multiprocessing", python.err()),
            ("Redis", queue.err()),
            ("Celery", celery.err()),
        ] {
            if let Some(error) = error {
                println!("\n{name}: not measured: {error}");
            }
        }
    });
    ExitCode::SUCCESS
}
