//! Redis with Sentinel, and a Valkey cluster.

pub(crate) mod cluster;
pub(crate) mod connect;
pub(crate) mod sentinel;
mod stream;

use std::time::Duration;

use tokio::time::sleep;

use self::{cluster::Shards, sentinel::Sentinels};
use crate::trial::Plan;

// All keys of the group share the slot of `jobs`.
const JOBS: &str = "jobs";
const GROUP: &str = "workers";
/// What the sentinels call the primary.
const MASTER: &str = "jobs";

#[tokio::test]
async fn redis_goes_on_when_sentinel_replaces_a_killed_primary() {
    let plan = Plan::new("primary_killed");
    let figures = plan.run(Sentinels::start().await, async |cluster| {
        let primary = cluster.primary().await;
        cluster.kill(primary);
        sleep(Duration::from_secs(15)).await;
        cluster.restart(primary).await;
    });
    figures.await.assert(Duration::from_secs(30), 2_000);
}

#[tokio::test]
async fn redis_goes_on_when_the_link_of_its_primary_is_cut() {
    let plan = Plan::new("link_cut").work(600);
    let figures = plan.run(Sentinels::start().await, async |cluster| {
        let primary = cluster.primary().await;
        cluster.cut(primary);
        sleep(Duration::from_secs(60)).await;
        cluster.join(primary);
    });
    figures.await.assert(Duration::from_secs(40), 2_000);
}

#[tokio::test]
async fn redis_goes_on_when_its_primary_hangs() {
    let plan = Plan::new("primary_hangs").work(400);
    let figures = plan.run(Sentinels::start().await, async |cluster| {
        let primary = cluster.primary().await;
        cluster.hang(primary);
        sleep(Duration::from_secs(30)).await;
        cluster.resume(primary);
    });
    figures.await.assert(Duration::from_secs(40), 2_000);
}

#[tokio::test]
async fn redis_goes_on_after_a_failover_by_sentinels_command() {
    let plan = Plan::new("sentinel_failover");
    let figures = plan.run(Sentinels::start().await, async |cluster| {
        cluster.fail_over_by_sentinel().await;
        sleep(Duration::from_secs(12)).await;
    });
    figures.await.assert(Duration::from_secs(30), 2_000);
}

#[tokio::test]
async fn redis_goes_on_after_a_failover_by_the_primarys_command() {
    let plan = Plan::new("failover");
    let figures = plan.run(Sentinels::start().await, async |cluster| {
        cluster.fail_over().await;
        sleep(Duration::from_secs(12)).await;
    });
    // The sentinels name the old primary for half a minute.
    figures.await.assert(Duration::from_secs(60), 96);
}

#[tokio::test]
async fn valkey_goes_on_when_the_owner_of_its_stream_is_killed() {
    let plan = Plan::new("owner_killed");
    let figures = plan.run(Shards::start().await, async |cluster| {
        let owner = cluster.owner().await;
        cluster.kill(owner);
        sleep(Duration::from_secs(15)).await;
        cluster.restart(owner).await;
    });
    figures.await.assert(Duration::from_secs(30), 2_000);
}

#[tokio::test]
async fn valkey_goes_on_after_a_failover_by_command() {
    let plan = Plan::new("cluster_failover");
    let figures = plan.run(Shards::start().await, async |cluster| {
        cluster.fail_over().await;
        sleep(Duration::from_secs(12)).await;
    });
    figures.await.assert(Duration::from_secs(30), 96);
}

#[tokio::test]
async fn valkey_goes_on_when_the_slot_of_its_stream_is_moved() {
    let plan = Plan::new("slot_moved");
    let figures = plan.run(Shards::start().await, async |cluster| {
        cluster.move_slot().await;
        sleep(Duration::from_secs(12)).await;
    });
    figures.await.assert(Duration::from_secs(30), 96);
}
