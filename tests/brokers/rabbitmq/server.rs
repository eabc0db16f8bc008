//! A private `rabbitmq-server`, with its own ports, data, node name and Erlang cookie.

use std::{
    fs,
    future::Future,
    io::Write,
    net::TcpStream,
    process::{Child, Command, Output, Stdio},
    sync::OnceLock,
    thread,
    time::Duration,
};

use tokio::time::sleep;

use super::program::{Program, program};
use crate::{conformance::verdicts, port::free_port};

/// Kills the server when its standard input ends, which it does with the test process, however
/// that ends.
const GUARD: &str = r#"
"$0" >"$1/stdout" 2>&1 & server=$!
read -r word
kill -9 "$server"
wait "$server" 2>/dev/null
[ "$word" = keep ] || rm -rf "$1"
"#;

pub(crate) struct Server {
    guard: Option<Child>,
    program: Program,
    port: u16,
}

/// Returns the server that the tests of this process share, as it takes seconds to start one.
pub(crate) fn shared() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| Server::start(""))
}

/// A release of RabbitMQ, by major and minor version, as tests distinguish them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Version(pub(crate) u32, pub(crate) u32);

impl Version {
    /// Khepri keeps the metadata. Quorum queues don't count a `basic.nack`, and have a consumer
    /// timeout of their own.
    pub(crate) const V4_3: Self = Self(4, 3);
}

/// Returns the version of the servers that are started here.
pub(crate) fn version() -> Version {
    static VERSION: OnceLock<Version> = OnceLock::new();
    *VERSION.get_or_init(|| {
        let mut command = Command::new(program("rabbitmqctl"));
        command.arg("version").env("HOME", std::env::temp_dir());
        let (major, minor) = verdicts::version(&verdicts::printed(&mut command));
        Version(major, minor)
    })
}

impl Server {
    /// Starts a server with `settings` for its application `rabbit`, as Erlang terms.
    pub(crate) fn start(settings: &str) -> Self {
        let (port, dist_port) = (free_port(), free_port());
        let name = format!("tower-sentinel-rabbitmq-{}-{port}", std::process::id());
        let program = Program {
            folder: std::env::temp_dir().join(name),
            node: format!("sentinel-{port}@localhost"),
            dist_port,
        };
        let listener = format!("listeners.tcp.local = 127.0.0.1:{port}\n");
        program.configure(&listener, &format!("[{{rabbit, [{settings}]}}].\n"));
        let mut server = Self {
            guard: None,
            program,
            port,
        };
        server.restart();
        server
    }

    /// Starts the server on the data that it has.
    pub(crate) fn restart(&mut self) {
        assert!(self.guard.is_none(), "the server runs");
        let dump = self.program.folder.join("erl_crash.dump");
        drop(fs::remove_file(&dump));
        self.spawn();
        for _ in 0..1200 {
            if TcpStream::connect(("127.0.0.1", self.port)).is_ok() {
                return;
            }
            // A node that is killed may still have its name when the next one asks for it, and that one
            // dies of it.
            if fs::remove_file(&dump).is_ok() {
                self.kill();
                self.spawn();
            }
            thread::sleep(Duration::from_millis(100));
        }
        let output = fs::read_to_string(self.program.folder.join("stdout")).unwrap_or_default();
        panic!("rabbitmq-server is not up after 2 min:\n{output}");
    }

    fn spawn(&mut self) {
        let mut command = Command::new("sh");
        command
            .args(["-c", GUARD])
            .arg(program("rabbitmq-server"))
            .arg(&self.program.folder)
            .stdin(Stdio::piped());
        self.guard = Some(self.program.settle(&mut command).spawn().unwrap());
    }

    /// Waits until the server has written down which queues are declared. "Queues that are new" in the
    /// documentation of the adapter describes the loss in a kill before that.
    ///
    /// For `queue` it has more to write if it is a quorum queue: its name in a file of ra, half a second to a
    /// second after it confirms the declaration. If it is killed before that, it starts the queue anew, and
    /// empty. Khepri itself, which keeps the metadata from 4.3 on, has a declaration in its log before it
    /// confirms it.
    pub(crate) fn has_written(
        &self,
        queue: &str,
        is_quorum: bool,
    ) -> impl Future<Output = ()> + use<> {
        let dumping = (version() < Version::V4_3).then(|| self.eval("mnesia:dump_log()"));
        let node = &self.program.node;
        let names = format!("data/{node}/quorum/{node}/names.dets");
        let names = self.program.folder.join(names);
        let name = format!("%2F_{queue}");
        // Its length comes first, so that no longer name is taken for it.
        let entry = [&[name.len() as u8], name.as_bytes()].concat();
        async move {
            if let Some(dumping) = dumping {
                assert_eq!(dumping.await.as_deref(), Some("dumped"));
            }
            if !is_quorum {
                return;
            }
            for _ in 0..400 {
                let written = fs::read(&names).unwrap_or_default();
                if written.windows(entry.len()).any(|part| part == entry) {
                    return;
                }
                sleep(Duration::from_millis(25)).await;
            }
            panic!("{name} is not in {names:?} after 10 s");
        }
    }

    /// Kills the server with SIGKILL; its data stay.
    pub(crate) fn kill(&mut self) {
        let mut guard = self.guard.take().unwrap();
        let mut stdin = guard.stdin.take().unwrap();
        stdin.write_all(b"keep\n").unwrap();
        guard.wait().unwrap();
    }

    /// Stops the server without ending it, or lets it go on.
    pub(crate) fn freeze(&self, freezes: bool) {
        let pid = fs::read_to_string(self.program.folder.join("pid")).unwrap();
        let signal = if freezes { "-STOP" } else { "-CONT" };
        let status = Command::new("kill").args([signal, pid.trim()]).status();
        assert!(status.unwrap().success());
    }

    /// `127.0.0.1:port`.
    pub(crate) fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub(crate) fn address(&self) -> String {
        self.address_of("guest", "guest")
    }

    /// With a long heartbeat: [`ctl`](Self::ctl) blocks the runtime, for many seconds on a busy machine.
    pub(crate) fn address_of(&self, user: &str, password: &str) -> String {
        let host = self.host();
        format!("amqp://{user}:{password}@{host}/%2f?heartbeat=60")
    }

    /// Runs `rabbitmqctl` and returns its output. It blocks the runtime; see [`list`](Self::list).
    pub(crate) fn ctl(&self, arguments: &[&str]) -> String {
        printed(arguments, self.rabbitmqctl(arguments).output().unwrap())
    }

    /// Runs `rabbitmqctl` while the runtime goes on.
    pub(crate) async fn list(&self, arguments: &[&str]) -> String {
        let mut command = tokio::process::Command::from(self.rabbitmqctl(arguments));
        printed(arguments, command.output().await.unwrap())
    }

    fn rabbitmqctl(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(program("rabbitmqctl"));
        command.arg("--quiet").args(arguments);
        self.program.settle(&mut command);
        command
    }

    /// Evaluates Erlang expressions in the server; see [`Program::eval`].
    pub(crate) fn eval(&self, code: &str) -> impl Future<Output = Option<String>> + use<> {
        self.program.eval(code)
    }

    /// Lets the server close the connection that has `name`.
    pub(crate) fn close_connection(&self, name: &str) {
        let list = ["list_connections", "pid", "client_properties"];
        let name = format!("\"{name}\"");
        // It is listed a moment after it was opened.
        for _ in 0..50 {
            let connections = self.ctl(&list);
            let mut rows = connections.lines().filter_map(|row| row.split_once('\t'));
            if let Some((pid, _)) = rows.find(|(_, properties)| properties.contains(&name)) {
                self.ctl(&["close_connection", pid, "closed by the test"]);
                return;
            }
        }
        panic!("there is no connection {name}");
    }
}

fn printed(arguments: &[&str], output: Output) -> String {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "rabbitmqctl {arguments:?}: {errors}"
    );
    String::from_utf8(output.stdout).unwrap()
}

impl Drop for Server {
    fn drop(&mut self) {
        match self.guard.take() {
            Some(mut guard) => {
                drop(guard.stdin.take());
                drop(guard.wait());
            }
            None => drop(fs::remove_dir_all(&self.program.folder)),
        }
    }
}
