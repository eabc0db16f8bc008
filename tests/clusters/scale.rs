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

/// `start` takes the number of workers.
async fn measure<C: Cluster>(test: &'static str, start: impl AsyncFn(usize) -> C) {
    for workers in [1, 2, 4] {
        // A new one, as what the last workers have left would be read again.
        let cluster = start(workers).await;
        let plan = Plan::new(test).jobs(30_000).work(0);
        plan.measure(&cluster, workers).await;
    }
}

#[tokio::test]
#[ignore = "it measures, and asserts nothing"]
async fn scale_on_a_quorum_queue() {
    measure("scale", async |_| Rabbits::start(0).await).await;
}

#[tokio::test]
#[ignore = "it measures, and asserts nothing"]
async fn scale_on_a_replicated_stream() {
    measure("scale", async |_| Servers::start().await).await;
}

#[tokio::test]
#[ignore = "it measures, and asserts nothing"]
async fn scale_on_a_stream_for_each_worker() {
    measure("scale_partitions", Servers::partitioned).await;
}

#[tokio::test]
#[ignore = "it measures, and asserts nothing"]
async fn scale_on_redis_with_replicas() {
    measure("scale", async |_| Sentinels::start().await).await;
}

#[tokio::test]
#[ignore = "it measures, and asserts nothing"]
async fn scale_on_a_valkey_cluster() {
    measure("scale", async |_| Shards::start().await).await;
}
