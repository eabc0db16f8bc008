//! A cluster of three RabbitMQ nodes.

use std::{fs, os::unix::fs::PermissionsExt, time::Duration};

use futures_util::future::join_all;
use tokio::time::{sleep, timeout};
use tower_sentinel::broker::rabbitmq::{
    self,
    lapin::{
        BasicProperties, Channel,
        options::{
            BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions,
        },
        types::{AMQPValue, FieldTable},
    },
};

use super::{
    DEAD, JOBS,
    program::{Program, program},
};
use crate::{
    network::{Machine, Network},
    node::{Folder, Node},
    trial::Cluster,
};

const PORT: u16 = 5672;
/// Erlang's daemon of names.
const NAMES_PORT: u16 = 4369;

pub(crate) struct Rabbits {
    nodes: Vec<Node>,
    programs: Vec<Program>,
    // As on a real machine, it outlives the node.
    _names: Vec<Node>,
    leader: usize,
    _folder: Folder,
    // After the nodes.
    _network: Network,
}

impl Rabbits {
    /// Starts a cluster, and declares the queues, with their leaders on one of the nodes.
    pub(crate) async fn start(leader: usize) -> Self {
        let folder = Folder::new("rabbitmq");
        let network = Network::new(3);
        let machines = network.machines();
        let programs: Vec<_> = machines
            .iter()
            .map(|machine| configure(machine, &machines, &folder))
            .collect();
        let names = machines.iter().zip(&programs).map(|(machine, program)| {
            let output = program.folder.join("names");
            Node::start(machine, NAMES_PORT, output, machine.command("epmd"))
        });
        let mut names: Vec<_> = names.collect();
        for names in &mut names {
            names.listens().await;
        }
        let nodes = machines.iter().zip(&programs).map(|(machine, settings)| {
            let output = settings.folder.join("stdout");
            let mut command = machine.command(program("rabbitmq-server"));
            settings.settle(&mut command);
            Node::start(machine, PORT, output, command)
        });
        let mut cluster = Self {
            nodes: nodes.collect(),
            programs,
            _names: names,
            leader,
            _folder: folder,
            _network: network,
        };
        cluster.is_whole().await;
        let channel = cluster.channel(leader).await;
        for queue in [JOBS, DEAD] {
            let mut arguments = FieldTable::default();
            for (name, value) in [
                ("x-queue-type", AMQPValue::LongString("quorum".into())),
                (
                    "x-queue-leader-locator",
                    AMQPValue::LongString("client-local".into()),
                ),
                ("x-delivery-limit", AMQPValue::LongInt(-1)),
            ] {
                arguments.insert(name.into(), value);
            }
            let options = QueueDeclareOptions::durable();
            let declared = channel.queue_declare(queue.into(), options, arguments);
            declared.await.unwrap();
        }
        cluster
    }

    pub(super) fn kill(&mut self, node: usize) {
        self.nodes[node].kill();
    }

    pub(super) async fn stop(&mut self, node: usize) {
        self.nodes[node].stop().await;
    }

    /// Starts nodes again, and waits until the cluster is whole.
    pub(super) async fn restart(&mut self, nodes: &[usize]) {
        for &node in nodes {
            self.nodes[node].restart();
        }
        self.is_whole().await;
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

    /// Waits until each node sees all of them.
    async fn is_whole(&mut self) {
        for node in &mut self.nodes {
            node.listens().await;
        }
        for program in &self.programs {
            while evaluated(program, "length(rabbit_nodes:list_running())")
                .await
                .as_deref()
                != Some("3")
            {
                sleep(Duration::from_millis(100)).await;
            }
        }
    }

    fn address(&self, node: usize) -> String {
        format!("amqp://guest:guest@{}", self.nodes[node].host())
    }

    async fn channel(&self, node: usize) -> Channel {
        let connection = rabbitmq::connect(&self.address(node)).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        let options = ConfirmSelectOptions::default();
        channel.confirm_select(options).await.unwrap();
        channel
    }
}

impl Cluster for Rabbits {
    const BROKER: &'static str = "rabbitmq";

    fn addresses(&self) -> Vec<String> {
        (0..self.nodes.len())
            .map(|node| self.address(node))
            .collect()
    }

    async fn publish(&self, jobs: impl Iterator<Item = u32>) {
        let channel = self.channel(self.leader).await;
        let mut confirms = Vec::new();
        for job in jobs {
            let job = job.to_string();
            let confirm = channel.basic_publish(
                "".into(),
                JOBS.into(),
                BasicPublishOptions::default(),
                job.as_bytes(),
                BasicProperties::default().with_delivery_mode(2),
            );
            confirms.push(confirm.await.unwrap());
        }
        for confirm in join_all(confirms).await {
            assert!(confirm.unwrap().is_ack());
        }
    }

    async fn standing(&self) -> Option<(usize, usize)> {
        // Only the leader knows all of it.
        let code = format!(
            "{{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<\"/\">>, queue, <<\"{JOBS}\">>)), \
             {{_, Node}} = amqqueue:get_pid(Q), \
             [{{_, R}}, {{_, U}}, {{_, C}}] = rpc:call(Node, rabbit_amqqueue, info, \
             [Q, [messages_ready, messages_unacknowledged, consumers]]), {{R + U, C}}"
        );
        for program in &self.programs {
            let Some(answer) = evaluated(program, &code).await else {
                continue;
            };
            let answer = answer.strip_prefix('{')?.strip_suffix('}')?;
            let (unsettled, consumers) = answer.split_once(',')?;
            return Some((
                consumers.trim().parse().ok()?,
                unsettled.trim().parse().ok()?,
            ));
        }
        None
    }

    /// Moves the leaders of the retry queues that hold expired jobs: the process that publishes these may wait for ever
    /// for confirms that got lost with the majority. It begins anew with the leader.
    async fn mend(&self) {
        let code = format!(
            "[case rpc:call(Node, rabbit_amqqueue, info, [Q, [messages_dlx]]) of \
             [{{_, N}}] when is_integer(N), N > 0 -> \
             {{N, [rabbit_quorum_queue:transfer_leadership(Q, To) || To <- lists:sublist(rabbit_nodes:list_running() -- [Node], 1)]}}; \
             _ -> none end \
             || Q <- rabbit_amqqueue:list(), {{_, Node}} <- [amqqueue:get_pid(Q)], \
             string:prefix(element(4, amqqueue:get_name(Q)), <<\"{JOBS}.retry.\">>) =/= nomatch]"
        );
        let moved = evaluated(&self.programs[0], &code).await;
        println!("retry queues with their expired jobs, and where they were moved: {moved:?}");
    }

    async fn dead(&self) -> Vec<String> {
        let channel = self.channel(self.leader).await;
        let mut dead = Vec::new();
        let options = BasicGetOptions { no_ack: true };
        while let Some(letter) = channel.basic_get(DEAD.into(), options).await.unwrap() {
            dead.push(String::from_utf8(letter.data.clone()).unwrap());
        }
        dead
    }
}

async fn evaluated(program: &Program, code: &str) -> Option<String> {
    let evaluating = program.eval(code);
    timeout(Duration::from_secs(5), evaluating).await.ok()?
}

fn configure(machine: &Machine, machines: &[Machine], folder: &Folder) -> Program {
    let name = |machine: &Machine| format!("rabbit@{}", machine.address);
    let mut config = "loopback_users = none\n\
                      cluster_formation.peer_discovery_backend = classic_config\n\
                      cluster_partition_handling = pause_minority\n"
        .to_owned();
    for (nth, machine) in machines.iter().enumerate() {
        let key = "cluster_formation.classic_config.nodes";
        config += &format!("{key}.{} = {}\n", nth + 1, name(machine));
    }
    let program = Program {
        folder: folder.of(&machine.address),
        node: name(machine),
        dist_port: 25672,
    };
    // A node that is silent is given up after 11 to 19 s; after a minute by default. Delayed jobs that were on their way
    // back when the majority was lost are sent again after 15 s; after three minutes by default.
    let settings = "[{kernel, [{net_ticktime, 15}]}, \
                    {rabbit, [{dead_letter_worker_publisher_confirm_timeout, 15000}]}].\n";
    program.configure(&config, settings);
    let cookie = program.folder.join(".erlang.cookie");
    fs::write(&cookie, "TOWERSENTINEL").unwrap();
    fs::set_permissions(&cookie, fs::Permissions::from_mode(0o400)).unwrap();
    program
}
