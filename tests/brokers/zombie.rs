//! An outage of what the jobs need leaves no consumer that holds its prefetch and works no more.
//!
//! Three processes with a sentinel, and beside them one that spawns its jobs, acks at their end and
//! has none. What the jobs need is down for a while: then each job fails, panics or hangs.

use std::{
    collections::{BTreeMap, BTreeSet},
    error::Error,
    fmt, fs,
    future::pending,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use futures_util::StreamExt;
use tokio::time::{Instant, sleep};
use tower::{ServiceBuilder, util::option_layer};
use tower_sentinel::{
    Consumer, DecisionExt, IntensityLayer, OutcomeKind, SentinelLayer, Verdict, ack_on_success,
    broker::rabbitmq::{
        self, Delivery, Queue,
        lapin::{
            BasicProperties, Channel,
            options::{
                BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
                ConfirmSelectOptions, QueueDeclareOptions,
            },
            types::{AMQPValue, FieldTable},
        },
    },
    panic_hook,
};

use crate::{
    child::{Child, Ledger, asked_to_end, recording, setting},
    conformance::eventually,
    server::rabbitmq::{Server, shared},
};

const PREFETCH: usize = 5;
const PROCESSES: usize = 3;
const OUTAGE: Duration = Duration::from_secs(10);

/// A time limit for jobs that hang.
const LIMIT: Duration = Duration::from_millis(500);

#[tokio::test]
async fn an_outage_leaves_no_zombie_on_a_quorum_queue() {
    let test = "an_outage_leaves_no_zombie_on_a_quorum_queue";
    run(test, "quorum", false).await;
}

#[tokio::test]
async fn an_outage_leaves_no_zombie_on_a_classic_queue_behind_an_intensity() {
    let test = "an_outage_leaves_no_zombie_on_a_classic_queue_behind_an_intensity";
    run(test, "classic", true).await;
}

async fn run(test: &str, kind: &str, has_intensity: bool) {
    match setting("ROLE").as_deref() {
        None => outage(test, kind, has_intensity).await,
        Some("naive") => consume_naively().await,
        Some(_) => consume(has_intensity).await,
    }
}

// === what the jobs need ===

/// Is up while its file exists.
#[derive(Clone, Debug)]
struct Dependency(PathBuf);

impl Dependency {
    fn new(kind: &str) -> Self {
        let name = format!("dependency-{kind}-{}", std::process::id());
        Self(Path::new(env!("CARGO_TARGET_TMPDIR")).join(name))
    }

    fn go_up(&self) {
        fs::write(&self.0, "").unwrap();
    }

    fn go_down(&self) {
        fs::remove_file(&self.0).unwrap();
    }

    /// Works on a job. While it is down, a third of the jobs fail, a third panic, a third hang.
    async fn ask(&self) -> Result<(), Down> {
        static FAILURES: AtomicU32 = AtomicU32::new(0);
        sleep(Duration::from_millis(20)).await;
        if self.0.exists() {
            return Ok(());
        }
        match FAILURES.fetch_add(1, Ordering::Relaxed) % 3 {
            0 => Err(Down),
            1 => panic!("{Down}"),
            _ => pending().await,
        }
    }
}

impl Drop for Dependency {
    fn drop(&mut self) {
        // The consumers only look.
        if setting("ROLE").is_none() {
            drop(fs::remove_file(&self.0));
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Down;

impl fmt::Display for Down {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the dependency is down")
    }
}

impl Error for Down {}

// === the consumers ===

/// What a consumer's process was told.
fn settings() -> (String, String, Dependency) {
    let [address, queue, dependency] =
        ["ADDRESS", "QUEUE", "DEPENDENCY"].map(|name| setting(name).unwrap());
    (address, queue, Dependency(dependency.into()))
}

fn intensity() -> IntensityLayer {
    IntensityLayer::new().pause(Duration::from_millis(100)..=Duration::from_secs(1))
}

async fn consume(has_intensity: bool) {
    panic_hook::install();
    let (address, name, dependency) = settings();
    let queue = match name.starts_with("quorum") {
        true => Queue::quorum(name),
        false => Queue::classic(name),
    };
    let queue = queue.prefetch(PREFETCH);
    let connect = move || {
        let (queue, address) = (queue.clone(), address.clone());
        async move {
            let connection = rabbitmq::connect(&address).await?;
            let deliveries = queue.subscribe(&connection).await?;
            Ok::<_, Box<dyn Error + Send + Sync>>(deliveries)
        }
    };
    let ledger = Ledger::own();
    let decision = ack_on_success().on_error(|_: &Down| Verdict::Release);
    let policy = recording(decision, ledger.clone());
    let intensity = has_intensity.then(intensity);
    let make_service = move |shutdown| {
        let dependency = dependency.clone();
        ServiceBuilder::new()
            .concurrency_limit(PREFETCH)
            .layer(
                SentinelLayer::new(policy.clone())
                    .timeout(LIMIT)
                    .shutdown(shutdown),
            )
            .layer(option_layer(intensity.clone()))
            .service_fn(move |job: Delivery| {
                let dependency = dependency.clone();
                async move { dependency.ask().await.map(|()| text(job.as_ref())) }
            })
    };
    let summary = Consumer::reconnecting(connect, make_service)
        .with_graceful_shutdown(asked_to_end())
        .await;
    let summary = summary.unwrap_or_else(|error| panic!("{error}"));
    for kind in [
        OutcomeKind::Failed,
        OutcomeKind::Panicked,
        OutcomeKind::TimedOut,
    ] {
        ledger.write(kind.as_str(), &summary.outcomes(kind).to_string());
    }
    assert_eq!((summary.failed, summary.abandoned), (0, 0), "{summary:?}");
}

/// What is often written: nobody answers for a job that does not come to its end.
async fn consume_naively() {
    let (address, name, dependency) = settings();
    let ledger = Ledger::own();
    let connection = rabbitmq::connect(&address).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    let options = BasicQosOptions::default();
    let prefetch = PREFETCH.try_into().unwrap();
    channel.basic_qos(prefetch, options).await.unwrap();
    let options = BasicConsumeOptions::default();
    let consumer = channel.basic_consume(name.into(), "".into(), options, FieldTable::default());
    let mut jobs = consumer.await.unwrap();
    let consuming = async {
        while let Some(job) = jobs.next().await {
            let job = job.unwrap();
            let (ledger, dependency) = (ledger.clone(), dependency.clone());
            ledger.write("received", &text(&job.data));
            tokio::spawn(async move {
                dependency.ask().await?;
                job.ack(BasicAckOptions::default()).await.unwrap();
                ledger.write("acked", &text(&job.data));
                Ok::<_, Down>(())
            });
        }
    };
    tokio::select! {
        () = consuming => panic!("the stream ended"),
        () = asked_to_end() => {}
    }
}

fn text(body: &[u8]) -> String {
    String::from_utf8(body.to_vec()).unwrap()
}

// === the outage ===

/// The jobs, and who is to work on them.
struct Scene<'a> {
    server: &'a Server,
    admin: Channel,
    /// For the consumers with a sentinel, and for the one without.
    queues: [String; 2],
    published: BTreeSet<String>,
}

impl Scene<'_> {
    async fn publish(&mut self, body: String) {
        for queue in &self.queues {
            let confirm = self.admin.basic_publish(
                "".into(),
                queue.as_str().into(),
                BasicPublishOptions::default(),
                body.as_bytes(),
                BasicProperties::default().with_delivery_mode(2),
            );
            assert!(confirm.await.unwrap().await.unwrap().is_ack());
        }
        self.published.insert(body);
    }

    /// Returns how many jobs of each queue are ready, and how many are unacked.
    fn counts(&self) -> [(usize, usize); 2] {
        let columns = ["name", "messages_ready", "messages_unacknowledged"];
        let rows = self.server.ctl(&[&["list_queues"], &columns[..]].concat());
        self.queues.each_ref().map(|queue| {
            let mut rows = rows.lines().map(|row| row.split('\t').collect::<Vec<_>>());
            let row = rows.find(|row| row[0] == queue).unwrap();
            (row[1].parse().unwrap(), row[2].parse().unwrap())
        })
    }

    /// Returns how many consumers each queue has, and asserts their prefetch.
    fn consumers(&self) -> [usize; 2] {
        let columns = ["queue_name", "prefetch_count"];
        let rows = self
            .server
            .ctl(&[&["list_consumers"], &columns[..]].concat());
        self.queues.each_ref().map(|queue| {
            let rows = rows.lines().filter_map(|row| row.split_once('\t'));
            let mut prefetches = rows.filter(|row| row.0 == queue).map(|row| row.1);
            let prefetch = PREFETCH.to_string();
            assert!(prefetches.clone().all(|found| found == prefetch), "{queue}");
            prefetches.by_ref().count()
        })
    }
}

fn acked(children: &[Child]) -> Vec<String> {
    children
        .iter()
        .flat_map(|child| child.told("acked"))
        .collect()
}

async fn outage(test: &str, kind: &str, has_intensity: bool) {
    let server = shared();
    let admin = rabbitmq::connect(&server.address()).await.unwrap();
    let admin = admin.create_channel().await.unwrap();
    let options = ConfirmSelectOptions::default();
    admin.confirm_select(options).await.unwrap();
    let queues = ["guarded", "naive"].map(|who| format!("{kind}.{who}"));
    for queue in &queues {
        let mut arguments = FieldTable::default();
        let queue_type = AMQPValue::LongString(kind.into());
        arguments.insert("x-queue-type".into(), queue_type);
        let options = QueueDeclareOptions::durable();
        let declared = admin.queue_declare(queue.as_str().into(), options, arguments);
        declared.await.unwrap();
    }
    let dependency = Dependency::new(kind);
    let start = |role: &str, queue: &str| {
        let settings = [
            ("ROLE", role),
            ("ADDRESS", &server.address()),
            ("QUEUE", queue),
            ("DEPENDENCY", dependency.0.to_str().unwrap()),
        ];
        Child::start(module_path!(), test, &settings)
    };
    let mut guarded: Vec<_> = (0..PROCESSES)
        .map(|_| start("guarded", &queues[0]))
        .collect();
    let mut naive = start("naive", &queues[1]);
    let mut scene = Scene {
        server,
        admin,
        queues,
        published: BTreeSet::new(),
    };

    // All work.
    dependency.go_up();
    eventually([PROCESSES, 1], async || scene.consumers()).await;
    for n in 0..30 {
        scene.publish(format!("before {n}")).await;
    }
    eventually([30, 30], async || {
        [acked(&guarded).len(), naive.told("acked").len()]
    })
    .await;

    // None can.
    let down = Instant::now();
    dependency.go_down();
    for n in 0..60 {
        scene.publish(format!("during {n}")).await;
    }
    sleep(OUTAGE).await;
    assert_eq!([acked(&guarded).len(), naive.told("acked").len()], [30, 30]);
    dependency.go_up();
    let outage = down.elapsed();

    // Those with a sentinel go on, each of them, and with all that there was.
    let has_acked_later = |child: &Child| {
        let acked = child.told("acked");
        acked.iter().any(|body| body.starts_with("after"))
    };
    let patience = Instant::now() + Duration::from_secs(60);
    for n in 0.. {
        scene.publish(format!("after {n}")).await;
        if n >= 60 && guarded.iter().all(has_acked_later) {
            break;
        }
        assert!(Instant::now() < patience, "a consumer does not go on");
    }
    let published = &scene.published;
    eventually(true, async || {
        let acked = acked(&guarded);
        published.iter().all(|body| acked.contains(body))
    })
    .await;
    let stuck = (published.len() - 30 - PREFETCH, PREFETCH);
    eventually([(0, 0), stuck], async || scene.counts()).await;
    assert_eq!(scene.consumers(), [PROCESSES, 1]);

    // The one without holds its prefetch, and receives nothing more.
    assert_eq!(naive.told("acked").len(), 30);
    let received = naive.told("received");
    assert_eq!(received.len(), 30 + PREFETCH);
    assert!(!received.iter().any(|body| body.starts_with("after")));
    naive.end();
    let all = (published.len() - 30, 0);
    eventually([(0, 0), all], async || scene.counts()).await;

    let mut times = BTreeMap::<_, u32>::new();
    for body in acked(&guarded) {
        *times.entry(body).or_default() += 1;
    }
    // No connection was lost, so no job has a reason to be done twice.
    assert!(times.values().all(|&times| times == 1), "{times:?}");
    assert!(times.keys().eq(published));

    for child in &mut guarded {
        child.end();
        let failures = ["failed", "panicked", "timed_out"].map(|kind| {
            let told = child.told(kind);
            told[0].parse::<u64>().unwrap()
        });
        println!("{failures:?} failed, panicked and timed out in {outage:?}");
        assert!(failures.iter().all(|&n| n > 0), "{failures:?}");
        if has_intensity {
            let most = intensity().most_wasted(PREFETCH, outage);
            let wasted: u64 = failures.iter().sum();
            assert!(wasted <= most, "{wasted} are more than {most}");
        }
    }
    assert_eq!(scene.counts()[0], (0, 0));
    assert_eq!(scene.consumers(), [0, 0]);
}
