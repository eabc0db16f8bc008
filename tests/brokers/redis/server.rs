//! A private `redis-server`, with its own port and folder.

use std::{
    fs,
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use tower_sentinel::broker::redis::redis::{self, Client, Connection};

use crate::port::free_port;

/// Options with which a replica gets its data at once.
pub(crate) const QUICK: [&str; 2] = ["--repl-diskless-sync-delay", "0"];

pub(crate) struct Server {
    process: Option<Child>,
    folder: PathBuf,
    pub(crate) port: u16,
    options: Vec<String>,
}

impl Server {
    pub(crate) fn start() -> Self {
        Self::with(&[])
    }

    /// Starts a server with further options, in the form of its configuration file.
    pub(crate) fn with(options: &[&str]) -> Self {
        let port = free_port();
        let name = format!("tower-sentinel-redis-{}-{port}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        fs::create_dir_all(&folder).unwrap();
        let mut server = Self {
            process: None,
            folder,
            port,
            options: options.iter().map(|&option| option.to_owned()).collect(),
        };
        server.restart();
        server
    }

    /// Starts the server on the data that it has.
    pub(crate) fn restart(&mut self) {
        assert!(self.process.is_none(), "the server runs");
        let spawned = Command::new("redis-server")
            .args(["--port", &self.port.to_string(), "--bind", "127.0.0.1"])
            .args([
                "--appendonly",
                "yes",
                "--appendfsync",
                "always",
                "--save",
                "",
            ])
            .arg("--dir")
            .arg(&self.folder)
            .args(&self.options)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let process = spawned.unwrap_or_else(|error| {
            panic!("redis-server can't be started ({error}): `apt-get install redis-server`")
        });
        self.process = Some(process);
        for _ in 0..500 {
            if self.is_up() {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
        panic!("redis-server is not up after 10 s");
    }

    /// Kills the server with SIGKILL.
    pub(crate) fn kill(&mut self) {
        let mut process = self.process.take().unwrap();
        process.kill().unwrap();
        process.wait().unwrap();
    }

    pub(crate) fn is_killed(&self) -> bool {
        self.process.is_none()
    }

    /// Stops the server without ending it, so that its connections stay open and silent.
    pub(crate) fn pause(&self) {
        let pid = self.process.as_ref().unwrap().id().to_string();
        let stopped = Command::new("kill").args(["-STOP", &pid]).status();
        assert!(stopped.unwrap().success());
    }

    /// Lets a paused server go on.
    pub(crate) fn resume(&self) {
        let pid = self.process.as_ref().unwrap().id().to_string();
        let resumed = Command::new("kill").args(["-CONT", &pid]).status();
        assert!(resumed.unwrap().success());
    }

    /// Starts a replica of this server, and waits until it has all data.
    pub(crate) fn replica(&self) -> Self {
        let port = self.port.to_string();
        let options = ["--replicaof", "127.0.0.1", &port];
        let replica = Self::with(&[&options[..], &QUICK].concat());
        replica.wait_for("replication", "master_link_status:up");
        self.wait_for("replication", "state=online");
        replica
    }

    /// Waits until a replica has all that was written.
    pub(crate) fn has_replicated(&self) {
        let mut inspect = self.inspect();
        // `WAIT` waits for the writes of its own connection, and for those before.
        let () = redis::cmd("PUBLISH")
            .arg("nobody")
            .arg("")
            .query(&mut inspect)
            .unwrap();
        let confirmed: usize = redis::cmd("WAIT")
            .arg(1)
            .arg(10_000)
            .query(&mut inspect)
            .unwrap();
        assert!(confirmed > 0, "no replica");
    }

    /// Waits until a section of the server's info contains a text.
    pub(crate) fn wait_for(&self, section: &str, text: &str) {
        for _ in 0..1_000 {
            // A sentinel ends connections when it changes what a server is.
            let connected = Client::open(self.url()).unwrap().get_connection();
            let info = connected.and_then(|mut connection| {
                let mut info = redis::cmd("INFO");
                info.arg(section).query::<String>(&mut connection)
            });
            if info.is_ok_and(|info| info.contains(text)) {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
        panic!("no {text} after 20 s");
    }

    /// `127.0.0.1:port`.
    pub(crate) fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://{}", self.host())
    }

    /// Returns a connection to look at the data with.
    pub(crate) fn inspect(&self) -> Connection {
        Client::open(self.url()).unwrap().get_connection().unwrap()
    }

    fn is_up(&self) -> bool {
        let connected = Client::open(self.url())
            .unwrap()
            .get_connection_with_timeout(Duration::from_secs(1));
        let Ok(mut connection) = connected else {
            return false;
        };
        match redis::cmd("PING").query::<String>(&mut connection) {
            Ok(_) => true,
            // It wants a password, so it is up.
            Err(error) => error.code() == Some("NOAUTH"),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.process.is_some() {
            self.kill();
        }
        drop(fs::remove_dir_all(&self.folder));
    }
}
