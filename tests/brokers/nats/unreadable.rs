//! Messages whose headers the client can't parse.

use std::{
    io::{BufRead, BufReader, Write},
    net::TcpStream,
    time::Duration,
};

use tokio::time::{Instant, sleep, timeout};
use tower_sentinel::{
    Job, Verdict,
    broker::nats::{Delivery, Pull, async_nats::jetstream, connect},
    settle::Settle,
};

use super::{Jobs, SOON, closed, jobs, next, reason};
use crate::log::Log;

/// Publishes a message with these bytes for headers, and waits until the stream has it.
pub(super) async fn publish(jobs: &Jobs, headers: &[u8], payload: &str) {
    let before = jobs.messages("jobs").await;
    let mut stream = TcpStream::connect(jobs.server.address()).unwrap();
    let mut block = b"NATS/1.0".to_vec();
    block.extend(headers);
    block.extend(b"\r\n\r\n");
    let (headers, total) = (block.len(), block.len() + payload.len());
    let connect = "CONNECT {\"verbose\":false,\"headers\":true}";
    write!(stream, "{connect}\r\nHPUB jobs {headers} {total}\r\n").unwrap();
    stream.write_all(&block).unwrap();
    write!(stream, "{payload}\r\nPING\r\n").unwrap();
    let lines = BufReader::new(&stream).lines();
    let mut lines = lines.map(|line| line.unwrap());
    assert!(lines.any(|line| line == "PONG"));
    let kept = async {
        while jobs.messages("jobs").await == before {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(SOON, kept).await.expect("the stream keeps it");
}

/// Acks a job, though the connection may break before the confirmation comes.
async fn ack(job: &Delivery) {
    let mut tag = job.tag();
    while let Err(unsettled) = tag.settle(Verdict::Ack, reason("")).await {
        tag = unsettled.tag.expect("an ack may be tried again");
    }
}

/// Each closes the client's connection.
const MALFORMED: [&[u8]; 4] = [
    b"\r\na name: with spaces",
    b"\r\nlatin: \xe9t\xe9",
    b"\r\nno colon at all",
    "\r\nn\u{e4}me: x".as_bytes(),
];

#[tokio::test]
async fn a_message_that_cant_be_parsed_becomes_a_dead_letter_and_the_others_are_done() {
    for headers in MALFORMED {
        let jobs = jobs(Duration::from_secs(1)).await;
        jobs.publish("before").await;
        publish(&jobs, headers, "malformed").await;
        jobs.publish("after").await;
        let pull = jobs.pull().dead_letter("dead");
        let mut deliveries = pull.subscribe(&jobs.context).await.unwrap();
        let done = async {
            let mut left = vec!["before", "after"];
            while !left.is_empty() {
                let job = next(&mut deliveries).await;
                left.retain(|payload| payload.as_bytes() != job.payload());
                ack(&job).await;
            }
        };
        timeout(2 * SOON, done).await.expect("the others are done");
        // The search runs while the subscription is polled.
        let found = async {
            while jobs.messages("dead").await == 0 {
                drop(timeout(Duration::from_millis(50), closed(&mut deliveries)).await);
            }
        };
        timeout(2 * SOON, found).await.expect("a dead letter");
        let dead = jobs.context.get_stream("dead").await.unwrap();
        let dead = dead.get_raw_message(1).await.unwrap();
        assert_eq!(&dead.payload[..], b"malformed");
        let header = |name| dead.headers.get(name).map(|value| value.as_str());
        assert_eq!(header("x-outcome-kind"), Some("failed"));
        let message = "the headers of the message can't be parsed";
        assert_eq!(header("x-outcome-message"), Some(message));
        assert_eq!(jobs.messages("jobs").await, 0);
        assert_eq!(jobs.info().await.num_ack_pending, 0);
    }
}

#[tokio::test]
async fn a_message_that_cant_be_parsed_is_named_and_set_aside_without_a_dead_letter() {
    let (log, _guard) = Log::start();
    let jobs = jobs(Duration::from_secs(1)).await;
    jobs.publish("before").await;
    publish(&jobs, MALFORMED[0], "malformed").await;
    let mut deliveries = jobs.subscribe(4).await;
    let before = next(&mut deliveries).await;
    ack(&before).await;
    let aside =
        |line: &String| line.contains("message set aside") && line.contains("stream_sequence=2");
    let named = async {
        while !log.lines().iter().any(aside) {
            drop(timeout(Duration::from_millis(50), closed(&mut deliveries)).await);
            assert!(
                timeout(
                    Duration::from_millis(50),
                    futures_util::StreamExt::next(&mut deliveries)
                )
                .await
                .is_err()
            );
        }
    };
    timeout(2 * SOON, named).await.expect("it is named");
    jobs.publish("after").await;
    let after = next(&mut deliveries).await;
    assert_eq!(after.payload(), b"after");
    ack(&after).await;
    assert_eq!(jobs.messages("jobs").await, 1, "nothing is lost");
}

/// The client panics, so that each of its subscriptions ends.
#[tokio::test]
async fn a_message_that_ends_the_client_becomes_a_dead_letter_for_the_next_one() {
    let jobs = jobs(Duration::from_secs(1)).await;
    publish(&jobs, b"\r\nname: a\rb", "malformed").await;
    let start = Instant::now();
    while jobs.messages("dead").await == 0 {
        assert!(start.elapsed() < 3 * SOON, "no dead letter");
        let context = jetstream::new(connect(&jobs.server.address()).await.unwrap());
        let pull = Pull::new("jobs", "workers").dead_letter("dead");
        let pull = pull.idle_heartbeat(Duration::from_millis(250));
        let mut deliveries = pull.subscribe(&context).await.unwrap();
        let lived = async {
            while jobs.messages("dead").await == 0 {
                let next = futures_util::StreamExt::next(&mut deliveries);
                if let Ok(end) = timeout(Duration::from_millis(50), next).await {
                    end.expect("an end").expect_err("no job");
                    return;
                }
            }
        };
        lived.await;
    }
    assert_eq!(jobs.messages("jobs").await, 0);
}

/// Whoever publishes may write a status into a message's headers, such as those of the server.
#[tokio::test]
async fn a_message_whose_headers_begin_with_a_status_is_a_job() {
    let jobs = jobs(SOON).await;
    let statuses = [
        " 409 Consumer Deleted",
        " 409 Exceeded MaxRequestBatch of 1",
        " 100 Idle Heartbeat",
        " 503",
        " 408 Request Timeout",
    ];
    for status in statuses {
        publish(&jobs, status.as_bytes(), status).await;
    }
    let mut deliveries = jobs.subscribe(8).await;
    for status in statuses {
        let job = next(&mut deliveries).await;
        assert_eq!(job.payload(), status.as_bytes());
        assert_eq!(job.tag().deliveries(), Some(1));
        ack(&job).await;
    }
    assert_eq!(jobs.messages("jobs").await, 0);
}
