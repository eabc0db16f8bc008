//! `examples/worker.rs`.

use std::{
    fs::{self, File},
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use futures_util::future::join_all;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{sleep, timeout},
};
use tower_sentinel::broker::rabbitmq::{
    connect,
    lapin::{
        BasicProperties, Channel,
        options::{
            BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions, QueueDeleteOptions,
        },
        types::FieldTable,
    },
};

use super::{example, rabbitmq::counts};
use crate::{port::free_port, rabbitmq::server::shared};

const ORDERS: u64 = 400;

/// A worker, and the file that it logs to.
struct Worker {
    child: Child,
    log: PathBuf,
    probes: u16,
}

impl Worker {
    fn start(queue: &str) -> Self {
        let probes = free_port();
        // Another suite may be tested at the same time.
        let name = format!("{queue}-{}-{probes}.log", std::process::id());
        let log = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
        let child = example("worker")
            .args(["--queue", queue])
            .env("PROBE_ADDR", format!("127.0.0.1:{probes}"))
            .env("AMQP_ADDR", shared().address())
            .env("PREFETCH", "4")
            .env_remove("RUST_LOG")
            .stdout(Stdio::null())
            .stderr(File::create(&log).unwrap())
            .spawn()
            .unwrap();
        Self { child, log, probes }
    }

    /// Returns the status line of a probe.
    async fn probe(&self, path: &str) -> String {
        let mut client = TcpStream::connect(("127.0.0.1", self.probes))
            .await
            .unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: worker\r\nConnection: close\r\n\r\n");
        client.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        answer.lines().next().unwrap_or_default().to_owned()
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// Returns how many orders it has sent.
    fn sent(&self) -> u64 {
        let log = self.log();
        log.lines().filter(|line| line.contains(" sent ")).count() as u64
    }

    async fn until(&mut self, condition: impl Fn(&Self) -> bool) {
        // Cargo may have to build it first.
        let limit = Duration::from_secs(600);
        let waiting = timeout(limit, async {
            while !condition(self) {
                let ended = self.child.try_wait().unwrap();
                assert_eq!(ended, None, "{}", self.log());
                sleep(Duration::from_millis(50)).await;
            }
        });
        let waited = waiting.await;
        assert!(waited.is_ok(), "{}", self.log());
    }

    async fn end(&mut self) -> ExitStatus {
        let ending = timeout(Duration::from_secs(30), async {
            loop {
                match self.child.try_wait().unwrap() {
                    Some(status) => break status,
                    None => sleep(Duration::from_millis(50)).await,
                }
            }
        });
        let ended = ending.await;
        ended.unwrap_or_else(|_| panic!("it goes on: {}", self.log()))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Fails, and has nothing to do, if it has ended.
        self.child.kill().ok();
        self.child.wait().ok();
        fs::remove_file(&self.log).ok();
    }
}

/// Publishes messages, and waits until all are confirmed.
async fn publish(channel: &Channel, queue: &str, bodies: impl Iterator<Item = &str>) {
    let publishing = bodies.map(|body| publish_one(channel, queue, body));
    // At once: the worker should not be done before the last of them.
    join_all(publishing).await;
}

async fn publish_one(channel: &Channel, queue: &str, body: &str) {
    let options = BasicPublishOptions::default();
    let properties = BasicProperties::default();
    let confirm = channel
        .basic_publish(
            "".into(),
            queue.into(),
            options,
            body.as_bytes(),
            properties,
        )
        .await
        .unwrap();
    assert!(confirm.await.unwrap().is_ack());
}

/// Asks the broker how many messages of `queue` are ready.
async fn ready(channel: &Channel, queue: &str) -> u64 {
    let passive = QueueDeclareOptions::default().passive();
    let queue = channel
        .queue_declare(queue.into(), passive, FieldTable::default())
        .await;
    queue.unwrap().message_count().into()
}

#[tokio::test]
async fn sigterm_lets_the_worker_finish_and_leaves_nothing_unacked() {
    let (queue, dead_letters) = ("example-worker", "example-worker.dead");
    let mut worker = Worker::start(queue);
    // It has declared its queue then, without which the broker drops published jobs.
    worker
        .until(|worker| worker.log().contains("subscribed to a queue"))
        .await;

    let connection = connect(&shared().address()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    let confirms = ConfirmSelectOptions::default();
    channel.confirm_select(confirms).await.unwrap();
    let bad = ["no json", r#"{"article": "air", "quantity": 0}"#];
    let orders = (0..ORDERS).map(|_| r#"{"article": "tea", "quantity": 2}"#);
    publish(&channel, queue, bad.into_iter().chain(orders)).await;
    worker.until(|worker| worker.sent() >= 10).await;
    assert_eq!(worker.probe("/livez").await, "HTTP/1.1 200 OK");
    assert_eq!(worker.probe("/readyz").await, "HTTP/1.1 200 OK");

    let pid = worker.child.id().to_string();
    let sent = Command::new("kill").args(["-TERM", &pid]).status();
    assert!(sent.unwrap().success());
    let status = worker.end().await;
    assert!(status.success(), "{status}: {}", worker.log());

    // The jobs that were sent are acked, and all others are ready.
    let (left, sent) = (ready(&channel, queue).await, worker.sent());
    assert!(left > 0, "the signal came too late to interrupt anything");
    assert_eq!(left + sent, ORDERS, "{}", worker.log());
    assert_eq!(ready(&channel, dead_letters).await, 2);
    // A quorum queue reports its unacked messages every 5 s.
    let settled = timeout(Duration::from_secs(30), async {
        while counts(queue) != Some((left, 0)) {
            sleep(Duration::from_millis(200)).await;
        }
    });
    assert!(settled.await.is_ok(), "{:?}", counts(queue));

    for queue in [queue, dead_letters] {
        let options = QueueDeleteOptions::default();
        channel.queue_delete(queue.into(), options).await.unwrap();
    }
}
