//! A Valkey cluster of three primaries and three replicas.

use std::{process::Stdio, time::Duration};

use tokio::{
    process::Command,
    time::{Instant, sleep},
};
use tower_sentinel::broker::redis::redis::FromRedisValue;

use super::{
    JOBS,
    connect::{ask, owner},
    stream,
};
use crate::{
    network::Network,
    node::{Folder, Node},
    trial::Cluster,
};

const PORT: u16 = 6379;

pub(crate) struct Shards {
    nodes: Vec<Node>,
    _folder: Folder,
    // After the nodes.
    _network: Network,
}

impl Shards {
    pub(crate) async fn start() -> Self {
        let folder = Folder::new("valkey");
        let network = Network::new(6);
        let nodes = network.machines().into_iter().map(|machine| {
            let data = folder.of(&machine.address);
            let mut command = machine.command("valkey-server");
            command
                .args(["--bind", &machine.address, "--port", &PORT.to_string()])
                .args(["--protected-mode", "no", "--save", ""])
                .args(["--appendonly", "yes", "--appendfsync", "everysec"])
                .args(["--repl-diskless-sync-delay", "0"])
                .args(["--cluster-enabled", "yes"])
                .args(["--cluster-node-timeout", "3000"])
                .arg("--dir")
                .arg(&data);
            Node::start(&machine, PORT, data.join("output"), command)
        });
        let mut nodes: Vec<_> = nodes.collect();
        for node in &mut nodes {
            node.listens().await;
        }
        let cluster = Self {
            nodes,
            _folder: folder,
            _network: network,
        };
        let hosts: Vec<_> = cluster.nodes.iter().map(Node::host).collect();
        let mut arguments = vec!["create"];
        arguments.extend(hosts.iter().map(String::as_str));
        arguments.extend(["--cluster-replicas", "1", "--cluster-yes"]);
        cli(&arguments).await;
        cluster.is_whole().await;
        cluster
    }

    /// Waits until each node can serve, and each replica is in step.
    async fn is_whole(&self) {
        let started = Instant::now();
        for nth in 0..self.nodes.len() {
            loop {
                let address = self.address(nth);
                let info = ask::<String>(&address, "CLUSTER INFO").await;
                let is_up = info.is_ok_and(|info| info.contains("cluster_state:ok"));
                let info = ask::<String>(&address, "INFO replication").await;
                let is_replicated = info.is_ok_and(|info| {
                    info.contains("connected_slaves:1") || info.contains("master_link_status:up")
                });
                if is_up && is_replicated {
                    break;
                }
                assert!(started.elapsed() < Duration::from_secs(60), "{address}");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }

    /// Returns the node that has the stream.
    pub(super) async fn owner(&self) -> usize {
        loop {
            for nth in 0..self.nodes.len() {
                if let Ok(Some(owner)) = owner(&self.address(nth)).await {
                    let nodes = 0..self.nodes.len();
                    return nodes
                        .into_iter()
                        .find(|&node| self.address(node) == owner)
                        .unwrap();
                }
            }
            sleep(Duration::from_millis(100)).await;
        }
    }

    /// Lets the replica of the owner take its place.
    pub(super) async fn fail_over(&self) {
        let owner = self.owner().await;
        let id = self.id(owner).await;
        for nth in 0..self.nodes.len() {
            let nodes: String = self.ask(nth, "CLUSTER NODES").await;
            let own = nodes.lines().find(|line| line.contains("myself")).unwrap();
            if own.split(' ').nth(3) == Some(&id) {
                let () = self.ask(nth, "CLUSTER FAILOVER").await;
                return;
            }
        }
        panic!("the owner has no replica");
    }

    /// Moves the slot of the stream to another primary.
    pub(super) async fn move_slot(&self) {
        let owner = self.owner().await;
        let mut target = owner;
        for nth in (0..self.nodes.len()).filter(|&nth| nth != owner) {
            let info: String = self.ask(nth, "INFO replication").await;
            if info.contains("role:master") {
                target = nth;
            }
        }
        let (from, to) = (self.id(owner).await, self.id(target).await);
        let slot: u16 = self.ask(owner, &format!("CLUSTER KEYSLOT {JOBS}")).await;
        let importing = format!("CLUSTER SETSLOT {slot} IMPORTING {from}");
        let () = self.ask(target, &importing).await;
        let migrating = format!("CLUSTER SETSLOT {slot} MIGRATING {to}");
        let () = self.ask(owner, &migrating).await;
        let address = &self.nodes[target].machine.address;
        loop {
            let keys = format!("CLUSTER GETKEYSINSLOT {slot} 1");
            let keys: Vec<String> = self.ask(owner, &keys).await;
            let Some(key) = keys.first() else { break };
            let migrate = format!("MIGRATE {address} {PORT} {key} 0 5000");
            let () = self.ask(owner, &migrate).await;
            // For a while some keys are here and some are there.
            sleep(Duration::from_millis(500)).await;
        }
        for node in [target, owner] {
            let () = self
                .ask(node, &format!("CLUSTER SETSLOT {slot} NODE {to}"))
                .await;
        }
    }

    async fn ask<T: FromRedisValue>(&self, node: usize, command: &str) -> T {
        ask(&self.address(node), command).await.unwrap()
    }

    async fn id(&self, node: usize) -> String {
        self.ask(node, "CLUSTER MYID").await
    }

    pub(super) fn kill(&mut self, node: usize) {
        self.nodes[node].kill();
    }

    pub(super) async fn restart(&mut self, node: usize) {
        self.nodes[node].restart();
        self.nodes[node].listens().await;
        self.is_whole().await;
    }

    fn address(&self, node: usize) -> String {
        format!("redis://{}", self.nodes[node].host())
    }
}

impl Cluster for Shards {
    const BROKER: &'static str = "cluster";

    fn addresses(&self) -> Vec<String> {
        (0..self.nodes.len())
            .map(|node| self.address(node))
            .collect()
    }

    async fn publish(&self, jobs: impl Iterator<Item = u32>) {
        stream::publish(&self.address(self.owner().await), jobs, 1).await;
    }

    async fn standing(&self) -> Option<(usize, usize)> {
        stream::standing(&self.address(self.owner().await))
            .await
            .ok()
    }

    async fn dead(&self) -> Vec<String> {
        stream::dead(&self.address(self.owner().await)).await
    }
}

/// Runs `valkey-cli --cluster`.
async fn cli(arguments: &[&str]) {
    let mut command = Command::new("valkey-cli");
    command
        .arg("--cluster")
        .args(arguments)
        .stdin(Stdio::null());
    let output = command.output().await.unwrap();
    let printed = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{arguments:?}: {printed}");
}
