//! A trial: workers do jobs on a cluster, to which something happens.

use std::{env, fs, path::Path, time::Duration};

use tokio::time::{Instant, sleep};

use crate::{
    child::{Child, now},
    figures::{Figures, Jobs},
    worker,
};

const WORKERS: usize = 3;

/// How long all jobs may take to be settled after a fault, on a machine under load.
const PATIENCE: Duration = Duration::from_secs(150);

/// A cluster of private servers with a queue for jobs.
pub(crate) trait Cluster {
    /// The name of its [worker](worker)'s broker.
    const BROKER: &'static str;

    /// Returns the addresses for a worker, which begins with the first one.
    fn addresses(&self) -> Vec<String>;

    /// Returns the queue for the worker with this number, if not all read the same.
    fn queue(&self, _: usize) -> String {
        String::new()
    }

    /// Publishes jobs, and waits until all are confirmed.
    async fn publish(&self, jobs: impl Iterator<Item = u32>);

    /// Returns the numbers of consumers, and of jobs that are not settled; `None` if it can't tell yet.
    async fn standing(&self) -> Option<(usize, usize)>;

    /// Does what an operator has to do if jobs don't come back by themselves.
    async fn mend(&self) {}

    /// Returns the payloads of all dead letters.
    async fn dead(&self) -> Vec<String>;
}

/// What the workers do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) test: &'static str,
    pub(crate) jobs: u32,
    /// The time that each job takes.
    pub(crate) work: Duration,
    /// Whether the cluster is [mended](Cluster::mend) if jobs don't come back.
    is_mended: bool,
}

impl Plan {
    pub(crate) fn new(test: &'static str) -> Self {
        Self {
            test,
            jobs: 10_000,
            work: Duration::from_millis(250),
            is_mended: false,
        }
    }

    pub(crate) fn jobs(mut self, jobs: u32) -> Self {
        self.jobs = jobs;
        self
    }

    pub(crate) fn work(mut self, millis: u64) -> Self {
        self.work = Duration::from_millis(millis);
        self
    }

    pub(crate) fn mended(mut self) -> Self {
        self.is_mended = true;
        self
    }

    /// Lets something happen to a cluster amid the jobs, and returns the figures when all are settled.
    ///
    /// `fault` returns when the cluster should be whole again.
    pub(crate) async fn run<C: Cluster>(
        self,
        mut cluster: C,
        fault: impl AsyncFnOnce(&mut C),
    ) -> Figures {
        cluster.publish(0..self.jobs).await;
        let mut workers = self.start(&cluster, WORKERS);
        let jobs = self.jobs as usize;
        wait(PATIENCE, || Jobs::read(&workers).done() >= jobs / 10).await;

        let broken = now();
        fault(&mut cluster).await;
        let healed = now();

        let are_done = || Jobs::read(&workers).done() == jobs;
        wait(PATIENCE / 2, are_done).await;
        if self.is_mended && !are_done() {
            cluster.mend().await;
        }
        wait(PATIENCE / 2, are_done).await;
        let mut figures = Figures {
            jobs: self.jobs,
            ghosts: ghosts(&cluster).await,
            ..Figures::default()
        };
        let mut left = usize::MAX;
        let started = Instant::now();
        while left > 0 && started.elapsed() < Duration::from_secs(30) {
            if let Some((_, unsettled)) = cluster.standing().await {
                left = unsettled;
            }
            sleep(Duration::from_millis(100)).await;
        }
        figures.left = left;
        let dead = cluster.dead().await;
        for worker in &mut workers {
            worker.end();
        }
        figures.count(&Jobs::read(&workers), &dead, broken..=healed);
        for worker in &workers {
            figures.read(&worker.printed());
        }
        self.keep_logs(C::BROKER, &workers);
        println!("figures broker={} test={} {figures}", C::BROKER, self.test);
        figures
    }

    /// Prints how many jobs a second some workers settle, on a cluster without faults.
    pub(crate) async fn measure<C: Cluster>(self, cluster: &C, workers: usize) {
        // Good ones, so that nothing is waited for.
        cluster.publish((0..self.jobs).map(|job| 10 * job)).await;
        let started = self.start(cluster, workers);
        let jobs = self.jobs as usize;
        wait(PATIENCE, || Jobs::read(&started).done() == jobs).await;
        let time = Jobs::read(&started).time();
        let rate = f64::from(self.jobs) / time.as_secs_f64();
        let (broker, test) = (C::BROKER, self.test);
        println!(
            "figures broker={broker} test={test} workers={workers} jobs={jobs} jobs_per_s={rate:.0}"
        );
    }

    fn start<C: Cluster>(self, cluster: &C, workers: usize) -> Vec<Child> {
        let addresses = cluster.addresses().join(",");
        let work = self.work.as_millis().to_string();
        let start = |nth| {
            let settings = [
                ("BROKER", C::BROKER),
                ("ADDRESSES", &addresses),
                ("QUEUE", &cluster.queue(nth)),
                ("WORK_MS", &work),
            ];
            Child::start(worker::MODULE, "worker", &settings)
        };
        (0..workers).map(start).collect()
    }

    /// Keeps the logs of the workers in a folder, if it is named: they tell what a pause was made of.
    fn keep_logs(self, broker: &str, workers: &[Child]) {
        let Some(folder) = env::var_os("CLUSTER_LOGS") else {
            return;
        };
        for (nth, worker) in workers.iter().enumerate() {
            let name = format!("{broker}-{}-{nth}.log", self.test);
            fs::write(Path::new(&folder).join(name), worker.printed()).unwrap();
        }
    }
}

/// Returns how many more consumers than workers there are, when there are none or after 30 s.
async fn ghosts(cluster: &impl Cluster) -> i64 {
    let started = Instant::now();
    loop {
        let standing = cluster.standing().await;
        let consumers = standing.map(|(consumers, _)| consumers as i64);
        let ghosts = consumers.map_or(i64::MIN, |consumers| consumers - WORKERS as i64);
        if ghosts == 0 || started.elapsed() > Duration::from_secs(30) {
            return ghosts;
        }
        sleep(Duration::from_millis(200)).await;
    }
}

/// Waits until `holds` does, or for `patience`; what it means if it does not is in the figures.
async fn wait(patience: Duration, holds: impl Fn() -> bool) {
    let started = Instant::now();
    while !holds() && started.elapsed() < patience {
        sleep(Duration::from_millis(200)).await;
    }
}
