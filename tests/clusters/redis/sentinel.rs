//! A Redis primary with two replicas, and three sentinels.

use std::{collections::HashMap, fs, time::Duration};

use tokio::time::{Instant, sleep};

use super::{MASTER, connect::ask, stream};
use crate::{
    network::Network,
    node::{Folder, Node},
    trial::Cluster,
};

const PORT: u16 = 6379;
const SENTINEL_PORT: u16 = 26379;

pub(crate) struct Sentinels {
    nodes: Vec<Node>,
    sentinels: Vec<Node>,
    _folder: Folder,
    // After the nodes.
    _network: Network,
}

impl Sentinels {
    /// Starts them all, with the first node as the primary.
    pub(crate) async fn start() -> Self {
        let folder = Folder::new("sentinel");
        let network = Network::new(3);
        let machines = network.machines();
        let first = &machines[0].address;
        let nodes = machines.iter().map(|machine| {
            let data = folder.of(&machine.address);
            let mut command = machine.command("redis-server");
            command
                .args(["--bind", &machine.address, "--port", &PORT.to_string()])
                .args(["--protected-mode", "no", "--save", ""])
                .args(["--appendonly", "yes", "--appendfsync", "everysec"])
                .args(["--repl-diskless-sync-delay", "0"])
                // A replaced primary that is up would take acks for 10 s until it is told.
                .args(["--min-replicas-to-write", "1"])
                .arg("--dir")
                .arg(&data);
            if machine.address != *first {
                command.args(["--replicaof", &format!("{first} {PORT}")]);
            }
            Node::start(machine, PORT, data.join("output"), command)
        });
        let mut nodes: Vec<_> = nodes.collect();
        for node in &mut nodes {
            node.listens().await;
        }
        let sentinels = machines.iter().map(|machine| {
            let data = folder.of(format!("{}-sentinel", machine.address));
            let config = data.join("sentinel.conf");
            let settings = format!(
                "bind {}\nport {SENTINEL_PORT}\nprotected-mode no\ndir {}\n\
                 sentinel monitor {MASTER} {first} {PORT} 2\n\
                 sentinel down-after-milliseconds {MASTER} 3000\n\
                 sentinel failover-timeout {MASTER} 10000\n",
                machine.address,
                data.display(),
            );
            fs::write(&config, settings).unwrap();
            let mut command = machine.command("redis-server");
            command.arg(&config).arg("--sentinel");
            Node::start(machine, SENTINEL_PORT, data.join("output"), command)
        });
        let mut sentinels: Vec<_> = sentinels.collect();
        for sentinel in &mut sentinels {
            sentinel.listens().await;
        }
        let cluster = Self {
            nodes,
            sentinels,
            _folder: folder,
            _network: network,
        };
        cluster.is_whole().await;
        cluster
    }

    /// Waits until each sentinel knows the others and the replicas.
    async fn is_whole(&self) {
        let started = Instant::now();
        for address in self.addresses() {
            loop {
                let mut known = Vec::new();
                for what in ["SENTINELS", "REPLICAS"] {
                    let command = format!("SENTINEL {what} {MASTER}");
                    let list = ask::<Vec<HashMap<String, String>>>(&address, &command);
                    known.push(list.await.map_or(0, |list| list.len()));
                }
                if known == [2, 2] {
                    break;
                }
                assert!(started.elapsed() < Duration::from_secs(60), "{known:?}");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }

    /// Returns the primary, by its own account.
    pub(super) async fn primary(&self) -> usize {
        loop {
            for nth in 0..self.nodes.len() {
                let info = ask::<String>(&self.address(nth), "INFO replication").await;
                if info.is_ok_and(|info| info.contains("role:master")) {
                    return nth;
                }
            }
            sleep(Duration::from_millis(100)).await;
        }
    }

    /// Lets a sentinel replace the primary, which is up.
    pub(super) async fn fail_over_by_sentinel(&self) {
        let sentinel = &self.addresses()[0];
        let command = format!("SENTINEL FAILOVER {MASTER}");
        let () = ask(sentinel, &command).await.unwrap();
    }

    /// Lets the primary change places with a replica.
    pub(super) async fn fail_over(&self) {
        let primary = self.primary().await;
        let () = ask(&self.address(primary), "FAILOVER").await.unwrap();
    }

    pub(super) fn kill(&mut self, node: usize) {
        self.nodes[node].kill();
    }

    pub(super) async fn restart(&mut self, node: usize) {
        self.nodes[node].restart();
        self.nodes[node].listens().await;
    }

    pub(super) fn hang(&self, node: usize) {
        self.nodes[node].hang();
    }

    pub(super) fn resume(&self, node: usize) {
        self.nodes[node].resume();
    }

    pub(super) fn cut(&self, node: usize) {
        self.nodes[node].machine.cut();
    }

    pub(super) fn join(&self, node: usize) {
        self.nodes[node].machine.join();
    }

    fn address(&self, node: usize) -> String {
        format!("redis://{}", self.nodes[node].host())
    }
}

impl Cluster for Sentinels {
    const BROKER: &'static str = "sentinel";

    fn addresses(&self) -> Vec<String> {
        let hosts = self.sentinels.iter().map(Node::host);
        hosts.map(|host| format!("redis://{host}")).collect()
    }

    async fn publish(&self, jobs: impl Iterator<Item = u32>) {
        stream::publish(&self.address(0), jobs, 2).await;
    }

    async fn standing(&self) -> Option<(usize, usize)> {
        let primary = self.primary().await;
        stream::standing(&self.address(primary)).await.ok()
    }

    async fn dead(&self) -> Vec<String> {
        let primary = self.primary().await;
        stream::dead(&self.address(primary)).await
    }
}
