//! Machines with their own addresses on one network: network namespaces on a bridge.

use std::{
    env,
    process::Command,
    sync::atomic::{AtomicU8, Ordering},
};

/// A network of machines; removed when it is dropped.
pub(crate) struct Network {
    number: u8,
    machines: u8,
}

/// One of the machines of a [`Network`], which can be cut off.
#[derive(Clone, Debug)]
pub(crate) struct Machine {
    pub(crate) address: String,
    namespace: String,
    /// The end of its link at the bridge.
    link: String,
}

impl Network {
    /// Creates a network of this many machines. The test process reaches them all.
    pub(crate) fn new(machines: u8) -> Self {
        static COUNT: AtomicU8 = AtomicU8::new(1);
        assert!(
            env::var_os("IN_SUITE").is_some(),
            "clusters want root, and namespaces of their own, in a tree that .ci/make-suite makes: run \
             this test by .ci/in-suite, as tests/clusters/main.rs shows"
        );
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let network = Self { number, machines };
        let bridge = network.bridge();
        ip(&format!("link add {bridge} type bridge"));
        ip(&format!("address add 10.{number}.0.254/24 dev {bridge}"));
        ip(&format!("link set {bridge} up"));
        for Machine {
            address,
            namespace,
            link,
        } in network.machines()
        {
            ip(&format!("netns add {namespace}"));
            ip(&format!(
                "link add {link} type veth peer name eth0 netns {namespace}"
            ));
            ip(&format!("link set {link} master {bridge} up"));
            ip(&format!("-n {namespace} address add {address}/24 dev eth0"));
            ip(&format!("-n {namespace} link set eth0 up"));
            ip(&format!("-n {namespace} link set lo up"));
        }
        network
    }

    pub(crate) fn machines(&self) -> Vec<Machine> {
        let number = self.number;
        let machine = |nth| Machine {
            address: format!("10.{number}.0.{nth}"),
            namespace: format!("cluster{number}-{nth}"),
            link: format!("to{number}-{nth}"),
        };
        (1..=self.machines).map(machine).collect()
    }

    fn bridge(&self) -> String {
        format!("bridge{}", self.number)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // The links go with their namespaces.
        for machine in self.machines() {
            run_ip(&format!("netns delete {}", machine.namespace));
        }
        run_ip(&format!("link delete {}", self.bridge()));
    }
}

impl Machine {
    /// Returns a command that runs a program on this machine.
    pub(crate) fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        // Not `ip netns exec`, which would give it other mounts.
        let mut command = Command::new("nsenter");
        let namespace = &self.namespace;
        command
            .arg(format!("--net=/run/netns/{namespace}"))
            .arg(program);
        command
    }

    /// Loses all packets to and from this machine, silently.
    pub(crate) fn cut(&self) {
        ip(&format!("link set {} down", self.link));
    }

    /// Ends the [cut](Self::cut).
    pub(crate) fn join(&self) {
        ip(&format!("link set {} up", self.link));
    }
}

fn ip(arguments: &str) {
    assert!(run_ip(arguments), "ip {arguments}");
}

fn run_ip(arguments: &str) -> bool {
    let status = Command::new("ip").args(arguments.split(' ')).status();
    status
        .expect("`ip` is in a tree of .ci/make-suite")
        .success()
}
