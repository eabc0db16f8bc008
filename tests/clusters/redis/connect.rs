//! How a worker, and the test, find the server of the stream.

use std::{fmt, io, time::Duration};

use tokio::time::timeout;
use tower_sentinel::{
    broker::redis::{
        ConsumerGroup, Deliveries,
        redis::{Client, Cmd, FromRedisValue, RedisResult},
    },
    consumer::Connect,
};

use super::{GROUP, JOBS, MASTER};
use crate::worker::PREFETCH;

/// How long a server may take to answer.
const LIMIT: Duration = Duration::from_secs(3);

pub(super) fn group() -> ConsumerGroup {
    ConsumerGroup::new(JOBS, GROUP)
        .prefetch(PREFETCH)
        .min_idle(Duration::from_secs(10))
}

pub(crate) fn by_sentinel(
    sentinels: Vec<String>,
) -> impl Connect<Subscription = Deliveries, Error: fmt::Display + Send, Future: Send> + Send {
    group().connector_sentinel(sentinels, MASTER)
}

pub(crate) fn to_cluster(
    seeds: Vec<String>,
) -> impl Connect<Subscription = Deliveries, Error: fmt::Display + Send, Future: Send> + Send {
    group().connector(seeds)
}

/// Returns the owner of the stream's slot, as far as a node knows.
pub(super) async fn owner(node: &str) -> RedisResult<Option<String>> {
    let slot: u16 = ask(node, &format!("CLUSTER KEYSLOT {JOBS}")).await?;
    let nodes: String = ask(node, "CLUSTER NODES").await?;
    Ok(nodes.lines().find_map(|line| {
        // id address:port@bus flags primary ping pong epoch state slots...
        let fields: Vec<_> = line.split(' ').collect();
        let has_slot = fields[8..].iter().any(|range| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let ends = first.parse::<u16>().ok().zip(last.parse::<u16>().ok());
            ends.is_some_and(|(first, last)| (first..=last).contains(&slot))
        });
        let address = fields[1].split('@').next()?;
        (has_slot && !fields[2].contains("fail")).then(|| format!("redis://{address}"))
    }))
}

/// Runs a command, whose words are separated by spaces, on a server.
pub(super) async fn ask<T: FromRedisValue>(address: &str, command: &str) -> RedisResult<T> {
    let asking = async {
        let client = Client::open(address)?;
        let mut connection = client.get_multiplexed_async_connection().await?;
        let mut words = Cmd::new();
        words.arg(command.split(' ').collect::<Vec<_>>());
        words.query_async(&mut connection).await
    };
    let asked = timeout(LIMIT, asking).await;
    asked.unwrap_or_else(|_| Err(io::Error::from(io::ErrorKind::TimedOut).into()))
}
