//! `examples/nats.rs`.

use std::process::Command;

use tower_sentinel::broker::nats::{
    async_nats::jetstream::{self, Context, consumer::PullConsumer},
    connect,
};

use super::{Run, example, fails_in_one_line};
use crate::nats::server::Server;

fn nats(address: &str) -> Command {
    let mut example = example("nats");
    example.env("NATS_ADDR", address);
    example
}

/// Returns the ready and the unacked messages of the consumer of `stream`.
async fn counts(context: &Context, stream: &str) -> (u64, u64) {
    let stream = context.get_stream(stream).await.unwrap();
    let consumer: PullConsumer = stream.get_consumer("workers").await.unwrap();
    let info = consumer.cached_info();
    (info.num_pending, info.num_ack_pending as u64)
}

#[test]
fn the_broker_counts_what_the_example_holds_and_nothing_once_it_is_done() {
    let server = Server::start();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let connected = runtime.block_on(async {
        let client = connect(&server.address()).await;
        client.map(jetstream::new)
    });
    let context = connected.unwrap();

    let run = Run::start(nats(&server.address()));
    run.holds_no_more_than_its_prefetch(|stream| runtime.block_on(counts(&context, stream)));

    let names = [run.name.clone(), run.name.replace("-jobs", "-dead-letters")];
    run.settles_every_job();
    for name in names {
        let stream = runtime.block_on(context.get_stream(&name));
        assert!(stream.is_err(), "{name} is deleted");
    }
}

#[test]
fn a_broker_that_is_out_of_reach_is_one_line_that_names_the_address() {
    let example = nats("nats://someone:secret@127.0.0.1:1");
    fails_in_one_line(example, "error: nats at 127.0.0.1:1 can't be reached: ");
}
