//! A private cluster of three servers on ports of the loopback.

use std::{fs, path::PathBuf, time::Duration};

use tokio::time::{Instant, sleep};
use tower_sentinel::broker::nats::{
    Pull,
    async_nats::{
        Client,
        jetstream::{
            self, Context,
            consumer::{PullConsumer, pull},
            stream::{self, RetentionPolicy},
        },
    },
    connect,
};

use super::server::Server;
use crate::port::free_port;

/// Longest time to wait for a leader.
const ELECTION: Duration = Duration::from_secs(60);

pub(super) struct Cluster {
    pub(super) servers: Vec<Server>,
    folder: PathBuf,
    /// A client that is connected to one of the servers, and knows all.
    pub(super) client: Client,
    pub(super) context: Context,
}

impl Cluster {
    /// Starts three servers with a work queue `jobs`, a stream `dead`, and a consumer, each on all servers.
    pub(super) async fn start() -> Self {
        let ports = [free_port(), free_port(), free_port()];
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
        let folder = folder.join(format!("nats-cluster-{}-{}", std::process::id(), ports[0]));
        fs::create_dir_all(&folder).unwrap();
        let file = folder.join("nats.conf");
        // The shortest that a server accepts.
        let lame_duck = "lame_duck_duration: \"30s\"\nlame_duck_grace_period: \"1s\"\n";
        fs::write(&file, lame_duck).unwrap();
        let routes = ports
            .map(|port| format!("nats://127.0.0.1:{port}"))
            .join(",");
        let servers = (0..3).map(|nth| {
            Server::start_with(&[
                "-c",
                file.to_str().unwrap(),
                "-n",
                &name(nth),
                "--cluster_name",
                "jobs",
                "--cluster",
                &format!("nats://127.0.0.1:{}", ports[nth]),
                "--routes",
                &routes,
            ])
        });
        let servers: Vec<_> = servers.collect();
        let addresses: Vec<_> = servers.iter().map(Server::url).collect();
        let client = connect(addresses).await.unwrap();
        let context = jetstream::new(client.clone());
        let cluster = Self {
            servers,
            folder,
            client,
            context,
        };
        cluster.declare().await;
        cluster
    }

    async fn declare(&self) {
        for (name, retention) in [
            ("jobs", RetentionPolicy::WorkQueue),
            ("dead", RetentionPolicy::Limits),
        ] {
            let config = stream::Config {
                name: name.into(),
                subjects: vec![name.into()],
                retention,
                num_replicas: 3,
                ..stream::Config::default()
            };
            // Until a leader of the cluster is elected, it is refused.
            until(async || self.context.get_or_create_stream(&config).await.is_ok()).await;
        }
        let config = pull::Config {
            durable_name: Some("workers".into()),
            ack_wait: Duration::from_secs(30),
            ..pull::Config::default()
        };
        until(async || {
            let creating = self
                .context
                .create_consumer_on_stream(config.clone(), "jobs");
            creating.await.is_ok()
        })
        .await;
        until(async || self.consumer_leader().await.is_some()).await;
    }

    pub(super) fn addresses(&self) -> Vec<String> {
        self.servers.iter().map(Server::url).collect()
    }

    pub(super) fn pull(&self) -> Pull {
        Pull::new("jobs", "workers").dead_letter("dead")
    }

    pub(super) async fn consumer_leader(&self) -> Option<usize> {
        let consumer = self.context.get_consumer_from_stream("workers", "jobs");
        let consumer: PullConsumer = consumer.await.ok()?;
        leader(consumer.cached_info().cluster.as_ref()?.leader.as_deref()?)
    }

    pub(super) async fn stream_leader(&self) -> Option<usize> {
        let stream = self.context.get_stream("jobs").await.ok()?;
        leader(stream.cached_info().cluster.as_ref()?.leader.as_deref()?)
    }

    /// Lets the leader of the stream or the consumer step down, by the API of the server.
    pub(super) async fn step_down(&self, subject: &str) {
        let subject = format!("$JS.API.{subject}");
        self.client.request(subject, "".into()).await.unwrap();
    }

    pub(super) async fn publish(&self, jobs: std::ops::Range<usize>) {
        for job in jobs {
            // A second one of the same id is dropped.
            until(async || {
                let mut headers = tower_sentinel::broker::nats::async_nats::HeaderMap::new();
                headers.insert("Nats-Msg-Id", job.to_string());
                let publishing =
                    self.context
                        .publish_with_headers("jobs", headers, job.to_string().into());
                match publishing.await {
                    Ok(ack) => ack.await.is_ok(),
                    Err(_) => false,
                }
            })
            .await;
        }
    }

    pub(super) async fn messages(&self, stream: &str) -> Option<u64> {
        let stream = self.context.get_stream(stream).await.ok()?;
        Some(stream.cached_info().state.messages)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.folder));
    }
}

fn name(nth: usize) -> String {
    format!("server-{nth}")
}

fn leader(name: &str) -> Option<usize> {
    (0..3).find(|nth| self::name(*nth) == name)
}

/// Repeats a check until it holds.
pub(super) async fn until(mut check: impl AsyncFnMut() -> bool) {
    let end = Instant::now() + ELECTION;
    while !check().await {
        assert!(Instant::now() < end, "no leader is elected");
        sleep(Duration::from_millis(50)).await;
    }
}
