//! `examples/redis.rs`.

use std::process::Command;

use tower_sentinel::broker::redis::redis::{
    Commands, Connection,
    streams::{StreamInfoGroupsReply, StreamPendingReply},
};

use super::{Run, example, fails_in_one_line};
use crate::redis::server::Server;

fn redis(address: &str) -> Command {
    let mut example = example("redis");
    example.env("REDIS_ADDR", address);
    example
}

/// Returns the unread and the unacked entries of `stream`.
fn counts(connection: &mut Connection, stream: &str) -> (u64, u64) {
    let info: StreamInfoGroupsReply = connection.xinfo_groups(stream).unwrap();
    let unread = info.groups[0].lag.unwrap();
    let pending: StreamPendingReply = connection.xpending(stream, "workers").unwrap();
    (unread as u64, pending.count() as u64)
}

#[test]
fn the_broker_counts_what_the_example_holds_and_nothing_once_it_is_done() {
    let server = Server::start();
    let mut connection = server.inspect();

    let run = Run::start(redis(&server.url()));
    run.holds_no_more_than_its_prefetch(|stream| counts(&mut connection, stream));

    run.settles_every_job();
    let keys: Vec<String> = connection.keys("*").unwrap();
    assert_eq!(keys, [""; 0], "they are deleted");
}

#[test]
fn a_broker_that_is_out_of_reach_is_one_line_that_names_the_address() {
    let example = redis("redis://someone:secret@127.0.0.1:1");
    fails_in_one_line(example, "error: redis at 127.0.0.1:1 can't be reached: ");
}
