//! A cluster: the server that owns the stream's slot is found, and found again when it changes.

use std::{
    future::poll_fn,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncWriteExt, BufStream},
    net::TcpListener,
    task::JoinSet,
    time::{sleep, timeout},
};
use tower_sentinel::{
    Job, Verdict,
    broker::redis::{
        ConnectError, Deliveries, DeliveryError, SubscriptionError,
        redis::{FromRedisValue, cmd},
    },
    consumer::Subscription,
    settle::{Settle, Unsettled},
};

use super::{
    STREAM, add, delayed, group,
    newer::read,
    next, pending, reason,
    server::{QUICK, Server},
    settle,
    work::{Work, publish},
};
use crate::port::free_port;

/// Three servers, each with a third of the slots, and replicas of them.
struct Cluster {
    servers: Vec<Server>,
    ids: Vec<String>,
    /// The server that owns the slot of the stream, and another one.
    owner: usize,
    other: usize,
    slot: u16,
}

fn cluster<T: FromRedisValue>(server: &Server, words: &[&str]) -> T {
    let mut command = cmd("CLUSTER");
    command.arg(words).query(&mut server.inspect()).unwrap()
}

impl Cluster {
    fn start() -> Self {
        Self::with_replicas(0)
    }

    /// Starts one with this number of replicas, of the first servers.
    fn with_replicas(number: usize) -> Self {
        let servers: Vec<_> = (0..3 + number)
            .map(|_| {
                let bus = free_port().to_string();
                let options = [
                    "--cluster-enabled",
                    "yes",
                    "--cluster-node-timeout",
                    "1000",
                    "--cluster-port",
                    &bus,
                ];
                (Server::with(&[&options[..], &QUICK].concat()), bus)
            })
            .collect();
        for (n, (server, _)) in servers.iter().enumerate() {
            let epoch = (n + 1).to_string();
            let () = cluster(server, &["SET-CONFIG-EPOCH", &epoch]);
        }
        let ends = [0_u16, 5_461, 10_923, 16_384];
        for (n, (server, _)) in servers[..3].iter().enumerate() {
            let (first, last) = (ends[n].to_string(), (ends[n + 1] - 1).to_string());
            let () = cluster(server, &["ADDSLOTSRANGE", &first, &last]);
        }
        for (server, bus) in &servers[1..] {
            let port = server.port.to_string();
            let () = cluster(&servers[0].0, &["MEET", "127.0.0.1", &port, bus]);
        }
        let servers: Vec<_> = servers.into_iter().map(|(server, _)| server).collect();
        let ids: Vec<String> = servers
            .iter()
            .map(|server| cluster(server, &["MYID"]))
            .collect();
        let known = format!("cluster_known_nodes:{}", servers.len());
        for server in &servers {
            wait_for(server, &known);
        }
        for (replica, id) in servers[3..].iter().zip(&ids) {
            let () = cluster(replica, &["REPLICATE", id]);
            replica.wait_for("replication", "master_link_status:up");
        }
        for server in &servers {
            wait_for(server, "cluster_state:ok");
        }
        let slot: u16 = cluster(&servers[0], &["KEYSLOT", STREAM]);
        let owner = (0..3).find(|&n| slot < ends[n + 1]).unwrap();
        Self {
            servers,
            ids,
            owner,
            other: (owner + 1) % 3,
            slot,
        }
    }

    fn owner(&self) -> &Server {
        &self.servers[self.owner]
    }

    fn other(&self) -> &Server {
        &self.servers[self.other]
    }

    fn urls(&self) -> Vec<String> {
        self.servers.iter().map(Server::url).collect()
    }

    /// Lets the owner begin to move the slot to the other server.
    fn begin_move(&self) {
        let slot = self.slot.to_string();
        let (owner, other) = (&self.ids[self.owner], &self.ids[self.other]);
        let () = cluster(self.other(), &["SETSLOT", &slot, "IMPORTING", owner]);
        let () = cluster(self.owner(), &["SETSLOT", &slot, "MIGRATING", other]);
    }

    /// Moves the keys of the slot, and then the slot.
    fn end_move(&self) {
        let slot = self.slot.to_string();
        loop {
            let keys: Vec<String> = cluster(self.owner(), &["GETKEYSINSLOT", &slot, "100"]);
            if keys.is_empty() {
                break;
            }
            let () = cmd("MIGRATE")
                .arg("127.0.0.1")
                .arg(self.other().port)
                .arg("")
                .arg(&["0", "5000", "KEYS"])
                .arg(keys)
                .query(&mut self.owner().inspect())
                .unwrap();
        }
        for server in [self.other(), self.owner()] {
            let () = cluster(server, &["SETSLOT", &slot, "NODE", &self.ids[self.other]]);
        }
    }
}

/// Waits until a line of the server's state of its cluster is this.
fn wait_for(server: &Server, line: &str) {
    for _ in 0..1_000 {
        let info: String = cluster(server, &["INFO"]);
        if info.contains(line) {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("no {line} after 20 s");
}

async fn closed(deliveries: &mut Deliveries) -> SubscriptionError {
    let closed = poll_fn(|cx| Pin::new(&mut *deliveries).poll_closed(cx));
    let closed = timeout(Duration::from_secs(60), closed).await;
    closed.expect("the subscription goes on").unwrap_err()
}

// === Connecting ===

#[tokio::test]
async fn each_server_leads_to_the_owner_with_the_same_password() {
    let cluster = Cluster::start();
    for server in &cluster.servers {
        let () = cmd("CONFIG")
            .arg(&["SET", "requirepass", "s3cr3t"])
            .query(&mut server.inspect())
            .unwrap();
    }
    for server in &cluster.servers {
        let url = format!("redis://:s3cr3t@{}", server.host());
        let owner = format!("redis://:s3cr3t@{}", cluster.owner().host());
        let client = tower_sentinel::broker::redis::redis::Client::open(owner).unwrap();
        add(&mut client.get_connection().unwrap(), "one");
        let mut deliveries = group().connect(url).await.unwrap();
        settle(&next(&mut deliveries).await, Verdict::Ack)
            .await
            .unwrap();
    }
}

#[tokio::test]
async fn an_owner_that_is_down_is_named() {
    let mut cluster = Cluster::start();
    let (owner, other) = (cluster.owner().host(), cluster.other().host());
    let nth = cluster.owner;
    cluster.servers[nth].kill();
    let impatient = group().failover_timeout(Duration::ZERO);
    let error = impatient.connect(cluster.other().url()).await.unwrap_err();
    let message = format!("{error:#}");
    let own = format!(
        "redis at {other} does not own the slot of \"jobs\", {owner} does: \
         redis at {owner} can't be reached: "
    );
    assert!(message.starts_with(&own), "{message}");

    // When the others have noticed it.
    wait_for(cluster.other(), "cluster_state:fail");
    let error = impatient.connect(cluster.other().url()).await.unwrap_err();
    let message = format!("{error:#}");
    let own = format!("redis at {other} can't serve \"jobs\" at present: ");
    assert!(message.starts_with(&own), "{message}");
    assert!(
        matches!(error, ConnectError::Unavailable { .. }),
        "{error:?}"
    );
}

/// Starts a server that knows nothing but another one's place.
fn pointing(serving: &mut JoinSet<()>, listener: TcpListener, owner: String) {
    serving.spawn(async move {
        let mut connections = JoinSet::new();
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let owner = owner.clone();
            connections.spawn(async move {
                let mut stream = BufStream::new(stream);
                while let Some(words) = read(&mut stream).await {
                    let reply = match &*words[0] {
                        "HELLO" => "%1\r\n+proto\r\n:3\r\n".to_owned(),
                        _ => format!("-MOVED 1 {owner}\r\n"),
                    };
                    stream.write_all(reply.as_bytes()).await.unwrap();
                    stream.flush().await.unwrap();
                }
            });
        }
    });
}

#[tokio::test]
async fn servers_that_name_each_other_are_asked_once() {
    let mut serving = JoinSet::new();
    let (one, two) = (
        TcpListener::bind("127.0.0.1:0").await.unwrap(),
        TcpListener::bind("127.0.0.1:0").await.unwrap(),
    );
    let place = |listener: &TcpListener| listener.local_addr().unwrap().to_string();
    let (first, second) = (place(&one), place(&two));
    // An empty host is the same one.
    let port = two.local_addr().unwrap().port();
    pointing(&mut serving, one, format!(":{port}"));
    pointing(&mut serving, two, first.clone());
    let impatient = group().failover_timeout(Duration::ZERO);
    let error = impatient
        .connect(format!("redis://{first}"))
        .await
        .unwrap_err();
    let message = format!("{error:#}");
    let own = format!(
        "redis at {first} does not own the slot of \"jobs\", {second} does: \
         redis at {second} does not own the slot of \"jobs\", {first} does"
    );
    assert_eq!(message, own);
}

#[tokio::test]
async fn an_owner_that_fails_is_tried_once_in_a_round() {
    let mut serving = JoinSet::new();
    let owner = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let place = owner.local_addr().unwrap().to_string();
    let tries = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&tries);
    serving.spawn(async move {
        loop {
            // Each connection is closed at once.
            drop(owner.accept().await.unwrap());
            count.fetch_add(1, Ordering::Relaxed);
        }
    });
    let mut seeds = Vec::new();
    for _ in 0..3 {
        let seed = TcpListener::bind("127.0.0.1:0").await.unwrap();
        seeds.push(format!("redis://{}", seed.local_addr().unwrap()));
        pointing(&mut serving, seed, place.clone());
    }
    let impatient = group().failover_timeout(Duration::ZERO);
    let error = impatient.connect(&seeds).await.unwrap_err();
    let message = error.to_string();
    let told = format!("redis at {place} can't be reached");
    assert_eq!(message.matches(&told).count(), 3, "{message}");
    assert_eq!(tries.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn dead_letters_on_another_server_are_refused_as_such() {
    let cluster = Cluster::start();
    let is_elsewhere = |name: &String| {
        let slot: u16 = self::cluster(cluster.owner(), &["KEYSLOT", name]);
        let begin = [0_u16, 5_461, 10_923][cluster.other];
        (begin..begin + 5_461).contains(&slot)
    };
    let dead = (0..).map(|n| format!("failed-{n}")).find(is_elsewhere);
    let group = group().dead_letter(dead.unwrap());
    let error = group.connect(cluster.owner().url()).await.unwrap_err();
    assert!(matches!(error, ConnectError::OtherSlot { .. }), "{error}");
}

// === A slot that moves ===

#[tokio::test]
async fn a_connect_waits_for_the_end_of_a_move() {
    let cluster = Cluster::start();
    add(&mut cluster.owner().inspect(), "one");
    cluster.begin_move();
    let impatient = group().failover_timeout(Duration::ZERO);
    let error = impatient.connect(cluster.owner().url()).await.unwrap_err();
    assert!(
        matches!(error, ConnectError::Unavailable { .. }),
        "{error:#}"
    );
    let url = cluster.owner().url();
    let connecting = tokio::spawn(async move { group().connect(url).await });
    sleep(Duration::from_millis(100)).await;
    cluster.end_move();
    let mut deliveries = connecting.await.unwrap().unwrap();
    settle(&next(&mut deliveries).await, Verdict::Ack)
        .await
        .unwrap();
    assert_eq!(pending(&mut cluster.other().inspect()), 0);
}

#[tokio::test]
async fn a_session_outlasts_the_begin_of_a_move() {
    let cluster = Cluster::start();
    add(&mut cluster.owner().inspect(), "one");
    add(&mut cluster.owner().inspect(), "two");
    let mut deliveries = group().connect(cluster.owner().url()).await.unwrap();
    let (acked, retried) = (next(&mut deliveries).await, next(&mut deliveries).await);
    cluster.begin_move();
    // The stream is here; the set of parked entries is not anywhere.
    settle(&acked, Verdict::Ack).await.unwrap();
    let unsettled = retried.tag().settle(Verdict::retry(), reason()).await;
    let Unsettled { tag, error, .. } = unsettled.unwrap_err();
    assert!(matches!(error, DeliveryError::Unavailable(_)), "{error}");
    // Longer than some reads.
    sleep(Duration::from_millis(200)).await;
    let slot = cluster.slot.to_string();
    for server in [cluster.owner(), cluster.other()] {
        let () = self::cluster(server, &["SETSLOT", &slot, "STABLE"]);
    }
    let settled = tag.unwrap().settle(Verdict::retry(), reason()).await;
    settled.unwrap();
    settle(&next(&mut deliveries).await, Verdict::Ack)
        .await
        .unwrap();
    let mut inspect = cluster.owner().inspect();
    assert_eq!((pending(&mut inspect), delayed(&mut inspect)), (0, 0));
}

#[tokio::test]
async fn a_settlement_after_a_move_gives_its_tag_back_and_ends_the_session() {
    for verdict in [Verdict::Ack, Verdict::retry(), Verdict::Reject] {
        let cluster = Cluster::start();
        add(&mut cluster.owner().inspect(), "one");
        let mut deliveries = group()
            .prefetch(1)
            .connect(cluster.owner().url())
            .await
            .unwrap();
        let delivery = next(&mut deliveries).await;
        cluster.begin_move();
        cluster.end_move();
        let unsettled = delivery.tag().settle(verdict, reason()).await;
        let Unsettled { tag, error, .. } = unsettled.unwrap_err();
        assert!(
            matches!(error, DeliveryError::Moved(_)),
            "{verdict}: {error}"
        );
        assert!(tag.is_some(), "{verdict}");
        let ended = closed(&mut deliveries).await;
        assert!(
            matches!(ended, SubscriptionError::Moved(_)),
            "{verdict}: {ended}"
        );
        assert!(deliveries.is_gone());
        assert_eq!(pending(&mut cluster.other().inspect()), 1, "{verdict}");
    }
}

#[tokio::test]
async fn a_read_that_waits_ends_with_a_move() {
    let cluster = Cluster::start();
    let group = group().poll_interval(Duration::from_secs(60));
    let mut deliveries = group.connect(cluster.owner().url()).await.unwrap();
    sleep(Duration::from_millis(200)).await;
    cluster.begin_move();
    cluster.end_move();
    let ended = closed(&mut deliveries).await;
    assert!(matches!(ended, SubscriptionError::Moved(_)), "{ended}");
}

#[tokio::test]
async fn a_slot_that_moves_under_load_loses_no_job() {
    let cluster = Cluster::start();
    let urls = cluster.urls();
    let work = Work::start(group().min_idle(Duration::from_secs(2)).connector(&urls));
    let mut jobs = publish(&urls, "before", 200).await;
    work.has_done(&jobs).await;
    let publishing = tokio::spawn(async move { publish(&urls, "amid", 1_000).await });
    sleep(Duration::from_millis(20)).await;
    cluster.begin_move();
    sleep(Duration::from_millis(200)).await;
    cluster.end_move();
    jobs.extend(publishing.await.unwrap());
    work.has_done(&jobs).await;
    work.end().await;
    assert_eq!(pending(&mut cluster.other().inspect()), 0);
}

// === Failover ===

#[tokio::test]
async fn a_session_on_a_server_that_has_lost_its_cluster_ends() {
    let mut cluster = Cluster::start();
    let mut deliveries = group().connect(cluster.owner().url()).await.unwrap();
    let owner = cluster.owner;
    for nth in (0..3).filter(|&nth| nth != owner) {
        cluster.servers[nth].kill();
    }
    let ended = closed(&mut deliveries).await;
    assert!(
        matches!(ended, SubscriptionError::Unavailable(_)),
        "{ended}"
    );
}

#[tokio::test]
async fn a_replica_takes_over_and_no_job_is_lost() {
    let mut cluster = Cluster::with_replicas(3);
    let urls = cluster.urls();
    let work = Work::start(group().min_idle(Duration::from_secs(2)).connector(&urls));
    let mut jobs = publish(&urls, "before", 200).await;
    work.has_done(&jobs).await;
    cluster.owner().has_replicated();
    let nth = cluster.owner;
    cluster.servers[nth].kill();
    let after = publish(&urls, "after", 200).await;
    jobs.extend(after);
    work.has_done(&jobs).await;
    work.end().await;
    let replica = &cluster.servers[cluster.owner + 3];
    replica.wait_for("replication", "role:master");
    assert_eq!(pending(&mut replica.inspect()), 0);
}
