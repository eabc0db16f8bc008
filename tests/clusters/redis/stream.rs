//! The stream of jobs, on the server that has it.

use std::collections::HashMap;

use tower_sentinel::broker::redis::redis::{
    Client, FromRedisValue, ParsingError, RedisResult, Value, aio::MultiplexedConnection, cmd, pipe,
};

use super::{
    GROUP, JOBS,
    connect::{ask, group},
};

/// Adds the jobs, and waits until `replicas` have them.
pub(super) async fn publish(address: &str, jobs: impl Iterator<Item = u32>, replicas: u32) {
    let client = Client::open(address).unwrap();
    let connected = client.get_multiplexed_async_connection().await;
    let mut connection: MultiplexedConnection = connected.unwrap();
    let jobs: Vec<_> = jobs.collect();
    for jobs in jobs.chunks(500) {
        let mut adding = pipe();
        for job in jobs {
            adding.xadd(JOBS, "*", &[("payload", job)]).ignore();
        }
        let () = adding.query_async(&mut connection).await.unwrap();
    }
    let mut waiting = cmd("WAIT");
    waiting.arg(replicas).arg(0);
    let confirmed: u32 = waiting.query_async(&mut connection).await.unwrap();
    assert!(confirmed >= replicas);
}

/// Returns the numbers of consumers that read, and of jobs that are not settled.
pub(super) async fn standing(address: &str) -> RedisResult<(usize, usize)> {
    let consumers = format!("XINFO CONSUMERS {JOBS} {GROUP}");
    let consumers: Vec<HashMap<String, Any>> = ask(address, &consumers).await?;
    // One whose subscription has ended stays for a while.
    let reading = consumers
        .iter()
        .filter(|consumer| consumer["idle"].0 < 2_000);
    let groups = format!("XINFO GROUPS {JOBS}");
    let groups: Vec<HashMap<String, Any>> = ask(address, &groups).await?;
    let unsettled = groups[0]["pending"].0 + groups[0]["lag"].0;
    let delayed = format!("ZCARD {}", group().delayed_key());
    let delayed: usize = ask(address, &delayed).await?;
    Ok((reading.count(), unsettled + delayed))
}

/// Returns the payloads of the dead letters.
pub(super) async fn dead(address: &str) -> Vec<String> {
    let key = group().dead_letter_key().unwrap().to_owned();
    let entries = ask(address, &format!("XRANGE {key} - +")).await;
    let entries: Vec<(String, HashMap<String, String>)> = entries.unwrap();
    let payload = |(_, mut fields): (_, HashMap<String, String>)| fields.remove("payload");
    entries.into_iter().filter_map(payload).collect()
}

/// A number, or 0 for any other value.
struct Any(usize);

impl FromRedisValue for Any {
    fn from_redis_value(value: Value) -> Result<Self, ParsingError> {
        Ok(Self(usize::from_redis_value(value).unwrap_or_default()))
    }
}
