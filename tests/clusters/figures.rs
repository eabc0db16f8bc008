//! Figures of a trial, from the ledgers of its workers and from the broker.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    ops::RangeInclusive,
    time::Duration,
};

use crate::{child::Child, worker::Kind};

/// Jobs by the ledgers of the workers.
#[derive(Clone, Debug, Default)]
pub(crate) struct Jobs {
    runs: BTreeMap<u32, usize>,
    /// When each was settled for good for the first time.
    settled: BTreeMap<u32, Duration>,
    /// Of all settlements, in this order.
    times: Vec<Duration>,
}

impl Jobs {
    pub(crate) fn read(workers: &[Child]) -> Self {
        let mut jobs = Self::default();
        for entry in workers.iter().flat_map(Child::entries) {
            let job = entry.text.parse().unwrap();
            if entry.word == "run" {
                *jobs.runs.entry(job).or_default() += 1;
                continue;
            }
            jobs.times.push(entry.time);
            if matches!(entry.word.as_str(), "acked" | "rejected") {
                let first = jobs.settled.entry(job).or_insert(entry.time);
                *first = entry.time.min(*first);
            }
        }
        jobs.times.sort_unstable();
        jobs
    }

    /// Returns how many are settled for good, or at least ran as often as they have to.
    pub(crate) fn done(&self) -> usize {
        self.runs.keys().filter(|&&job| self.is_done(job)).count()
    }

    /// Returns the time from the first settlement to the last one.
    pub(crate) fn time(&self) -> Duration {
        let ends = self.times.first().zip(self.times.last());
        ends.map_or(Duration::ZERO, |(&first, &last)| last - first)
    }

    fn is_done(&self, job: u32) -> bool {
        let runs = self.runs.get(&job).copied().unwrap_or_default();
        self.settled.contains_key(&job) || runs >= Self::expected(job)
    }

    /// Returns how often a job runs without a fault.
    fn expected(job: u32) -> usize {
        match Kind::of(job) {
            Kind::Flaky => 2,
            Kind::Good | Kind::Bad => 1,
        }
    }
}

/// What a fault did to the jobs.
#[derive(Clone, Debug, Default)]
pub(crate) struct Figures {
    pub(crate) jobs: u32,
    /// Jobs that never ran to their end, and bad ones that are no dead letters.
    pub(crate) lost: usize,
    /// Jobs that ran to their end, but no worker knows whether they are settled.
    pub(crate) unconfirmed: usize,
    /// Runs beyond those that the job itself is the reason for.
    pub(crate) duplicates: usize,
    /// The longest time without a settlement by any worker, from the fault until 95 % of the jobs were
    /// settled.
    pub(crate) longest_pause: Duration,
    /// From the end of the fault to the next settlement.
    pub(crate) recovery: Duration,
    pub(crate) sessions_ended: usize,
    /// Attempts to begin a session.
    pub(crate) failed_attempts: usize,
    pub(crate) dead: usize,
    pub(crate) dead_doubled: usize,
    /// Consumers at the broker beyond the workers, after 30 s at most without a job.
    pub(crate) ghosts: i64,
    /// Unsettled jobs at the broker at the end.
    pub(crate) left: usize,
    /// From the first settlement to the last one.
    pub(crate) total: Duration,
}

impl Figures {
    /// Adds those that the workers wrote down.
    pub(crate) fn count(&mut self, jobs: &Jobs, dead: &[String], fault: RangeInclusive<Duration>) {
        let times = &jobs.times;
        let (broken, healed) = fault.into_inner();
        let mut settled: Vec<_> = jobs.settled.values().copied().collect();
        settled.sort_unstable();
        // Later on there may be nothing to do but retries.
        let most = settled.get(self.jobs as usize * 95 / 100);
        let until = most.or(times.last()).copied().unwrap_or(broken);
        let pauses = times.windows(2).map(|pair| (pair[1], pair[1] - pair[0]));
        let pauses = pauses.filter(|(end, _)| (broken..=until.max(healed)).contains(end));
        self.longest_pause = pauses.map(|(_, pause)| pause).max().unwrap_or_default();
        let next = times.iter().find(|&&time| time >= healed);
        self.recovery = next.map_or(Duration::ZERO, |&next| next - healed);
        self.total = jobs.time();

        let letters: BTreeSet<_> = dead.iter().collect();
        self.dead = dead.len();
        self.dead_doubled = dead.len() - letters.len();
        for job in 0..self.jobs {
            let is_dead = letters.contains(&job.to_string());
            let is_done = jobs.is_done(job) && is_dead == (Kind::of(job) == Kind::Bad);
            self.lost += usize::from(!is_done);
            self.unconfirmed += usize::from(is_done && !jobs.settled.contains_key(&job));
        }
        let duplicates = jobs.runs.iter();
        self.duplicates = duplicates
            .map(|(&job, runs)| runs.saturating_sub(Jobs::expected(job)))
            .sum();
    }

    /// Asserts that nothing was lost or left, and bounds on the rest, which are wide for a machine under load.
    pub(crate) fn assert(&self, longest_pause: Duration, duplicates: usize) {
        assert_eq!((self.lost, self.left, self.ghosts), (0, 0, 0), "{self}");
        assert!(self.longest_pause < longest_pause, "{self}");
        assert!(self.duplicates <= duplicates, "{self}");
    }

    /// Adds those that are in the log of a worker.
    pub(crate) fn read(&mut self, log: &str) {
        let mut is_connected = false;
        for line in log.lines() {
            if line.ends_with(": connected") {
                is_connected = true;
            } else if line.contains("reconnecting after a pause") {
                match is_connected {
                    true => self.sessions_ended += 1,
                    false => self.failed_attempts += 1,
                }
                is_connected = false;
            }
        }
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "jobs={} lost={} unconfirmed={} duplicates={} longest_pause_ms={} recovery_ms={} sessions_ended={} \
             failed_attempts={} dead={} dead_doubled={} ghosts={} left={} total_ms={}",
            self.jobs,
            self.lost,
            self.unconfirmed,
            self.duplicates,
            self.longest_pause.as_millis(),
            self.recovery.as_millis(),
            self.sessions_ended,
            self.failed_attempts,
            self.dead,
            self.dead_doubled,
            self.ghosts,
            self.left,
            self.total.as_millis(),
        )
    }
}
