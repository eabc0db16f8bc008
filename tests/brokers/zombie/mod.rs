//! After an outage of a dependency, no consumer holds its prefetch and has stopped working.
//!
//! Three processes with a sentinel, and beside them one that spawns its jobs, acks at their end and has none.
//! The dependency of the jobs is down for a while: then each job fails, panics or hangs.

mod consumers;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use tokio::time::{Instant, sleep};
use tower_sentinel::broker::rabbitmq::{
    self,
    lapin::{
        BasicProperties, Channel,
        options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions},
        types::{AMQPValue, FieldTable},
    },
};

use self::consumers::{Dependency, consume, consume_naively, intensity};
use crate::{
    child::{Child, setting},
    conformance::eventually,
    rabbitmq::server::{Server, shared},
};

const PREFETCH: usize = 5;
const PROCESSES: usize = 3;
const OUTAGE: Duration = Duration::from_secs(10);

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

/// The jobs, and the consumers that work on them.
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

    // Those with a sentinel go on, each of them, and with all their places.
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
