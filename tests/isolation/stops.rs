//! Jobs that do not end by themselves.

use std::{fs, path::PathBuf, process::id};

use crate::{
    table::{BLOCKS, BURNS, HANGS, says},
    worker::{ALL, Isolation::*, Worker, run},
};

/// File whose presence frees a job that blocks its thread.
struct Until(PathBuf);

impl Until {
    fn new() -> Self {
        let name = format!("isolation-{}-{}", id(), fastrand::u64(..));
        Self(PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name))
    }

    fn job(&self) -> String {
        format!("block {}", self.0.display())
    }

    fn free(&self) {
        fs::write(&self.0, "").unwrap();
    }
}

impl Drop for Until {
    fn drop(&mut self) {
        fs::remove_file(&self.0).ok();
    }
}

#[test]
fn a_hang_is_stopped_in_a_task_in_its_own_runtime_and_in_a_process() {
    for isolation in ALL {
        says(HANGS, isolation, "stopped");
        let ended = run(isolation, "hang");
        let [outcome] = *ended.bad() else {
            panic!("{:?}", ended.lines);
        };
        assert!(outcome.starts_with("TimedOut("), "{outcome}");
        assert!(outcome.ends_with("stopped=true"), "{outcome}");
    }
}

/// Returns the outcome of the bad job.
fn timed_out(worker: &mut Worker) -> String {
    worker.told("outcome TimedOut(")
}

#[test]
fn a_job_that_blocks_in_a_task_runs_on_and_may_delay_others() {
    says(BLOCKS, Task, "timed out, runs on; may delay other jobs");
    let until = Until::new();
    let mut worker = Worker::start(Task, &until.job(), &[("THREADS", "4")]);
    worker.told("blocked");
    assert!(timed_out(&mut worker).ends_with("stopped=false"));
    // It still runs.
    until.free();
    worker.told("no longer blocked");
    worker.end();

    // With one thread, nobody else has a turn.
    let until = Until::new();
    let mut worker = Worker::start(Task, &until.job(), &[("THREADS", "1")]);
    worker.told("blocked");
    until.free();
    let next = worker.next();
    assert_eq!(next.as_deref(), Some("no longer blocked"));
    worker.end().bad();
}

#[test]
fn a_job_that_blocks_in_its_own_runtime_is_timed_out_in_time_and_runs_on() {
    says(BLOCKS, Runtime, "timed out in time, runs on");
    let until = Until::new();
    // Though it blocks the one thread of the jobs.
    let mut worker = Worker::start(Runtime, &until.job(), &[("THREADS", "1")]);
    worker.told("blocked");
    assert!(timed_out(&mut worker).ends_with("stopped=false"));
    until.free();
    worker.told("no longer blocked");
    worker.end();
}

#[test]
fn a_job_that_blocks_in_a_process_is_killed() {
    says(BLOCKS, Process, "killed: `stopped()` is true");
    let until = Until::new();
    let mut worker = Worker::start(Process, &until.job(), &[]);
    worker.told("blocked");
    assert!(timed_out(&mut worker).ends_with("stopped=true"));
    until.free();
    let ended = worker.end();
    assert!(!ended.lines.iter().any(|line| line == "no longer blocked"));
    ended.bad();
}

#[test]
fn cpu_time_of_a_task_or_its_own_runtime_is_unnoticed() {
    for isolation in [Task, Runtime] {
        says(BURNS, isolation, "unnoticed");
        let ended = run(isolation, "burn");
        assert_eq!(ended.bad(), ["Completed(\"burn\") stopped=true"]);
    }
}

#[test]
fn too_much_cpu_time_of_a_process_is_one_outcome() {
    says(BURNS, Process, "one outcome, `OutOfCpuTime` with a limit");
    let ended = run(Process, "burn without end");
    let [outcome] = *ended.bad() else {
        panic!("{:?}", ended.lines);
    };
    assert!(outcome.starts_with("Failed(OutOfCpuTime {"), "{outcome}");
}
