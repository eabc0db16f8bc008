//! The programs of RabbitMQ, for one node with its own folder.

use std::{
    fs,
    future::Future,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use tokio::io::AsyncWriteExt;

/// Settings of a node for all programs: its name, its folder, and its port for other nodes.
pub(crate) struct Program {
    pub(crate) folder: PathBuf,
    /// `name@host`; with a dot in the host, it is a long name.
    pub(crate) node: String,
    pub(crate) dist_port: u16,
}

impl Program {
    /// Creates the node's folder with its configuration.
    pub(crate) fn configure(&self, config: &str, advanced: &str) {
        let folder = &self.folder;
        fs::create_dir_all(folder).unwrap();
        fs::write(folder.join("rabbitmq.conf"), config).unwrap();
        fs::write(folder.join("advanced.config"), advanced).unwrap();
        fs::write(folder.join("plugins"), "[].\n").unwrap();
        // So that the machine's own settings are not read.
        fs::write(folder.join("env.conf"), "").unwrap();
    }

    /// Sets the environment of a program.
    pub(crate) fn settle<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        let folder = |name: &str| self.folder.join(name);
        command
            .env("HOME", &self.folder)
            .env("ERL_CRASH_DUMP", folder("erl_crash.dump"))
            .env("RABBITMQ_NODENAME", &self.node)
            .env("RABBITMQ_USE_LONGNAME", self.has_long_name().to_string())
            .env("RABBITMQ_DIST_PORT", self.dist_port.to_string())
            .env("RABBITMQ_CONFIG_FILE", folder("rabbitmq.conf"))
            .env("RABBITMQ_ADVANCED_CONFIG_FILE", folder("advanced.config"))
            .env("RABBITMQ_CONF_ENV_FILE", folder("env.conf"))
            .env("RABBITMQ_ENABLED_PLUGINS_FILE", folder("plugins"))
            .env("RABBITMQ_GENERATED_CONFIG_DIR", folder("config"))
            .env("RABBITMQ_MNESIA_BASE", folder("data"))
            .env("RABBITMQ_LOG_BASE", folder("log"))
            .env("RABBITMQ_PID_FILE", folder("pid"))
            // Erlang's threads would spin for a while before they sleep, and there are many servers.
            .env(
                "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS",
                "+sbwt none +sbwtdcpu none +sbwtdio none",
            )
            // The script becomes the server then, instead of its parent.
            .env("RUNNING_UNDER_SYSTEMD", "true")
    }

    /// Evaluates Erlang expressions in the server, and returns the value of the last one.
    ///
    /// `None` if the server is down, or the expression fails. Many times faster than `rabbitmqctl`.
    pub(crate) fn eval(&self, code: &str) -> impl Future<Output = Option<String>> + use<> {
        let cookie = fs::read_to_string(self.folder.join(".erlang.cookie")).unwrap();
        let kind = if self.has_long_name() {
            "-name"
        } else {
            "-sname"
        };
        let mut command = tokio::process::Command::new("erl_call");
        command
            .args(["-c", &cookie, kind, &self.node, "-e"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true);
        // Erlang's full stop is one before white space.
        let code = format!("{code}.\n");
        async move {
            let mut calling = command.spawn().expect("erl_call comes with Erlang");
            let mut stdin = calling.stdin.take().unwrap();
            // An error is that of the call.
            drop(stdin.write_all(code.as_bytes()).await);
            drop(stdin);
            let output = calling.wait_with_output().await.unwrap();
            let answer = String::from_utf8(output.stdout).unwrap();
            let value = answer.strip_prefix("{ok, ")?.strip_suffix('}')?;
            output.status.success().then(|| value.to_owned())
        }
    }

    fn has_long_name(&self) -> bool {
        self.node.contains('.')
    }
}

/// Finds the program itself: Debian's wrapper on the path changes the user.
pub(crate) fn program(name: &str) -> PathBuf {
    let debian = Path::new("/usr/lib/rabbitmq/bin").join(name);
    if debian.exists() {
        return debian;
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut programs = std::env::split_paths(&path).map(|folder| folder.join(name));
    programs
        .find(|program| program.exists())
        .unwrap_or_else(|| panic!("{name} is missing: `apt-get install rabbitmq-server`"))
}
