//! State machine that pauses, probes and resumes, without wakers, timers and locks.

use std::{collections::VecDeque, time::Duration};

use tokio::time::Instant;

use crate::{backoff::Delays, time::deadline};

/// Settings of a layer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Number of last jobs in the window; at least 1.
    pub(super) window: usize,
    /// Failed part of the window that causes a pause; above 0, and at most 1.
    pub(super) threshold: f64,
    /// Number of jobs that must have ended before any pause.
    pub(super) sample: usize,
    pub(super) pauses: Delays,
}

impl Limits {
    fn is_exceeded(&self, failures: usize, jobs: usize) -> bool {
        // A division, since the product of 0.55 and 100 is above 55.
        jobs >= self.sample.min(self.window) && failures as f64 / jobs as f64 >= self.threshold
    }

    /// Returns the number of failures in a row that always lead to a pause, regardless of earlier results.
    pub(super) fn longest_run(&self) -> usize {
        // After a window full of successes, or after nothing.
        let enough = |failures: usize| failures as f64 / self.window as f64 >= self.threshold;
        let (mut least, mut most) = (1, self.window);
        while least < most {
            let middle = least + (most - least) / 2;
            match enough(middle) {
                true => most = middle,
                false => least = middle + 1,
            }
        }
        least.max(self.sample.min(self.window))
    }

    /// Returns the largest number of pauses that can end within `time`.
    pub(super) fn most_probes(&self, time: Duration) -> u64 {
        let (mut left, mut probes) = (time, 0_u32);
        loop {
            let next = probes.saturating_add(1);
            let pause = self.pauses.nth(next);
            if pause > left {
                return probes.into();
            }
            // Two in a row may be alike and grow all the same, since they are whole milliseconds.
            if self.pauses.is_longest(next) {
                let more = left.as_nanos() / pause.as_nanos();
                return u64::from(probes).saturating_add(more.try_into().unwrap_or(u64::MAX));
            }
            (left, probes) = (left - pause, next);
        }
    }
}

/// Results of the last jobs.
#[derive(Debug, Default)]
struct Window {
    failed: VecDeque<bool>,
    failures: usize,
}

impl Window {
    fn push(&mut self, failed: bool, size: usize) {
        if self.failed.len() == size {
            let oldest = self.failed.pop_front().unwrap_or_default();
            self.failures -= usize::from(oldest);
        }
        self.failed.push_back(failed);
        self.failures += usize::from(failed);
    }

    fn clear(&mut self) {
        self.failed.clear();
        self.failures = 0;
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Phase {
    Running,
    Paused {
        pause: Duration,
        /// `None`: too far for a timer.
        until: Option<Instant>,
    },
    /// The pause is over. The holder is `None` while no instance has the probe.
    Probing {
        holder: Option<u64>,
    },
}

/// Result for a service that is polled for readiness.
#[derive(Clone, Copy, Debug)]
pub(super) enum Pass {
    /// Any number of jobs may be called.
    Open,
    /// One job may be called, by the holder of this number.
    Probe(u64),
    /// No job may be called: ask again at this time, or after the next change.
    Wait(Option<Instant>),
}

/// Change of state, with the fields of its event.
#[derive(Clone, Copy, Debug)]
pub(super) enum Change {
    Paused {
        failures: usize,
        jobs: usize,
        failed_probes: u32,
        pause: Duration,
    },
    Probing,
    Resumed,
}

#[derive(Debug)]
pub(super) struct Machine {
    limits: Limits,
    window: Window,
    phase: Phase,
    /// Number of times that it resumed. A job called in an earlier epoch is not counted.
    epoch: u64,
    /// Pauses since it last ran. Each but the first follows a failed probe.
    pauses: u32,
    probes: u64,
}

impl Machine {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            window: Window::default(),
            phase: Phase::Running,
            epoch: 0,
            pauses: 0,
            probes: 0,
        }
    }

    pub(super) fn phase(&self) -> Phase {
        self.phase
    }

    pub(super) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Returns whether one more success would change nothing.
    pub(super) fn is_calm(&self) -> bool {
        let Window { failed, failures } = &self.window;
        matches!(self.phase, Phase::Running) && *failures == 0 && failed.len() == self.limits.window
    }

    /// Decides on a service that is polled for readiness.
    pub(super) fn ask(&mut self, now: Instant) -> (Pass, Option<Change>) {
        let mut change = None;
        match self.phase {
            Phase::Running => return (Pass::Open, None),
            Phase::Paused { until, .. } if until.is_none_or(|until| now < until) => {
                return (Pass::Wait(until), None);
            }
            Phase::Paused { .. } => change = Some(Change::Probing),
            Phase::Probing { holder: Some(_) } => return (Pass::Wait(None), None),
            Phase::Probing { holder: None } => {}
        }
        self.probes += 1;
        let holder = Some(self.probes);
        self.phase = Phase::Probing { holder };
        (Pass::Probe(self.probes), change)
    }

    /// Counts the result of a job that was called in `epoch`, without a probe.
    pub(super) fn record(&mut self, epoch: u64, failed: bool, now: Instant) -> Option<Change> {
        if epoch != self.epoch || !matches!(self.phase, Phase::Running) {
            return None;
        }
        self.window.push(failed, self.limits.window);
        let (failures, jobs) = (self.window.failures, self.window.failed.len());
        // A success may complete the sample, but is not a reason to pause.
        let is_exceeded = failed && self.limits.is_exceeded(failures, jobs);
        is_exceeded.then(|| self.pause(now))
    }

    /// Takes the result of a probe.
    pub(super) fn conclude(&mut self, probe: u64, failed: bool, now: Instant) -> Option<Change> {
        if !self.holds(probe) {
            return None;
        }
        if failed {
            return Some(self.pause(now));
        }
        self.phase = Phase::Running;
        self.epoch += 1;
        self.pauses = 0;
        self.window.clear();
        Some(Change::Resumed)
    }

    /// Takes back a probe without a result, and returns whether it was still held.
    pub(super) fn give_back(&mut self, probe: u64) -> bool {
        let holds = self.holds(probe);
        if holds {
            self.phase = Phase::Probing { holder: None };
        }
        holds
    }

    fn holds(&self, probe: u64) -> bool {
        matches!(self.phase, Phase::Probing { holder: Some(holder) } if holder == probe)
    }

    fn pause(&mut self, now: Instant) -> Change {
        let failed_probes = self.pauses;
        self.pauses = self.pauses.saturating_add(1);
        let pause = self.limits.pauses.nth(self.pauses);
        let until = deadline(now, pause);
        self.phase = Phase::Paused { pause, until };
        Change::Paused {
            failures: self.window.failures,
            jobs: self.window.failed.len(),
            failed_probes,
            pause,
        }
    }
}
