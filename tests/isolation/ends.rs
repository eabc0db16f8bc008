//! Jobs that end by themselves, and those that end their worker.

use std::os::unix::process::ExitStatusExt;

use crate::{
    table::{ABORTS, ALLOCATES, EXITS, FAILS, PANICS_TWICE, says},
    worker::{Isolation, Isolation::*, run},
};

/// The bad job has one outcome, and the good ones complete.
#[track_caller]
fn one_outcome(isolation: Isolation, bad: &str, expected: &str) {
    let ended = run(isolation, bad);
    let [outcome] = *ended.bad() else {
        panic!("{bad}: {:?}", ended.lines);
    };
    assert!(outcome.starts_with(expected), "{bad}: {outcome}");
}

/// The worker ends by a signal or with a code, and tells no outcome of the bad job.
#[track_caller]
fn the_worker_ends(isolation: Isolation, bad: &str, signal: Option<i32>, code: Option<i32>) {
    let ended = run(isolation, bad);
    let status = ended.status;
    assert_eq!((status.signal(), status.code()), (signal, code), "{bad}");
    let outcomes = ended
        .lines
        .iter()
        .filter_map(|line| line.strip_prefix("outcome "));
    for outcome in outcomes {
        assert!(
            outcome.starts_with("Completed(\"good\")"),
            "{bad}: {outcome}"
        );
    }
}

#[test]
fn an_error_or_a_panic_in_a_task_is_one_outcome() {
    says(FAILS, Task, "one outcome");
    one_outcome(Task, "fail", "Failed(\"it has failed\")");
    one_outcome(Task, "panic", "Panicked(Panic(\"it has panicked\"");
}

#[test]
fn an_error_or_a_panic_in_its_own_runtime_is_one_outcome() {
    says(FAILS, Runtime, "one outcome");
    one_outcome(Runtime, "fail", "Failed(\"it has failed\")");
    one_outcome(Runtime, "panic", "Panicked(Panic(\"it has panicked\"");
}

#[test]
fn an_error_or_a_panic_in_a_process_is_one_outcome() {
    says(FAILS, Process, "one outcome");
    one_outcome(Process, "fail", "Failed(Failed(\"it has failed\"))");
    one_outcome(
        Process,
        "panic",
        "Failed(Panicked { message: \"it has panicked\"",
    );
}

#[test]
fn an_abort_an_overflow_or_a_fault_in_a_task_ends_the_worker() {
    says(ABORTS, Task, "the worker ends");
    the_worker_ends(Task, "abort", Some(6), None);
    the_worker_ends(Task, "overflow", Some(6), None);
    the_worker_ends(Task, "segv", Some(11), None);
}

#[test]
fn an_abort_an_overflow_or_a_fault_in_its_own_runtime_ends_the_worker() {
    says(ABORTS, Runtime, "the worker ends");
    the_worker_ends(Runtime, "abort", Some(6), None);
    the_worker_ends(Runtime, "overflow", Some(6), None);
    the_worker_ends(Runtime, "segv", Some(11), None);
}

#[test]
fn an_abort_an_overflow_or_a_fault_in_a_process_is_one_outcome() {
    says(ABORTS, Process, "one outcome, `Crashed`");
    for bad in ["abort", "overflow", "segv"] {
        one_outcome(Process, bad, "Failed(Crashed {");
    }
}

#[test]
fn a_panic_while_it_panics_in_a_task_ends_the_worker() {
    says(PANICS_TWICE, Task, "the worker ends");
    the_worker_ends(Task, "panic twice", Some(6), None);
}

#[test]
fn a_panic_while_it_panics_in_its_own_runtime_ends_the_worker() {
    says(PANICS_TWICE, Runtime, "the worker ends");
    the_worker_ends(Runtime, "panic twice", Some(6), None);
}

#[test]
fn a_panic_while_it_panics_in_a_process_is_one_outcome() {
    says(PANICS_TWICE, Process, "one outcome, `Crashed`");
    one_outcome(Process, "panic twice", "Failed(Crashed {");
}

#[test]
fn an_exit_in_a_task_ends_the_worker() {
    says(EXITS, Task, "the worker ends");
    the_worker_ends(Task, "exit", None, Some(3));
}

#[test]
fn an_exit_in_its_own_runtime_ends_the_worker() {
    says(EXITS, Runtime, "the worker ends");
    the_worker_ends(Runtime, "exit", None, Some(3));
}

#[test]
fn an_exit_in_a_process_is_one_outcome() {
    says(EXITS, Process, "one outcome, `Crashed`");
    one_outcome(Process, "exit", "Failed(Crashed {");
}

#[test]
fn all_memory_in_a_task_ends_the_worker() {
    says(ALLOCATES, Task, "the worker ends");
    the_worker_ends(Task, "reserve", Some(6), None);
}

#[test]
fn all_memory_in_its_own_runtime_ends_the_worker() {
    says(ALLOCATES, Runtime, "the worker ends");
    the_worker_ends(Runtime, "reserve", Some(6), None);
}

#[test]
fn all_memory_in_a_process_is_one_outcome() {
    says(
        ALLOCATES,
        Process,
        "one outcome, `OutOfMemory` with a limit",
    );
    one_outcome(Process, "allocate", "Failed(OutOfMemory {");
}
