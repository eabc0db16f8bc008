//! A private `nats-server` with JetStream.

use std::{
    fs,
    io::ErrorKind,
    net::{SocketAddr, TcpStream},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::Duration,
};
use tokio::time::{Instant, sleep};

use crate::port::free_port;

/// Longest time until a server listens, on a machine that is busy.
const START: Duration = Duration::from_secs(60);

/// A server with its own port and its own folder.
pub(crate) struct Server {
    port: u16,
    folder: PathBuf,
    arguments: Vec<String>,
    /// None while it is killed.
    process: Option<Child>,
}

impl Server {
    pub(crate) fn start() -> Self {
        Self::start_with(&[])
    }

    pub(crate) fn start_with(arguments: &[&str]) -> Self {
        Self::new(free_port(), arguments)
    }

    /// Starts a server at a port that is free.
    pub(crate) fn start_at(port: u16) -> Self {
        Self::new(port, &[])
    }

    fn new(port: u16, arguments: &[&str]) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let nth = COUNT.fetch_add(1, Ordering::Relaxed);
        // A test in another tree of .ci/in-suite may have the same id.
        let name = format!("nats-{}-{nth}-{port}", std::process::id());
        let mut server = Self {
            port,
            folder: PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name),
            arguments: arguments.iter().map(ToString::to_string).collect(),
            process: None,
        };
        server.restart();
        server
    }

    /// `127.0.0.1:port`.
    pub(crate) fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// `nats://127.0.0.1:port`.
    pub(crate) fn url(&self) -> String {
        format!("nats://{}", self.address())
    }

    /// Sends a signal, such as `USR2`, which begins the lame-duck mode.
    pub(crate) fn signal(&self, name: &str) {
        let process = self.process.as_ref().expect("the server runs");
        let mut kill = Command::new("kill");
        let status = kill.args(["-s", name, &process.id().to_string()]).status();
        assert!(status.unwrap().success());
    }

    /// Waits until the process has ended by itself.
    pub(crate) async fn join(&mut self) {
        let mut process = self.process.take().expect("the server runs");
        while process.try_wait().unwrap().is_none() {
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Kills the process with SIGKILL.
    pub(crate) fn kill(&mut self) {
        let mut process = self.process.take().expect("the server runs");
        process.kill().unwrap();
        process.wait().unwrap();
    }

    /// Starts the process again on the same port and the same data, and waits until it listens.
    pub(crate) fn restart(&mut self) {
        assert!(self.process.is_none(), "the server was killed");
        let process = Command::new("nats-server")
            .args(["-js", "-a", "127.0.0.1", "-p", &self.port.to_string()])
            .arg("-sd")
            .arg(&self.folder)
            .arg("-l")
            .arg(self.log())
            .args(&self.arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let process = self.process.insert(match process {
            Ok(process) => process,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                panic!("nats-server is not installed: apt-get install nats-server")
            }
            Err(error) => panic!("nats-server can't be started: {error}"),
        });
        let address = SocketAddr::from(([127, 0, 0, 1], self.port));
        let started = Instant::now();
        while process.try_wait().unwrap().is_none() && started.elapsed() < START {
            if TcpStream::connect(address).is_ok() {
                return;
            }
            thread::sleep(Duration::from_millis(25));
        }
        let log = fs::read_to_string(self.log()).unwrap_or_default();
        panic!("nats-server does not listen at {address}:\n{log}");
    }

    fn log(&self) -> PathBuf {
        self.folder.with_extension("log")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            drop(process.kill());
            drop(process.wait());
        }
        drop(fs::remove_dir_all(&self.folder));
        drop(fs::remove_file(self.log()));
    }
}
