//! `examples/rabbitmq.rs`; `rabbitmqctl` counts the unacked jobs.

use std::process::Command;

use super::{Run, example, fails_in_one_line};
use crate::rabbitmq::server::shared;

fn rabbitmq(address: &str) -> Command {
    let mut example = example("rabbitmq");
    example.env("AMQP_ADDR", address);
    example
}

fn start() -> Run {
    Run::start(rabbitmq(&shared().address()))
}

/// Returns the ready and the unacked messages of `queue`, if it exists.
pub(super) fn counts(queue: &str) -> Option<(u64, u64)> {
    let queues = shared().ctl(&[
        "list_queues",
        "--no-table-headers",
        "name",
        "messages_ready",
        "messages_unacknowledged",
    ]);
    queues.lines().find_map(|line| {
        let mut columns = line.split('\t');
        (columns.next()? == queue).then(|| {
            [(); 2]
                .map(|()| columns.next().unwrap().parse().unwrap())
                .into()
        })
    })
}

#[test]
fn the_broker_counts_what_the_example_holds() {
    let run = start();
    run.holds_no_more_than_its_prefetch(|queue| {
        let counted = run.paused(|| counts(queue));
        counted.expect("asked while it runs")
    });
}

#[test]
fn the_broker_counts_nothing_once_the_example_is_done() {
    let run = start();
    let names = [run.name.clone(), run.name.replace(".jobs", ".dead-letters")];
    run.settles_every_job();
    for name in names {
        assert_eq!(counts(&name), None, "{name} is deleted");
    }
}

#[test]
fn two_runs_at_once_do_not_disturb_each_other() {
    let runs = [start(), start()];
    assert_ne!(runs[0].name, runs[1].name);
    for run in runs {
        run.settles_every_job();
    }
}

#[test]
fn a_run_that_is_killed_leaves_no_queue() {
    let run = start();
    let queue = run.name.clone();
    assert_ne!(run.paused(|| counts(&queue)), None);
    drop(run);
    // The broker takes a moment to notice that the connection is gone.
    let gone = (0..20).any(|_| counts(&queue).is_none());
    assert!(gone, "{queue}");
}

#[test]
fn a_broker_that_is_out_of_reach_is_one_line_that_names_the_address() {
    // Port 1 is refused; the password must not be printed.
    let example = rabbitmq("amqp://someone:secret@127.0.0.1:1/%2f");
    fails_in_one_line(example, "error: rabbitmq at 127.0.0.1:1 can't be reached: ");
}
