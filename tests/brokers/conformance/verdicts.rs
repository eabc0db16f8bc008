//! Effects of each verdict on a job: one table, which tests assert and the documentation shows.

use std::{fmt::Write, process::Command, time::Duration};

use futures_util::StreamExt;
use tokio::time::{Instant, timeout};
use tower_sentinel::{Job, Verdict, settle::Settle};

use super::{PATIENCE, TestBroker, body, left, reason, take};

/// For how long a job is delayed.
const DELAY: Duration = Duration::from_secs(1);

/// A kind of queue, and the versions of its server that behave alike.
pub(crate) struct Row {
    pub(crate) queue: &'static str,
    /// With which it was tested: major and minor.
    versions: &'static [(u32, u32)],
    effects: [Effect; 6],
    /// `true` if the end of a connection charges the jobs that it held.
    pub(crate) loss_is_charged: bool,
}

/// Effect of one verdict.
struct Effect {
    verdict: Verdict,
    /// `true` if the next delivery counts one more; `None` if there is no next one.
    charged: Option<bool>,
    returns: Returns,
    killed: Killed,
}

/// Time at which the job comes back, relative to others that wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Returns {
    Never,
    First,
    Last,
    /// Before or after them.
    Somewhere,
    /// Not before its time.
    WhenDue,
}

/// Effect of a kill of the server right after the verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Killed {
    /// It has the verdict.
    Knows,
    /// It may have lost the verdict, and then delivers the job again.
    MayForget,
    /// It delivers the job, as it would have without the kill.
    Delivers,
}

use Killed::{Delivers, Knows, MayForget};
use Returns::{First, Last, Never, Somewhere, WhenDue};

/// Effects of each verdict that settles, with and without a delay.
const fn effects(
    (retry, release): (Returns, Returns),
    (release_is_charged, delayed_release_is_charged): (bool, bool),
    killed: Killed,
) -> [Effect; 6] {
    const fn effect(
        verdict: Verdict,
        charged: Option<bool>,
        returns: Returns,
        killed: Killed,
    ) -> Effect {
        Effect {
            verdict,
            charged,
            returns,
            killed,
        }
    }
    [
        effect(Verdict::Ack, None, Never, killed),
        effect(Verdict::retry(), Some(true), retry, Delivers),
        effect(Verdict::retry_after(DELAY), Some(true), WhenDue, Delivers),
        effect(
            Verdict::release(),
            Some(release_is_charged),
            release,
            Delivers,
        ),
        effect(
            Verdict::release_after(DELAY),
            Some(delayed_release_is_charged),
            WhenDue,
            Delivers,
        ),
        effect(Verdict::Reject, None, Never, killed),
    ]
}

pub(crate) const RABBITMQ_QUORUM: &str = "RabbitMQ, quorum queue";
pub(crate) const RABBITMQ_CLASSIC: &str = "RabbitMQ, classic queue";
pub(crate) const NATS: &str = "NATS JetStream";
pub(crate) const REDIS: &str = "Redis Streams";
pub(crate) const VALKEY: &str = "Valkey Streams";
pub(crate) const MEMORY: &str = "`broker::memory`";

/// The single table of expected effects.
const TABLE: &[Row] = &[
    Row {
        queue: RABBITMQ_QUORUM,
        versions: &[(3, 10)],
        effects: effects((Last, Last), (true, false), MayForget),
        loss_is_charged: true,
    },
    Row {
        queue: RABBITMQ_QUORUM,
        versions: &[(4, 0)],
        effects: effects((First, First), (true, false), MayForget),
        loss_is_charged: true,
    },
    Row {
        queue: RABBITMQ_QUORUM,
        versions: &[(4, 3)],
        effects: effects((First, First), (false, false), MayForget),
        loss_is_charged: true,
    },
    Row {
        queue: RABBITMQ_CLASSIC,
        versions: &[(3, 10), (4, 0), (4, 3)],
        effects: effects((Last, First), (false, false), MayForget),
        loss_is_charged: false,
    },
    Row {
        queue: NATS,
        versions: &[(2, 9), (2, 10), (2, 15)],
        effects: effects((First, First), (true, true), MayForget),
        loss_is_charged: true,
    },
    Row {
        queue: REDIS,
        versions: &[(7, 0), (8, 0)],
        effects: effects((Somewhere, Somewhere), (false, false), Knows),
        loss_is_charged: true,
    },
    Row {
        queue: VALKEY,
        versions: &[(8, 1), (9, 1)],
        effects: effects((Somewhere, Somewhere), (false, false), Knows),
        loss_is_charged: true,
    },
    Row {
        queue: MEMORY,
        versions: &[],
        effects: effects((First, First), (false, false), Knows),
        loss_is_charged: true,
    },
];

/// Returns the expected effects on a server: those of the newest tested one that is not newer.
pub(super) fn row(queue: &str, version: (u32, u32)) -> &'static Row {
    let of_queue = || TABLE.iter().filter(|row| row.queue == queue);
    let mut rows = of_queue().rev();
    let known = |row: &&Row| row.versions.first().is_none_or(|first| *first <= version);
    rows.find(known)
        .unwrap_or_else(|| panic!("{queue} {version:?} is older than all in the table"))
}

/// Returns the output of a program.
pub(crate) fn printed(program: &mut Command) -> String {
    let output = program
        .output()
        .unwrap_or_else(|error| panic!("{program:?}: {error}"));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Reads the first major and minor version out of a text.
pub(crate) fn version(text: &str) -> (u32, u32) {
    let numbers = text.trim_start_matches(|c: char| !c.is_ascii_digit());
    let mut numbers = numbers.splitn(3, '.').map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor),
        _ => panic!("there is no version in {text:?}"),
    }
}

impl Effect {
    fn name(&self) -> &'static str {
        match self.verdict {
            Verdict::Ack => "`Ack`",
            Verdict::Retry { after: None } => "`Retry`",
            Verdict::Retry { after: Some(_) } => "`Retry` after a delay",
            Verdict::Release { after: None } => "`Release`",
            Verdict::Release { after: Some(_) } => "`Release` after a delay",
            Verdict::Reject => "`Reject`",
            Verdict::Abandon => "`Abandon`",
        }
    }
}

// === the scenarios ===

pub(crate) async fn each_verdict_does_what_the_table_says<B: TestBroker>(broker: &B) {
    // One for all: a job that comes while another subscription is being closed may be charged for its end.
    let mut jobs = broker.subscribe(1).await.unwrap();
    for effect in &B::row().effects {
        let verdict = effect.verdict;
        for body in ["one", "two", "three"] {
            broker.publish(body).await.unwrap();
        }
        let first = take::<B>(&mut jobs).await;
        assert_eq!(body(&first), "one", "{verdict}");
        let settled = Instant::now();
        first.tag().settle(verdict, reason()).await.unwrap();

        let mut came = Vec::new();
        let wanted = if effect.returns == Never { 2 } else { 3 };
        while came.len() < wanted {
            let job = take::<B>(&mut jobs).await;
            if body(&job) == "one" {
                let charged = u32::from(effect.charged.expect("it does not come back"));
                let deliveries = broker.counts_deliveries().then_some(1 + charged);
                assert_eq!(job.tag().deliveries(), deliveries, "{verdict}, {came:?}");
                let is_due = settled.elapsed() >= DELAY;
                assert!(effect.returns != WhenDue || is_due, "{verdict}");
            }
            job.tag().settle(Verdict::Ack, reason()).await.unwrap();
            came.push(body(&job));
        }
        let came: Vec<_> = came.iter().map(String::as_str).collect();
        match effect.returns {
            Never => assert_eq!(came, ["two", "three"], "{verdict}"),
            First => assert_eq!(came, ["one", "two", "three"], "{verdict}"),
            Last => assert_eq!(came, ["two", "three", "one"], "{verdict}"),
            Somewhere | WhenDue => {
                let others: Vec<_> = came.into_iter().filter(|body| *body != "one").collect();
                assert_eq!(others, ["two", "three"], "{verdict}");
            }
        }
        left(broker, 0).await;
    }
}

pub(crate) async fn a_kill_after_each_verdict_does_what_the_table_says<B: TestBroker>(broker: &B) {
    let effects = &B::row().effects;
    for effect in effects {
        broker.publish(effect.name()).await.unwrap();
    }
    let mut jobs = broker.subscribe(effects.len()).await.unwrap();
    let mut held = Vec::new();
    for _ in effects {
        held.push(take::<B>(&mut jobs).await);
    }
    // Jobs that come back at once are held until the kill.
    for effect in effects {
        let mut jobs = held.iter();
        let job = jobs.find(|job| body(*job) == effect.name()).unwrap();
        job.tag().settle(effect.verdict, reason()).await.unwrap();
    }
    broker.kill().await;
    drop((held, jobs));
    broker.revive().await;

    let mut came: Vec<String> = Vec::new();
    let mut jobs = broker.subscribe(effects.len()).await.unwrap();
    let started = Instant::now();
    let must_come = |came: &[String]| {
        let mut delivered = effects.iter().filter(|effect| effect.killed == Delivers);
        delivered.all(|effect| came.iter().any(|body| body == effect.name()))
    };
    while !must_come(&came) || broker.backlog().await.unwrap().total > 0 {
        let waited = started.elapsed();
        assert!(waited < PATIENCE, "only {came:?} came back");
        if let Ok(job) = timeout(Duration::from_millis(100), jobs.next()).await {
            let job = job.unwrap().unwrap();
            came.push(body(&job));
            job.tag().settle(Verdict::Ack, reason()).await.unwrap();
        }
    }
    for effect in effects {
        let is_back = came.iter().any(|body| body == effect.name());
        assert!(!is_back || effect.killed != Knows, "{came:?}");
    }
    let rejected = broker.dead_letters().await.unwrap();
    let is_kept = rejected.iter().any(|letter| letter.body == "`Reject`");
    assert_eq!(
        is_kept,
        broker.capabilities().has_dead_letter(),
        "{rejected:?}"
    );
}

// === the documentation ===

/// Returns the table as the documentation has it.
fn rendered() -> String {
    let mut text = String::from(
        "| server | verdict | charged | comes back | if the server is killed then |\n\
         | --- | --- | --- | --- | --- |\n",
    );
    for row in TABLE {
        let versions: Vec<_> = row
            .versions
            .iter()
            .map(|(a, b)| format!("{a}.{b}"))
            .collect();
        let mut server = row.queue.to_owned();
        if !versions.is_empty() {
            write!(server, " ({})", versions.join(", ")).unwrap();
        }
        for effect in &row.effects {
            let charged = match effect.charged {
                Some(true) => "yes",
                Some(false) => "no",
                None => "",
            };
            let returns = match effect.returns {
                Never => "never",
                First => "before those that wait",
                Last => "behind those that wait",
                Somewhere => "in no order",
                WhenDue => "when it is due",
            };
            let killed = match effect.killed {
                Knows => "stays settled",
                MayForget => "may be delivered again",
                Delivers => "is delivered",
            };
            writeln!(
                text,
                "| {server} | {} | {charged} | {returns} | {killed} |",
                effect.name()
            )
            .unwrap();
            server.clear();
        }
        let charged = if row.loss_is_charged { "yes" } else { "no" };
        writeln!(
            text,
            "|  | none, as the connection is lost | {charged} |  |  |"
        )
        .unwrap();
    }
    text
}

#[test]
fn the_documentation_has_this_table() {
    let module = include_str!("../../../src/broker/mod.rs");
    let lines = module.lines().filter_map(|line| line.strip_prefix("//! "));
    let table: String = lines
        .filter(|line| line.starts_with('|'))
        .map(|line| format!("{line}\n"))
        .collect();
    let wanted = rendered();
    assert_eq!(
        table, wanted,
        "`src/broker/mod.rs` is to have this:\n{wanted}"
    );
}
