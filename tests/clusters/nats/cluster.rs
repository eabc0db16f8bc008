//! A cluster of three NATS servers.

use std::{fs, time::Duration};

use futures_util::future::join_all;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{Instant, sleep, timeout},
};
use tower_sentinel::broker::nats::async_nats::{
    ConnectOptions,
    jetstream::{
        self, Context,
        consumer::{self, PullConsumer, pull},
        stream::{self, RetentionPolicy},
    },
};

use super::{DEAD, JOBS, WORKERS};
use crate::{
    network::Network,
    node::{Folder, Node},
    trial::Cluster,
};

const PORT: u16 = 4222;
const MONITOR_PORT: u16 = 8222;

pub(crate) struct Servers {
    nodes: Vec<Node>,
    context: Context,
    used: usize,
    /// The streams of jobs: one, or one for each partition.
    streams: Vec<String>,
    _folder: Folder,
    // After the nodes.
    _network: Network,
}

impl Servers {
    /// Starts a cluster, and creates the streams. The workers will connect to a server that does not lead.
    pub(crate) async fn start() -> Self {
        Self::with(vec![JOBS.to_owned()]).await
    }

    /// Starts one whose jobs are spread over this many streams.
    pub(crate) async fn partitioned(partitions: usize) -> Self {
        let streams = (0..partitions).map(|nth| format!("{JOBS}-{nth}"));
        Self::with(streams.collect()).await
    }

    async fn with(streams: Vec<String>) -> Self {
        let folder = Folder::new("nats");
        let network = Network::new(3);
        let machines = network.machines();
        let routes = machines
            .iter()
            .map(|machine| format!("nats://{}:6222", machine.address));
        let routes = routes.collect::<Vec<_>>().join(",");
        let nodes = machines.iter().map(|machine| {
            let address = &machine.address;
            let data = folder.of(address);
            // A client that it does not reach any more is given up after 15 s; after 6 min by default.
            let config = data.join("config");
            fs::write(&config, "ping_interval: \"5s\"\n").unwrap();
            let mut command = machine.command("nats-server");
            command
                .arg("-c")
                .arg(&config)
                .args(["-js", "-a", address, "-p", &PORT.to_string()])
                .args(["--server_name", address, "--cluster_name", "sentinel"])
                .args(["--cluster", &format!("nats://{address}:6222")])
                .args(["--routes", &routes])
                .args(["-m", &MONITOR_PORT.to_string()])
                .arg("-sd")
                .arg(&data);
            Node::start(machine, PORT, data.join("output"), command)
        });
        let mut nodes: Vec<_> = nodes.collect();
        for node in &mut nodes {
            node.listens().await;
        }
        let hosts: Vec<_> = nodes.iter().map(Node::host).collect();
        let options = ConnectOptions::new().connection_timeout(Duration::from_secs(2));
        let client = options.connect(hosts).await.unwrap();
        let mut cluster = Self {
            nodes,
            context: jetstream::new(client),
            used: 0,
            streams,
            _folder: folder,
            _network: network,
        };
        cluster.declare().await;
        cluster.used = (cluster.leader().await + 1) % 3;
        cluster
    }

    async fn declare(&self) {
        let jobs = self.streams.iter();
        let jobs = jobs.map(|name| (name.as_str(), RetentionPolicy::WorkQueue));
        for (name, retention) in jobs.chain([(DEAD, RetentionPolicy::Limits)]) {
            let config = stream::Config {
                name: name.into(),
                subjects: vec![name.into()],
                retention,
                num_replicas: 3,
                ..stream::Config::default()
            };
            // The servers elect a leader of their own first.
            let started = Instant::now();
            while let Err(error) = self.context.create_stream(&config).await {
                assert!(started.elapsed() < Duration::from_secs(60), "{error}");
                sleep(Duration::from_millis(100)).await;
            }
        }
        for stream in &self.streams {
            let config = pull::Config {
                durable_name: Some(WORKERS.into()),
                ack_wait: Duration::from_secs(10),
                ..pull::Config::default()
            };
            let consumer = self.context.create_consumer_on_stream(config, stream);
            let _: PullConsumer = consumer.await.unwrap();
        }
    }

    /// Returns the server that all workers use at first.
    pub(super) fn used(&self) -> usize {
        self.used
    }

    /// Returns the server that leads the consumer.
    pub(super) async fn leader(&self) -> usize {
        loop {
            let info = self.info().await;
            let leader = info.and_then(|info| info.cluster?.leader);
            let is_leader = |node: &Node| Some(&node.machine.address) == leader.as_ref();
            if let Some(leader) = self.nodes.iter().position(is_leader) {
                return leader;
            }
            sleep(Duration::from_millis(100)).await;
        }
    }

    pub(super) fn kill(&mut self, server: usize) {
        self.nodes[server].kill();
    }

    pub(super) async fn stop(&mut self, server: usize) {
        self.nodes[server].stop().await;
    }

    /// Starts servers again, and waits until they listen and the consumer has a leader.
    pub(super) async fn restart(&mut self, servers: &[usize]) {
        for &server in servers {
            self.nodes[server].restart();
        }
        for &server in servers {
            self.nodes[server].listens().await;
        }
        self.leader().await;
    }

    pub(super) fn hang(&self, server: usize) {
        self.nodes[server].hang();
    }

    pub(super) fn resume(&self, server: usize) {
        self.nodes[server].resume();
    }

    pub(super) fn cut(&self, server: usize) {
        self.nodes[server].machine.cut();
    }

    pub(super) fn join(&self, server: usize) {
        self.nodes[server].machine.join();
    }

    async fn info(&self) -> Option<consumer::Info> {
        let asking = async {
            let stream = self.context.get_stream(&self.streams[0]).await.ok()?;
            stream.consumer_info(WORKERS).await.ok()
        };
        timeout(Duration::from_secs(2), asking).await.ok()?
    }
}

impl Cluster for Servers {
    const BROKER: &'static str = "nats";

    fn addresses(&self) -> Vec<String> {
        let order = (0..3).map(|nth| (self.used + nth) % 3);
        order
            .map(|server| format!("nats://{}", self.nodes[server].host()))
            .collect()
    }

    fn queue(&self, worker: usize) -> String {
        self.streams[worker % self.streams.len()].clone()
    }

    async fn publish(&self, jobs: impl Iterator<Item = u32>) {
        let jobs: Vec<_> = jobs.map(|job| job.to_string()).collect();
        let mut streams = self.streams.iter().cycle();
        for jobs in jobs.chunks(500) {
            let mut acks = Vec::new();
            for job in jobs {
                let stream = streams.next().unwrap().clone();
                let ack = self.context.publish(stream, job.clone().into());
                acks.push(ack.await.unwrap().into_future());
            }
            for ack in join_all(acks).await {
                ack.unwrap();
            }
        }
    }

    async fn standing(&self) -> Option<(usize, usize)> {
        let info = self.info().await?;
        let unsettled = info.num_pending + info.num_ack_pending as u64;
        let mut connections = 0;
        for node in &self.nodes {
            connections += clients(&node.machine.address).await?;
        }
        // One of them is that of the test.
        Some((connections.saturating_sub(1), unsettled.try_into().unwrap()))
    }

    async fn dead(&self) -> Vec<String> {
        let stream = self.context.get_stream(DEAD).await.unwrap();
        let mut dead = Vec::new();
        for sequence in 1..=stream.cached_info().state.last_sequence {
            let message = stream.get_raw_message(sequence).await.unwrap();
            dead.push(String::from_utf8(message.payload.to_vec()).unwrap());
        }
        dead
    }
}

/// Returns how many clients are connected to a server.
async fn clients(address: &str) -> Option<usize> {
    let asking = async {
        let mut stream = TcpStream::connect((address, MONITOR_PORT)).await.ok()?;
        let request = b"GET /varz HTTP/1.0\r\n\r\n";
        stream.write_all(request).await.ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.ok()?;
        let (_, body) = answer.split_once("\r\n\r\n")?;
        let body: serde_json::Value = serde_json::from_str(body).ok()?;
        body["connections"].as_u64()?.try_into().ok()
    };
    timeout(Duration::from_secs(2), asking).await.ok()?
}
