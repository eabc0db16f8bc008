//! How many jobs a second 1, 2 and 4 workers settle, without faults.
//!
//! ```sh
//! cargo test --all-features --test clusters -- scale --ignored --show-output --test-threads 1
//! ```

use crate::{
    nats::cluster::Servers,
    rabbitmq::cluster::Rabbits,
    redis::{cluster::Shards, sentinel::Sentinels},
    trial::{Cluster, Plan},
};

async fn measure<C: Cluster>(start: impl AsyncFn() -> C) {
    for workers in [1, 2, 4] {
        // A new one, as what the last workers have left would be read again.
        let cluster = start().await;
        let plan = Plan::new("scale").jobs(30_000).work(0);
        plan.measure(&cluster, workers).await;
    }
}

#[tokio::test]
#[ignore = "it measures, and asserts nothing"]
async fn scale_on_a_quorum_queue() {
    measure(async || Rabbits::start(0).await).await;
}

#[tokio::test]
#[ignore = "it measures, and asserts nothing"]
async fn scale_on_a_replicated_stream() {
    measure(Servers::start).await;
}

#[tokio::test]
#[ignore = "it measures, and asserts nothing"]
async fn scale_on_redis_with_replicas() {
    measure(Sentinels::start).await;
}

#[tokio::test]
#[ignore = "it measures, and asserts nothing"]
async fn scale_on_a_valkey_cluster() {
    measure(Shards::start).await;
}
