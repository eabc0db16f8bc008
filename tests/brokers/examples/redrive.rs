//! `examples/redrive.rs`.

use std::{
    io::{BufRead, BufReader},
    process::{Command, Output, Stdio},
    sync::Once,
};

use serde_json::Value;
use tower_sentinel::broker::{
    nats::{
        async_nats::{
            HeaderMap,
            jetstream::{self, stream},
        },
        connect,
    },
    rabbitmq::{
        self,
        lapin::{
            BasicProperties,
            options::{BasicPublishOptions, QueueDeclareOptions},
            types::{AMQPValue, FieldTable},
        },
    },
    redis::redis::{Commands, Connection, cmd},
};

use super::{built, example};
use crate::{
    nats::server::Server as NatsServer, rabbitmq::server::shared,
    redis::server::Server as RedisServer,
};

const DEAD: &str = "{jobs}:workers:dead";

fn redrive(address: &str, dead: &str, arguments: &[&str]) -> Command {
    static BUILT: Once = Once::new();
    // Cargo takes a second to find out that there is nothing to build, and it is run often here.
    BUILT.call_once(|| {
        let help = example("redrive").arg("--help").output().unwrap();
        assert!(help.status.success(), "{help:?}");
    });
    let mut example = built("redrive");
    example
        .env("RUST_LOG", "off")
        .env("BROKER_ADDR", address)
        .arg(dead)
        .args(arguments);
    example
}

fn run(mut command: Command) -> (i32, String, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code().unwrap(), text(stdout), text(stderr))
}

/// Runs it, and returns its exit code and its last line as JSON.
fn json(command: Command) -> (i32, Value) {
    let (code, stdout, stderr) = run(command);
    let last = stdout.lines().last();
    let last = last.unwrap_or_else(|| panic!("no output: {stderr}"));
    (code, serde_json::from_str(last).unwrap())
}

/// A server of Redis with dead letters of a stream `jobs`.
struct Scene {
    server: RedisServer,
    connection: Connection,
}

impl Scene {
    fn new(letters: usize) -> Self {
        let server = RedisServer::start();
        let mut connection = server.inspect();
        let group = ["CREATE", "jobs", "workers", "0", "MKSTREAM"];
        let () = cmd("XGROUP").arg(&group).query(&mut connection).unwrap();
        let mut scene = Self { server, connection };
        for n in 0..letters {
            let kind = ["failed", "panicked"][n % 2];
            scene.add(kind, "no such table\u{1b}[2J", "jobs", "0");
        }
        scene
    }

    fn add(&mut self, kind: &str, message: &str, destination: &str, redriven: &str) {
        let fields = [
            ("payload", "s3cret payload"),
            ("x-outcome-kind", kind),
            ("x-outcome-message", message),
            ("x-outcome-time", "1700000000000"),
            ("x-deliveries", "5"),
            ("x-original-destination", destination),
            ("x-redriven", redriven),
        ];
        let _: String = self.connection.xadd(DEAD, "*", &fields).unwrap();
    }

    fn redrive(&self, arguments: &[&str]) -> Command {
        redrive(&self.server.url(), DEAD, arguments)
    }

    fn lengths(&mut self) -> (usize, usize) {
        let jobs = self.connection.xlen("jobs").unwrap();
        (jobs, self.connection.xlen(DEAD).unwrap())
    }
}

#[test]
fn letters_are_listed_without_their_payloads() {
    let mut scene = Scene::new(3);
    let (code, stdout, stderr) = run(scene.redrive(&["list"]));
    assert_eq!((code, &*stderr), (0, ""));
    let lines: Vec<_> = stdout.lines().collect();
    assert_eq!(lines.len(), 4, "{stdout}");
    assert!(lines[0].starts_with("ID "), "{stdout}");
    assert!(lines[1].contains(" failed "), "{stdout}");
    // It must not take over the terminal.
    assert!(
        lines[1].ends_with(" jobs                 no such table [2J"),
        "{stdout}"
    );
    assert!(!stdout.contains("s3cret"), "{stdout}");

    let (code, letter) = json(scene.redrive(&["list", "--json", "--kind", "panicked"]));
    assert_eq!(code, 0);
    assert_eq!(letter["kind"], "panicked");
    assert_eq!(letter["time"], 1_700_000_000);
    assert_eq!(letter["deliveries"], 5);
    assert_eq!(letter["destination"], "jobs");

    let (_, stdout, _) = run(scene.redrive(&["list", "--summary", "--json"]));
    let first = stdout.lines().next().unwrap();
    let first: Value = serde_json::from_str(first).unwrap();
    assert_eq!(
        (&first["count"], &first["kind"]),
        (&2.into(), &"failed".into())
    );
    assert_eq!(scene.lengths(), (0, 3));
}

#[test]
fn letters_are_moved_back_after_a_dry_run() {
    let mut scene = Scene::new(6);
    let dry = ["redrive", "--dry-run", "--json", "--kind", "failed"];
    let (code, tally) = json(scene.redrive(&dry));
    assert_eq!(
        (code, &tally["moved"], &tally["left"]),
        (0, &3.into(), &3.into())
    );
    assert_eq!(scene.lengths(), (0, 6));

    let real = [
        "redrive",
        "--yes",
        "--kind",
        "failed",
        "--older-than",
        "1d",
        "--batch",
        "2",
    ];
    let (code, stdout, stderr) = run(scene.redrive(&real));
    assert_eq!(code, 0, "{stderr}");
    let line = "3 of 6 dead letters moved; 3 do not match, 0 moved back too often, \
                0 without a destination, 0 gone; 3 left\n";
    assert_eq!(stdout, line);
    assert_eq!(scene.lengths(), (3, 3));
}

#[test]
fn letters_that_stay_are_an_exit_code_of_their_own() {
    let mut scene = Scene::new(0);
    scene.add("failed", "no", "nowhere", "0");
    scene.add("failed", "no", "jobs", "3");
    scene.add("failed", "no", "jobs", "2");
    let (code, tally) = json(scene.redrive(&["redrive", "--yes", "--json"]));
    assert_eq!(code, 3);
    let numbers = ["moved", "refused", "unroutable", "left"].map(|it| tally[it].as_u64().unwrap());
    assert_eq!(numbers, [1, 1, 1, 2]);
    let again = ["redrive", "--yes", "--json", "--no-guard", "--to", "jobs"];
    let (code, tally) = json(scene.redrive(&again));
    assert_eq!((code, &tally["moved"]), (0, &2.into()));
    assert_eq!(scene.lengths(), (3, 0));
}

#[test]
fn nothing_is_deleted_without_a_filter_or_unasked() {
    let mut scene = Scene::new(4);
    let (code, _, stderr) = run(scene.redrive(&["purge", "--yes"]));
    assert_eq!((code, &*stderr), (2, "error: set a filter, or --all\n"));
    let (code, _, stderr) = run(scene.redrive(&["purge", "--all"]));
    assert_eq!(code, 1);
    assert_eq!(
        stderr,
        "error: nobody is there to be asked: set --yes or --dry-run\n"
    );
    let (code, _, _) = run(scene.redrive(&["purge", "--kind", "failed", "--older-than", "soon"]));
    assert_eq!(code, 2);
    assert_eq!(scene.lengths(), (0, 4));

    let (code, tally) = json(scene.redrive(&["purge", "--yes", "--json", "--kind", "failed"]));
    assert_eq!(
        (code, &tally["deleted"], &tally["left"]),
        (0, &2.into(), &2.into())
    );
    let (code, tally) = json(scene.redrive(&["purge", "--yes", "--json", "--all"]));
    assert_eq!((code, &tally["deleted"]), (0, &2.into()));
    assert_eq!(scene.lengths(), (0, 0));
}

#[test]
fn ctrl_c_ends_a_run_after_its_batch_and_tells_what_is_left() {
    let mut scene = Scene::new(20);
    let mut command = scene.redrive(&["redrive", "--yes", "--json", "--rate", "4"]);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let first: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
    assert_eq!(
        (&first["event"], &first["moved"]),
        (&"progress".into(), &2.into())
    );
    let mut kill = Command::new("kill");
    kill.args(["-INT", &child.id().to_string()]);
    assert!(kill.status().unwrap().success());
    let last = lines.last().unwrap().unwrap();
    let last: Value = serde_json::from_str(&last).unwrap();
    assert_eq!(last["event"], "end");
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let moved = last["moved"].as_u64().unwrap();
    assert!((2..20).contains(&moved), "{last}");
    assert_eq!(last["left"], 20 - moved);
    assert_eq!(scene.lengths(), (moved as usize, 20 - moved as usize));
}

#[tokio::test]
async fn it_speaks_to_nats() {
    let server = NatsServer::start();
    let context = jetstream::new(connect(&server.address()).await.unwrap());
    for name in ["jobs", "dead"] {
        let config = stream::Config {
            name: name.into(),
            ..stream::Config::default()
        };
        context.create_stream(config).await.unwrap();
    }
    let mut headers = HeaderMap::new();
    headers.insert("x-outcome-kind", "failed");
    headers.insert("x-original-destination", "jobs");
    let sent = context.publish_with_headers("dead", headers, "job".into());
    sent.await.unwrap().await.unwrap();
    let run = redrive(&server.url(), "dead", &["redrive", "--yes", "--json"]);
    let (code, tally) = json(run);
    assert_eq!(
        (code, &tally["moved"], &tally["left"]),
        (0, &1.into(), &0.into())
    );
}

#[tokio::test]
async fn it_speaks_to_rabbitmq() {
    let connection = rabbitmq::connect(&shared().address()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    channel.confirm_select(Default::default()).await.unwrap();
    let names = ["redrive_example", "redrive_example.dead"];
    for name in names {
        let options = QueueDeclareOptions::durable();
        let declared = channel.queue_declare(name.into(), options, FieldTable::default());
        declared.await.unwrap();
    }
    let mut headers = FieldTable::default();
    let text = |text: &str| AMQPValue::LongString(text.into());
    headers.insert("x-outcome-kind".into(), text("failed"));
    headers.insert("x-original-destination".into(), text(names[0]));
    let properties = BasicProperties::default().with_headers(headers);
    let options = BasicPublishOptions::default();
    let sent = channel.basic_publish("".into(), names[1].into(), options, b"job", properties);
    sent.await.unwrap().await.unwrap();
    let address = shared().address();
    let (code, letter) = json(redrive(&address, names[1], &["list", "--json"]));
    assert_eq!((code, &letter["destination"]), (0, &names[0].into()));
    let (code, tally) = json(redrive(&address, names[1], &["redrive", "--yes", "--json"]));
    assert_eq!(
        (code, &tally["moved"], &tally["left"]),
        (0, &1.into(), &0.into())
    );
}

#[test]
fn a_broker_that_is_out_of_reach_is_one_line_without_the_password() {
    for (scheme, name) in [("amqp", "rabbitmq"), ("nats", "nats"), ("redis", "redis")] {
        let address = format!("{scheme}://someone:s3cret@127.0.0.1:1");
        let (code, stdout, stderr) = run(redrive(&address, "dead", &["list"]));
        assert_eq!((code, &*stdout), (1, ""), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
        assert!(
            stderr.starts_with(&format!("error: {name} at 127.0.0.1:1 ")),
            "{stderr}"
        );
        assert!(!stderr.contains("s3cret"), "{stderr}");
    }
    let (code, _, stderr) = run(redrive("me:s3cret@host", "dead", &["list"]));
    assert_eq!(code, 1);
    assert!(!stderr.contains("s3cret"), "{stderr}");
}
