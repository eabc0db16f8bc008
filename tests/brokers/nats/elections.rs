//! Elections of leaders in a cluster, and servers of it that go.

use std::{
    collections::HashMap,
    convert::Infallible,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::StreamExt;
use tokio::{
    sync::oneshot,
    time::{Instant, sleep, timeout},
};
use tower::{service_fn, util::MapResponse};
use tower_sentinel::{
    Consumer, Job, SentinelLayer, SettlePolicy, Verdict, ack_on_success,
    broker::nats::{Connector, Delivery, async_nats::jetstream},
    consumer::{Connect, Summary},
    settle::{Reason, Settle, Settled, Unsettled},
};

use super::{
    cluster::{Cluster, until},
    reason,
};

/// Long enough that the backlog lasts for the fault.
const WORK: Duration = Duration::from_millis(200);

const MINUTE: Duration = Duration::from_secs(60);

/// Counts the sessions.
struct Counting {
    connector: Connector,
    sessions: Arc<AtomicU32>,
}

impl Connect for Counting {
    type Subscription = <Connector as Connect>::Subscription;
    type Error = <Connector as Connect>::Error;
    type Future = <Connector as Connect>::Future;

    fn connect(&mut self, attempt: u32) -> Self::Future {
        self.sessions.fetch_add(1, Ordering::SeqCst);
        self.connector.connect(attempt)
    }
}

/// A worker with its record.
struct Worker {
    sessions: Arc<AtomicU32>,
    runs: Arc<Mutex<HashMap<usize, u32>>>,
    settled: Arc<Mutex<Vec<Instant>>>,
    stop: oneshot::Sender<()>,
    running: tokio::task::JoinHandle<Summary>,
}

impl Worker {
    fn start(connector: Connector) -> Self {
        let sessions = Arc::<AtomicU32>::default();
        let runs = Arc::<Mutex<HashMap<usize, u32>>>::default();
        let settled = Arc::<Mutex<Vec<Instant>>>::default();
        let (stop, stopped) = oneshot::channel();
        let times = Arc::clone(&settled);
        let policy = SettlePolicy::new(ack_on_success());
        let policy = MapResponse::new(policy, move |response: Settled| {
            times.lock().unwrap().push(Instant::now());
            response
        });
        let counts = Arc::clone(&runs);
        let connect = Counting {
            connector,
            sessions: Arc::clone(&sessions),
        };
        let consumer = Consumer::reconnecting(connect, move |_| {
            let counts = Arc::clone(&counts);
            service_fn(move |job: Delivery| {
                let counts = Arc::clone(&counts);
                async move {
                    sleep(WORK).await;
                    let job = String::from_utf8(job.payload().to_vec()).unwrap();
                    let mut counts = counts.lock().unwrap();
                    *counts.entry(job.parse().unwrap()).or_default() += 1;
                    Ok::<_, Infallible>(())
                }
            })
        });
        let consumer = consumer
            .sentinel(SentinelLayer::new(policy))
            .with_graceful_shutdown(async move { drop(stopped.await) });
        let running = tokio::spawn(async move { consumer.await.unwrap() });
        Self {
            sessions,
            runs,
            settled,
            stop,
            running,
        }
    }

    fn settled(&self) -> usize {
        self.settled.lock().unwrap().len()
    }

    /// Returns the longest time without a settlement.
    fn longest_pause(&self) -> Duration {
        let times = self.settled.lock().unwrap();
        let gaps = times.windows(2).map(|pair| pair[1] - pair[0]);
        gaps.max().unwrap()
    }

    /// Waits for the end of all `jobs`. Those that were on their way to a connection that broke are the last: they come
    /// back after the ack wait.
    async fn end(self, cluster: &Cluster, jobs: usize) -> Summary {
        let all = async {
            while self.runs.lock().unwrap().len() < jobs {
                sleep(Duration::from_millis(20)).await;
            }
            until(async || cluster.messages("jobs").await == Some(0)).await;
        };
        let all = timeout(2 * MINUTE, all).await;
        let ran = self.runs.lock().unwrap().len();
        all.unwrap_or_else(|_| panic!("{ran} of {jobs} jobs ran, or some are not settled"));
        self.stop.send(()).unwrap();
        timeout(MINUTE, self.running).await.unwrap().unwrap()
    }
}

/// Lets a worker settle jobs, which are published all the time, during a fault; and checks that its session goes on.
async fn goes_on(name: &str, fault: impl AsyncFnOnce(&mut Cluster)) {
    let mut cluster = Cluster::start().await;
    let connector = cluster.pull().prefetch(32).connector(cluster.addresses());
    goes_on_with(name, &mut cluster, connector, fault).await;
}

async fn goes_on_with(
    name: &str,
    cluster: &mut Cluster,
    connector: Connector,
    fault: impl AsyncFnOnce(&mut Cluster),
) {
    // A client of its own, as the fault needs the cluster.
    let client = tower_sentinel::broker::nats::connect(cluster.addresses());
    let context = jetstream::new(client.await.unwrap());
    let published = Arc::<AtomicUsize>::default();
    let (end, mut ended) = oneshot::channel::<()>();
    let count = Arc::clone(&published);
    let publishing = tokio::spawn(async move {
        while ended.try_recv().is_err() {
            let job = count.load(Ordering::SeqCst);
            let publish = async {
                let mut headers = tower_sentinel::broker::nats::async_nats::HeaderMap::new();
                headers.insert("Nats-Msg-Id", job.to_string());
                let ack = context.publish_with_headers("jobs", headers, job.to_string().into());
                ack.await?.await
            };
            if let Ok(Ok(_)) = timeout(Duration::from_secs(1), publish).await {
                count.fetch_add(1, Ordering::SeqCst);
                sleep(Duration::from_millis(2)).await;
            }
        }
    });
    // A backlog, so that a publisher that waits is no reason for a pause.
    until(async || published.load(Ordering::SeqCst) > 2_000).await;
    let worker = Worker::start(connector);
    until(async || worker.settled() > 100).await;
    fault(cluster).await;
    let after = worker.settled();
    until(async || worker.settled() > after + 500).await;
    let gap = worker.longest_pause();
    end.send(()).unwrap();
    publishing.await.unwrap();
    let jobs = published.load(Ordering::SeqCst);
    let sessions = Arc::clone(&worker.sessions);
    let twice = Arc::clone(&worker.runs);
    let summary = worker.end(cluster, jobs).await;
    let twice = twice
        .lock()
        .unwrap()
        .values()
        .filter(|runs| **runs > 1)
        .count();
    println!(
        "{name}: {jobs} jobs, {} sessions, longest time without a settlement {gap:?}, {twice} ran twice, {} moot",
        sessions.load(Ordering::SeqCst),
        summary.moot
    );
    assert_eq!(sessions.load(Ordering::SeqCst), 1, "{name}: {summary:?}");
    assert_eq!(summary.unanswered, 0, "{name}: {summary:?}");
    // Some seconds on a machine that is idle.
    assert!(gap < Duration::from_secs(30), "{name}: {gap:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_session_ends_as_leaders_step_down() {
    goes_on("leaders step down", async |cluster| {
        for _ in 0..3 {
            cluster.step_down("STREAM.LEADER.STEPDOWN.jobs").await;
            until(async || cluster.stream_leader().await.is_some()).await;
            cluster
                .step_down("CONSUMER.LEADER.STEPDOWN.jobs.workers")
                .await;
            until(async || cluster.consumer_leader().await.is_some()).await;
            sleep(Duration::from_millis(500)).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_session_ends_as_the_leader_is_killed() {
    goes_on("leader killed", async |cluster| {
        let leader = cluster.consumer_leader().await.unwrap();
        cluster.servers[leader].kill();
        let start = Instant::now();
        let is_elected = async || {
            let asking = timeout(Duration::from_millis(100), cluster.consumer_leader());
            asking
                .await
                .is_ok_and(|found| found.is_some_and(|found| found != leader))
        };
        until(is_elected).await;
        println!(
            "leader killed: the election of the consumer's took {:?}",
            start.elapsed()
        );
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_session_ends_as_its_server_is_killed_and_the_client_learned_of_the_others() {
    let mut cluster = Cluster::start().await;
    // The one that is no leader: what is tested here is the connection.
    let leaders = [
        cluster.consumer_leader().await,
        cluster.stream_leader().await,
    ];
    let nth = (0..3).find(|nth| !leaders.contains(&Some(*nth))).unwrap();
    let connector = cluster
        .pull()
        .prefetch(32)
        .connector(cluster.servers[nth].url());
    goes_on_with(
        "client's server killed",
        &mut cluster,
        connector,
        async |cluster| {
            cluster.servers[nth].kill();
        },
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_session_ends_as_its_server_goes_in_the_lame_duck_mode() {
    let mut cluster = Cluster::start().await;
    let nth = cluster.consumer_leader().await.unwrap();
    // The others can be reached only as the server announces them, too.
    let connector = cluster
        .pull()
        .prefetch(32)
        .connector(cluster.servers[nth].url());
    goes_on_with("lame duck", &mut cluster, connector, async |cluster| {
        let start = Instant::now();
        cluster.servers[nth].signal("USR2");
        cluster.servers[nth].join().await;
        println!("lame duck: the server went after {:?}", start.elapsed());
        let leaders = async || (cluster.stream_leader().await, cluster.consumer_leader().await);
        until(async || matches!(leaders().await, (Some(one), Some(other)) if one != nth && other != nth)).await;
        println!("lame duck: there are leaders after {:?}", start.elapsed());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_session_ends_in_a_rolling_restart() {
    goes_on("rolling restart", async |cluster| {
        for nth in 0..3 {
            cluster.servers[nth].signal("TERM");
            cluster.servers[nth].join().await;
            cluster.servers[nth].restart();
            until(async || cluster.consumer_leader().await.is_some()).await;
            until(async || cluster.stream_leader().await.is_some()).await;
            sleep(Duration::from_secs(2)).await;
        }
    })
    .await;
}

/// Settles until it is done, as a policy does.
async fn settle_patiently(
    delivery: &Delivery,
    verdict: Verdict,
) -> Result<(), Unsettled<impl Settle, impl std::error::Error>> {
    let mut tag = delivery.tag();
    let start = Instant::now();
    loop {
        let reason: Reason = reason("it failed");
        match tag.settle(verdict, reason).await {
            Err(unsettled) if start.elapsed() < MINUTE => match unsettled.tag {
                Some(again) => tag = again,
                None => return Err(unsettled),
            },
            result => return result,
        }
        sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_verdict_outlasts_the_election_after_a_kill() {
    let mut cluster = Cluster::start().await;
    cluster.publish(0..8).await;
    let mut deliveries = cluster
        .pull()
        .prefetch(8)
        .subscribe(&cluster.context)
        .await
        .unwrap();
    let mut jobs = Vec::new();
    for _ in 0..8 {
        let next = timeout(MINUTE, deliveries.next()).await.unwrap();
        jobs.push(next.unwrap().unwrap());
    }
    let leader = cluster.consumer_leader().await.unwrap();
    cluster.servers[leader].kill();
    let verdicts = [
        Verdict::Ack,
        Verdict::Reject,
        Verdict::retry(),
        Verdict::release(),
    ];
    let settling = jobs.iter().zip(verdicts.iter().cycle());
    let settling = settling.map(async |(job, verdict)| {
        let result = settle_patiently(job, *verdict).await;
        let is_nak = matches!(verdict, Verdict::Retry { .. } | Verdict::Release { .. });
        // One that may have arrived is not repeated; the job comes back anyway.
        if let Err(unsettled) = result {
            assert!(
                is_nak && unsettled.is_moot(),
                "{verdict}: {}",
                unsettled.error
            );
        }
    });
    futures_util::future::join_all(settling).await;
    // Two were acked, and two rejected; each dead letter is there once.
    until(async || cluster.messages("jobs").await == Some(4)).await;
    assert_eq!(cluster.messages("dead").await, Some(2));
    for _ in 0..4 {
        let next = timeout(MINUTE, deliveries.next()).await.unwrap();
        let job = next.unwrap().unwrap();
        // A leader tells the others of its deliveries a little later, so they may not know of the last ones before its kill.
        assert!(matches!(job.tag().deliveries(), Some(1 | 2)), "{job:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscription_is_made_during_an_election() {
    let mut cluster = Cluster::start().await;
    cluster.publish(0..1).await;
    let leader = cluster.consumer_leader().await.unwrap();
    cluster.servers[leader].kill();
    let start = Instant::now();
    let connector = &mut cluster.pull().connector(cluster.addresses());
    let mut deliveries = timeout(MINUTE, connector.connect(1))
        .await
        .unwrap()
        .unwrap();
    println!("subscribed during an election after {:?}", start.elapsed());
    let next = timeout(MINUTE, deliveries.next()).await.unwrap();
    assert_eq!(next.unwrap().unwrap().payload(), b"0");
}
