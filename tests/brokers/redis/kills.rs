//! The server killed again and again in the middle of its work.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use futures_util::StreamExt;
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};
use tower_sentinel::{
    Verdict,
    broker::redis::{DeliveryError, redis::pipe},
};

use super::{STREAM, delayed, group, pending, server::Server, settle};

const JOBS: usize = 10_000;
const KILLS: usize = 20;

/// Settled jobs, as the consumer knows them.
#[derive(Default)]
struct Ledger {
    runs: HashMap<String, u32>,
    acked: HashSet<String>,
    /// Acked without proof: the server may or may not have received the ack.
    unproved: HashSet<String>,
}

impl Ledger {
    fn begin(&mut self, job: &str) {
        assert!(!self.acked.contains(job), "{job} was acked and came back");
        *self.runs.entry(job.to_owned()).or_default() += 1;
    }

    fn end(&mut self, job: String, settled: &Result<(), DeliveryError>) {
        if settled.is_ok() {
            self.unproved.remove(&job);
            self.acked.insert(job);
        } else if !self.acked.contains(&job) {
            self.unproved.insert(job);
        }
    }

    fn is_complete(&self) -> bool {
        self.acked.len() + self.unproved.len() == JOBS
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_kills_lose_none_of_ten_thousand_jobs() {
    let mut server = Server::start();
    let mut add = pipe();
    for job in 0..JOBS {
        add.xadd(STREAM, "*", &[("payload", job)]).ignore();
    }
    let () = add.query(&mut server.inspect()).unwrap();
    // With these most acks are early, and check nothing.
    let group = group()
        .prefetch(64)
        .response_timeout(Duration::from_secs(1))
        .min_idle(Duration::from_millis(1_500));
    let mut ledger = Ledger::default();
    let mut kills = 0;
    loop {
        let mut deliveries = group.connect(server.url()).await.unwrap();
        let mut settling = JoinSet::new();
        let mut proved = 0;
        loop {
            tokio::select! {
                Some(settled) = settling.join_next() => {
                    let (job, settled) = settled.unwrap();
                    ledger.end(job, &settled);
                    proved += usize::from(settled.is_ok());
                    if settled.is_ok() && kills < KILLS && proved == JOBS / (KILLS + 5) {
                        kills += 1;
                        server.kill();
                    }
                }
                next = timeout(Duration::from_millis(200), deliveries.next()) => match next {
                    Ok(Some(Ok(delivery))) => {
                        let job = String::from_utf8(delivery.as_ref().to_vec()).unwrap();
                        ledger.begin(&job);
                        settling.spawn(async move {
                            sleep(Duration::from_millis(1)).await;
                            (job, settle(&delivery, Verdict::Ack).await)
                        });
                    }
                    Ok(_) => break,
                    Err(_) if ledger.is_complete() => break,
                    Err(_) => {}
                }
            }
        }
        while let Some(settled) = settling.join_next().await {
            let (job, settled) = settled.unwrap();
            ledger.end(job, &settled);
        }
        if server.is_killed() {
            server.restart();
        }
        if !ledger.is_complete() {
            continue;
        }
        let mut inspect = server.inspect();
        if pending(&mut inspect) == 0 && delayed(&mut inspect) == 0 {
            break;
        }
    }
    assert_eq!(kills, KILLS);
    let twice = ledger.runs.values().filter(|&&runs| runs > 1).count();
    let unproved = ledger.unproved.len();
    println!("{KILLS} kills: {twice} of {JOBS} jobs ran more than once, {unproved} without proof");
    // At most the jobs that were unsettled at a kill.
    assert!(twice <= KILLS * 64, "{twice}");
}
