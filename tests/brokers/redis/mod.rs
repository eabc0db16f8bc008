//! Redis Streams, on a private server for each test.

mod acks;
mod cluster;
mod conformance;
mod connecting;
mod dead_letter_queue;
mod dead_letters;
mod gone;
mod idle;
mod keys;
mod kills;
mod large;
mod leases;
mod losing;
mod newer;
mod prefetch;
mod replica;
mod rights;
mod sentinel;
pub(crate) mod server;
mod stopping;
mod suspects;
mod tracing;
mod verdicts;
mod work;

use std::{collections::HashMap, future::poll_fn, pin::Pin, time::Duration};

use futures_util::StreamExt;
use tokio::time::timeout;
use tower_sentinel::{
    Job, Verdict,
    broker::redis::{
        ConsumerGroup, Deliveries, Delivery, DeliveryError,
        redis::{Commands, Connection, Value, cmd},
    },
    consumer::Subscription,
    outcome::OutcomeKind,
    settle::{Reason, Settle},
};

const STREAM: &str = "jobs";
const GROUP: &str = "workers";

fn group() -> ConsumerGroup {
    ConsumerGroup::new(STREAM, GROUP)
        .prefetch(5)
        .poll_interval(Duration::from_millis(20))
}

/// The same with acks that all check who has the entry, since their replies may come after others may take
/// it.
fn asking() -> ConsumerGroup {
    group().response_timeout(Duration::from_secs(60))
}

fn add(connection: &mut Connection, payload: &str) -> String {
    connection
        .xadd(STREAM, "*", &[("payload", payload), ("colour", "red")])
        .unwrap()
}

/// Returns how many entries are pending for the group.
fn pending(connection: &mut Connection) -> usize {
    let summary: (usize, Value, Value, Value) = cmd("XPENDING")
        .arg(STREAM)
        .arg(GROUP)
        .query(connection)
        .unwrap();
    summary.0
}

fn delayed(connection: &mut Connection) -> usize {
    connection.zcard(group().delayed_key()).unwrap()
}

type Fields = HashMap<String, String>;

fn dead(connection: &mut Connection) -> Vec<Fields> {
    let key = group().dead_letter_key().unwrap().to_owned();
    let entries: Vec<(String, Fields)> = cmd("XRANGE")
        .arg(key)
        .arg("-")
        .arg("+")
        .query(connection)
        .unwrap();
    entries.into_iter().map(|(_, fields)| fields).collect()
}

async fn next(deliveries: &mut Deliveries) -> Delivery {
    let next = timeout(Duration::from_secs(10), deliveries.next()).await;
    next.expect("nothing is delivered").unwrap().unwrap()
}

/// Returns whether nothing is delivered for a while.
async fn is_quiet(deliveries: &mut Deliveries, millis: u64) -> bool {
    timeout(Duration::from_millis(millis), deliveries.next())
        .await
        .is_err()
}

async fn close(deliveries: &mut Deliveries) {
    let closing = poll_fn(|cx| Pin::new(&mut *deliveries).poll_close(cx));
    timeout(Duration::from_secs(10), closing).await.unwrap();
}

fn reason() -> Reason {
    let mut reason = Reason::completed(Duration::ZERO);
    reason.kind = OutcomeKind::Panicked;
    reason.message = Some("index 7".to_owned());
    reason
}

async fn settle(delivery: &Delivery, verdict: Verdict) -> Result<(), DeliveryError> {
    let settled = delivery.tag().settle(verdict, reason()).await;
    settled.map_err(|unsettled| unsettled.error)
}

fn count(delivery: &Delivery) -> u32 {
    delivery.tag().deliveries().unwrap()
}

// === Verdicts ===

/// Returns how many commands were sent that ack.
fn calls(connection: &mut Connection) -> u64 {
    calls_of(connection, "xack")
}

/// Resets the counts of calls, such as those of a connect.
fn forget_calls(connection: &mut Connection) {
    let () = cmd("CONFIG").arg("RESETSTAT").query(connection).unwrap();
}

/// Returns how often the server ran a command, in scripts or by itself.
fn calls_of(connection: &mut Connection, command: &str) -> u64 {
    let info: String = cmd("INFO").arg("commandstats").query(connection).unwrap();
    let calls = info.lines().find_map(|line| {
        let stats = line.strip_prefix("cmdstat_")?.strip_prefix(command)?;
        let calls = stats.strip_prefix(":calls=")?;
        calls.split(',').next()?.parse().ok()
    });
    calls.unwrap_or(0)
}

// === Leases ===

/// Gives the entry to another consumer. Its count stays, so that only the owner differs.
fn steal(connection: &mut Connection, id: &str) {
    let _: Value = cmd("XCLAIM")
        .arg(STREAM)
        .arg(GROUP)
        .arg("thief")
        .arg(0)
        .arg(id)
        .arg("JUSTID")
        .query(connection)
        .unwrap();
}

// === Trouble on the server ===

fn set_maxmemory(connection: &mut Connection, bytes: &str) {
    let () = cmd("CONFIG")
        .arg("SET")
        .arg("maxmemory")
        .arg(bytes)
        .query(connection)
        .unwrap();
}
