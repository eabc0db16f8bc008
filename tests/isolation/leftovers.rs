//! What a job leaves behind.

use std::{fs, thread, time::Duration};

use rustix::process::{Pid, Signal, kill_process};

use crate::{
    table::{FORKS, IS_KILLED, LEAKS, SHARES, says},
    worker::{GOOD, Isolation::*, Worker, run},
};

/// Number of bytes that the bad job leaks.
const LEAK: usize = 64 << 20;

fn kill(pid: &str) {
    let pid = Pid::from_raw(pid.parse().unwrap()).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
}

/// Returns whether a process runs, and is no zombie.
fn runs(pid: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_some_and(|(_, state)| !state.starts_with('Z'))
}

fn gone(pid: &str) {
    while runs(pid) {
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn other_processes_of_a_task_or_its_own_runtime_run_on() {
    for isolation in [Task, Runtime] {
        says(FORKS, isolation, "they run on");
        let mut worker = Worker::start(isolation, "fork", &[]);
        let sleeper = worker.told("sleeper");
        worker.end().bad();
        // Also after its worker.
        assert!(runs(&sleeper));
        kill(&sleeper);
    }
}

#[test]
fn other_processes_of_a_process_are_killed_with_it() {
    says(FORKS, Process, "killed with its process, if it is killed");
    let mut worker = Worker::start(Process, "fork", &[]);
    let sleeper = worker.told("sleeper");
    assert!(worker.told("outcome TimedOut(").ends_with("stopped=true"));
    // While its worker goes on.
    gone(&sleeper);
    worker.end().bad();
}

#[test]
fn other_processes_of_a_task_or_its_own_runtime_outlive_a_killed_worker() {
    for isolation in [Task, Runtime] {
        says(IS_KILLED, isolation, "ends; what it has started runs on");
        let mut worker = Worker::start(isolation, "fork", &[]);
        let sleeper = worker.told("sleeper");
        // Kills it.
        drop(worker);
        assert!(runs(&sleeper));
        kill(&sleeper);
    }
}

#[test]
fn a_process_ends_with_all_that_it_has_started_when_the_worker_is_killed() {
    says(IS_KILLED, Process, "killed, with what it has started");
    let mut worker = Worker::start(Process, "fork", &[]);
    let sleeper = worker.told("sleeper");
    drop(worker);
    gone(&sleeper);
}

#[test]
fn leaked_memory_of_a_task_or_its_own_runtime_stays() {
    for isolation in [Task, Runtime] {
        says(LEAKS, isolation, "stays");
        let ended = run(isolation, "leak");
        ended.bad();
        let resident: usize = ended.line("resident").parse().unwrap();
        assert!(resident > LEAK, "{resident}");
    }
}

#[test]
fn leaked_memory_of_a_process_is_gone_after_its_jobs() {
    says(LEAKS, Process, "gone after `max_jobs`, or above `max_rss`");
    let mut worker = Worker::start(Process, "leak", &[]);
    let pid = worker.told("leaked in");
    gone(&pid);
    let ended = worker.end();
    ended.bad();
    let resident: usize = ended.line("resident").parse().unwrap();
    assert!(resident < LEAK, "{resident}");
}

#[test]
fn tasks_and_runtimes_share_memory() {
    for isolation in [Task, Runtime] {
        says(SHARES, isolation, "yes");
        let ended = run(isolation, "good");
        assert_eq!(ended.line("jobs"), (1 + GOOD).to_string());
    }
}

#[test]
fn processes_share_no_memory() {
    says(SHARES, Process, "no: its bytes and its result are copied");
    let ended = run(Process, "good");
    assert_eq!(ended.line("jobs"), "0");
}
