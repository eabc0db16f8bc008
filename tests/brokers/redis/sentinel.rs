//! Redis Sentinel: the primary is found, and found again after a failover.

use std::{
    fs,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use futures_util::StreamExt;
use tokio::time::{Instant, sleep, timeout};
use tower_sentinel::{
    Verdict,
    broker::redis::{
        ConnectError, SubscriptionError,
        redis::{Client, Connection, RedisResult, cmd},
    },
    consumer::Connect,
};

use super::{
    add, group, next, pending,
    server::{QUICK, Server},
    settle,
    work::{Work, publish},
};
use crate::port::free_port;

/// The name of the primary. A host would be in lower case.
const NAME: &str = "My_Primary";

/// A private sentinel.
struct Sentinel {
    process: Child,
    folder: PathBuf,
    port: u16,
}

impl Sentinel {
    /// Starts one that watches a server, with further lines of its configuration.
    fn start(server: &Server, quorum: usize, lines: &str) -> Self {
        let port = free_port();
        let name = format!("tower-sentinel-watch-{}-{port}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        fs::create_dir_all(&folder).unwrap();
        let file = folder.join("sentinel.conf");
        let configuration = format!(
            "port {port}\nbind 127.0.0.1\ndir {}\n\
             sentinel monitor {NAME} 127.0.0.1 {} {quorum}\n\
             sentinel down-after-milliseconds {NAME} 1000\n\
             sentinel failover-timeout {NAME} 5000\n{lines}\n",
            folder.display(),
            server.port,
        );
        fs::write(&file, configuration).unwrap();
        let process = Command::new("redis-server")
            .arg(&file)
            .arg("--sentinel")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let sentinel = Self {
            process,
            folder,
            port,
        };
        while sentinel.try_inspect().is_err() {
            std::thread::sleep(Duration::from_millis(20));
        }
        sentinel
    }

    fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    fn url(&self) -> String {
        format!("redis://{}", self.host())
    }

    fn try_inspect(&self) -> RedisResult<Connection> {
        Client::open(self.url())?.get_connection_with_timeout(Duration::from_secs(1))
    }

    /// Returns the port of the primary.
    fn primary(&self) -> u16 {
        let named: (String, u16) = cmd("SENTINEL")
            .arg("GET-MASTER-ADDR-BY-NAME")
            .arg(NAME)
            .query(&mut self.try_inspect().unwrap())
            .unwrap();
        named.1
    }

    /// Begins a failover, as soon as the sentinel has asked the replica for its state.
    async fn fail_over(&self) {
        loop {
            let begun: RedisResult<()> = cmd("SENTINEL")
                .arg("FAILOVER")
                .arg(NAME)
                .query(&mut self.try_inspect().unwrap());
            match begun {
                Err(error) if error.code() == Some("NOGOODSLAVE") => {
                    sleep(Duration::from_millis(50)).await;
                }
                begun => return begun.unwrap(),
            }
        }
    }

    /// Waits until it knows the others and the replica.
    async fn is_ready(&self, sentinels: &str) {
        loop {
            let info: String = cmd("INFO")
                .arg("sentinel")
                .query(&mut self.try_inspect().unwrap())
                .unwrap();
            if info.contains(&format!("slaves=1,sentinels={sentinels}")) {
                return;
            }
            sleep(Duration::from_millis(50)).await;
        }
    }
}

impl Drop for Sentinel {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
        fs::remove_dir_all(&self.folder).ok();
    }
}

#[tokio::test]
async fn the_primary_is_found_by_its_name() {
    let server = Server::start();
    let sentinel = Sentinel::start(&server, 1, "");
    add(&mut server.inspect(), "one");
    // With an address that is down before or after it.
    let sentinels = [format!("redis://127.0.0.1:{}", free_port()), sentinel.url()];
    let mut deliveries = group().connect_sentinel(&sentinels, NAME).await.unwrap();
    settle(&next(&mut deliveries).await, Verdict::Ack)
        .await
        .unwrap();
    assert_eq!(pending(&mut server.inspect()), 0);
}

#[tokio::test]
async fn a_sentinel_that_knows_no_such_primary_is_named() {
    let server = Server::start();
    let sentinel = Sentinel::start(&server, 1, "");
    for (place, url) in [
        (sentinel.host(), sentinel.url()),
        (server.host(), server.url()),
    ] {
        let error = group().connect_sentinel(&url, "other").await.unwrap_err();
        assert!(matches!(error, ConnectError::NoPrimary { .. }), "{error}");
        let message = error.to_string();
        let own = format!("the redis sentinel at {place} names no primary of \"other\"");
        assert_eq!(message, own);
    }
    for name in [
        "redis://user:s3cr3t@primary:6379",
        "",
        "user:s3/cr3t@primary",
    ] {
        let error = group()
            .connect_sentinel(sentinel.url(), name)
            .await
            .unwrap_err();
        assert!(matches!(error, ConnectError::InvalidAddress(_)), "{error}");
        assert!(!format!("{error:#}").contains("cr3t"), "{error:#}");
    }
}

#[tokio::test]
async fn the_sentinels_and_the_primary_have_their_own_passwords() {
    let server = Server::with(&["--requirepass", "of-server"]);
    let lines = format!("requirepass of-sentinel\nsentinel auth-pass {NAME} of-server");
    let sentinel = Sentinel::start(&server, 1, &lines);
    let url = |password: &str| format!("redis://:{password}@{}", sentinel.host());
    let primary = |password: &str| format!("redis://:{password}@{NAME}");
    let right = (url("of-sentinel"), primary("of-server"));
    assert!(group().connect_sentinel(&right.0, &right.1).await.is_ok());
    for (url, primary, denies) in [
        (url("of-server"), primary("of-server"), sentinel.host()),
        (url("of-sentinel"), primary("of-sentinel"), server.host()),
    ] {
        let error = group().connect_sentinel(&url, &primary).await.unwrap_err();
        let message = format!("{error:#}");
        let denied = format!("redis at {denies} refuses the credentials");
        assert!(message.contains(&denied), "{message}");
        let connector = group().connector_sentinel(&url, &primary);
        for text in [message, format!("{error:?}"), format!("{connector:?}")] {
            assert!(!text.contains("of-"), "{text}");
        }
    }
}

#[tokio::test]
async fn the_answer_of_a_sentinel_that_is_out_of_date_is_not_used() {
    let primary = Server::with(&QUICK);
    let replica = primary.replica();
    // Alone it can't decide on a failover.
    let stale = Sentinel::start(&replica, 2, "");
    let current = Sentinel::start(&primary, 2, "");
    assert_eq!(stale.primary(), replica.port);
    let impatient = group().failover_timeout(Duration::ZERO);
    let error = impatient
        .connect_sentinel(stale.url(), NAME)
        .await
        .unwrap_err();
    let message = format!("{error:#}");
    let own = format!(
        "the primary of \"{NAME}\" by the redis sentinel at {} can't be used: \
         redis at {} is a read-only replica: ",
        stale.host(),
        replica.host(),
    );
    assert!(message.starts_with(&own), "{message}");
    let both = [stale.url(), current.url()];
    let connector = impatient.connector_sentinel(&both, NAME);
    for _ in 0..2 {
        let mut connector = connector.clone();
        let connecting = connector.connect(1);
        assert!(connecting.await.is_ok());
    }
}

#[tokio::test]
async fn a_primary_that_is_killed_is_replaced_and_no_job_is_lost() {
    let mut primary = Server::with(&QUICK);
    let replica = primary.replica();
    let sentinels: Vec<_> = (0..3).map(|_| Sentinel::start(&primary, 2, "")).collect();
    for sentinel in &sentinels {
        sentinel.is_ready("3").await;
    }
    let urls: Vec<_> = sentinels.iter().map(Sentinel::url).collect();
    let group = group().min_idle(Duration::from_secs(2));
    let work = Work::start(group.connector_sentinel(&urls, NAME));
    let servers = [primary.url(), replica.url()];
    let mut jobs = publish(&servers[..1], "before", 200).await;
    primary.has_replicated();
    primary.kill();
    while sentinels[0].primary() != replica.port {
        sleep(Duration::from_millis(10)).await;
    }
    let replaced = Instant::now();
    jobs.extend(publish(&servers[1..], "after", 1).await);
    work.has_done(&jobs[200..]).await;
    println!("first job {:?} after the failover", replaced.elapsed());
    work.has_done(&jobs).await;

    // The old primary comes back, and becomes a replica.
    primary.restart();
    primary.wait_for("replication", "role:slave");
    jobs.extend(publish(&servers[1..], "later", 100).await);
    work.has_done(&jobs).await;
    work.end().await;
    assert_eq!(pending(&mut replica.inspect()), 0);
}

/// The old primary stays a primary for some ten seconds, and takes what is lost then.
#[tokio::test]
async fn a_primary_that_is_replaced_and_alive_is_left() {
    let primary = Server::with(&QUICK);
    let replica = primary.replica();
    let sentinel = Sentinel::start(&primary, 1, "");
    sentinel.is_ready("1").await;
    let mut connector = group().connector_sentinel(sentinel.url(), NAME);
    let mut deliveries = connector.connect(1).await.unwrap();
    sentinel.fail_over().await;
    let ended = timeout(Duration::from_secs(60), deliveries.next()).await;
    let error = ended.unwrap().unwrap().unwrap_err();
    let host = replica.host();
    assert!(
        matches!(&error, SubscriptionError::Replaced { primary } if *primary == host),
        "{error:?}"
    );
    add(&mut replica.inspect(), "one");
    let mut deliveries = connector.connect(1).await.unwrap();
    next(&mut deliveries).await;
}
