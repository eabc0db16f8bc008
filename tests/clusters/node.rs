//! A server on a machine of its own.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use tokio::{
    net::TcpStream,
    time::{Instant, sleep, timeout},
};

use crate::{child::now, network::Machine};

/// How long a server may take to start or to stop, on a machine under load.
const PATIENCE: Duration = Duration::from_secs(120);

/// A server that can be killed, paused, stopped and started again; killed when it is dropped.
pub(crate) struct Node {
    pub(crate) machine: Machine,
    command: Command,
    port: u16,
    output: PathBuf,
    /// None while it does not run.
    process: Option<Child>,
}

impl Node {
    /// Starts a server, which will listen at `port`.
    ///
    /// `output` is the file for what it prints.
    pub(crate) fn start(machine: &Machine, port: u16, output: PathBuf, command: Command) -> Self {
        let mut node = Self {
            machine: machine.clone(),
            command,
            port,
            output,
            process: None,
        };
        node.restart();
        node
    }

    /// `address:port`.
    pub(crate) fn host(&self) -> String {
        format!("{}:{}", self.machine.address, self.port)
    }

    /// Starts the server on the data that it has.
    pub(crate) fn restart(&mut self) {
        assert!(self.process.is_none(), "the server runs");
        let mut options = fs::File::options();
        let output = options.create(true).append(true).open(&self.output);
        let output = output.unwrap();
        let process = self
            .command
            .stdin(Stdio::null())
            .stderr(output.try_clone().unwrap())
            .stdout(output)
            .spawn();
        self.process = Some(process.unwrap());
    }

    /// Waits until it listens.
    pub(crate) async fn listens(&mut self) {
        let address = self.host();
        let started = Instant::now();
        loop {
            let connected = timeout(Duration::from_secs(1), TcpStream::connect(&address));
            if let Ok(Ok(_)) = connected.await {
                return;
            }
            let ended = self.process.as_mut().unwrap().try_wait().unwrap();
            if let Some(status) = ended {
                panic!("{address}: {status}: {}", self.printed());
            }
            let is_patient = started.elapsed() < PATIENCE;
            assert!(is_patient, "{address} is not up: {}", self.printed());
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// Kills the server with SIGKILL.
    pub(crate) fn kill(&mut self) {
        let mut process = self.process.take().unwrap();
        process.kill().unwrap();
        process.wait().unwrap();
    }

    /// Stops the server with SIGSTOP, so that its connections stay open and silent.
    pub(crate) fn hang(&self) {
        self.signal("STOP");
    }

    /// Ends the [hang](Self::hang).
    pub(crate) fn resume(&self) {
        self.signal("CONT");
    }

    /// Stops the server with SIGTERM, and waits until it has ended.
    pub(crate) async fn stop(&mut self) {
        self.signal("TERM");
        let mut process = self.process.take().unwrap();
        let started = Instant::now();
        while process.try_wait().unwrap().is_none() {
            let is_patient = started.elapsed() < PATIENCE;
            assert!(is_patient, "{} does not stop", self.host());
            sleep(Duration::from_millis(20)).await;
        }
    }

    fn signal(&self, name: &str) {
        let pid = self.process.as_ref().unwrap().id().to_string();
        let name = format!("-{name}");
        let signalled = Command::new("kill").args([&name, &pid]).status();
        assert!(signalled.unwrap().success());
    }

    fn printed(&self) -> String {
        fs::read_to_string(&self.output).unwrap_or_default()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            drop(process.kill());
            drop(process.wait());
        }
    }
}

/// A folder for the nodes of a cluster; removed when it is dropped.
pub(crate) struct Folder(PathBuf);

impl Folder {
    pub(crate) fn new(cluster: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let nth = COUNT.fetch_add(1, Ordering::Relaxed);
        // Not the id of the process, which one in another tree of .ci/in-suite may have too.
        let name = format!("cluster-{cluster}-{}-{nth}", now().as_nanos());
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        fs::create_dir_all(&folder).unwrap();
        Self(folder)
    }

    /// Returns the folder of a node.
    pub(crate) fn of(&self, node: impl std::fmt::Display) -> PathBuf {
        let folder = self.0.join(node.to_string());
        fs::create_dir_all(&folder).unwrap();
        folder
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}
