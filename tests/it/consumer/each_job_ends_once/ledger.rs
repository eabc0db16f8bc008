//! [`Ledger`] of the worker's jobs and settlements, beside the counts of the broker.

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
    task::{Context, Poll, ready},
};

use tower_sentinel::{
    Job, Verdict,
    broker::memory::{Counts, DeadLetter, Delivery, DeliveryError, DeliveryTag, Queue, Settlement},
    settle::{Capabilities, Lease, Reason, Settle, Unsettled},
};

/// The job's number is its payload.
pub(super) type Jobs = Queue<usize>;

/// Known facts of each job, from the worker's side.
#[derive(Clone, Default)]
pub(super) struct Ledger(Arc<Mutex<Entries>>);

#[derive(Default)]
struct Entries {
    jobs: Vec<Entry>,
    /// Number of calls of the policy, for each delivery.
    policy_calls: Vec<u32>,
    violations: Vec<String>,
}

#[derive(Clone, Debug, Default)]
struct Entry {
    /// A process that is killed does not come to all of them.
    is_published: bool,
    deliveries: usize,
    /// Expected count of the next delivery, by the broker.
    next: u32,
    acks: u32,
    rejects: u32,
    /// Number of times that it was found in the queue at the end.
    left: u32,
}

impl Ledger {
    pub(super) fn of(jobs: usize) -> Self {
        let jobs = vec![Entry::default(); jobs];
        Self(Arc::new(Mutex::new(Entries {
            jobs,
            ..Entries::default()
        })))
    }

    fn lock(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().unwrap()
    }

    pub(super) fn publish(&self, job: usize) {
        self.lock().jobs[job].is_published = true;
    }

    /// Enters a delivery, with which no more than `prefetch` may be unsettled.
    pub(super) fn deliver(&self, queue: &Jobs, prefetch: usize, it: &Delivery<usize>) -> Tracked {
        let unacked = queue.counts().unacked;
        let (job, tag) = (*it.payload(), it.tag());
        let entries = &mut *self.lock();
        let number = entries.policy_calls.len();
        entries.policy_calls.push(0);
        let entry = &mut entries.jobs[job];
        entry.deliveries += 1;
        let expected = entry.next + 1;
        // An attempt is charged unless it is released.
        entry.next += 1;
        let attempt = entry.deliveries - 1;
        if entry.acks + entry.rejects > 0 {
            let what = format!("job {job} is delivered though it is settled: {entry:?}");
            entries.violations.push(what);
        } else if tag.deliveries() != Some(expected) {
            let found = tag.deliveries();
            let what = format!("job {job} has {found:?} deliveries and not {expected}");
            entries.violations.push(what);
        }
        if unacked > prefetch {
            let what = format!("{unacked} jobs are unacked with a prefetch of {prefetch}");
            entries.violations.push(what);
        }
        Tracked {
            tag,
            ledger: self.clone(),
            job,
            attempt,
            number,
            is_retry: false,
        }
    }

    fn settled(&self, job: usize, verdict: Verdict) {
        let entry = &mut self.lock().jobs[job];
        match verdict {
            Verdict::Ack => entry.acks += 1,
            Verdict::Reject => entry.rejects += 1,
            Verdict::Release { .. } => entry.next -= 1,
            Verdict::Retry { .. } | Verdict::Abandon => {}
        }
    }

    pub(super) fn deliveries(&self) -> u64 {
        self.lock().policy_calls.len() as u64
    }

    /// Checks that the policy was called once for each delivery.
    pub(super) fn check_policy(&self) -> Result<(), String> {
        let entries = self.lock();
        match entries.policy_calls.iter().position(|&calls| calls != 1) {
            None => Ok(()),
            Some(number) => {
                let calls = entries.policy_calls[number];
                Err(format!(
                    "the policy was called {calls} times for delivery {number}"
                ))
            }
        }
    }

    /// Enters a job that is still in the queue.
    pub(super) fn leave(&self, job: usize) {
        self.lock().jobs[job].left += 1;
    }

    /// Checks that each job is in one place, and that the broker says the same.
    pub(super) fn check(
        &self,
        counts: Counts,
        letters: &[DeadLetter<usize>],
    ) -> Result<(), String> {
        let entries = self.lock();
        if let Some(violation) = entries.violations.first() {
            return Err(violation.clone());
        }
        for (job, entry) in entries.jobs.iter().enumerate() {
            let dead = letters.iter().filter(|it| it.payload == job);
            let dead: Vec<_> = dead.map(|it| it.death.deliveries).collect();
            let (acks, rejects) = (entry.acks, entry.rejects);
            if acks + rejects + entry.left != u32::from(entry.is_published) {
                return Err(format!("job {job} is not in one place: {entry:?}"));
            }
            if dead.len() != rejects as usize {
                return Err(format!(
                    "job {job} is {dead:?} in the dead letters: {entry:?}"
                ));
            }
            if dead.iter().any(|&deliveries| deliveries != entry.next) {
                return Err(format!(
                    "job {job} died after {dead:?} deliveries: {entry:?}"
                ));
            }
        }
        let acks: u32 = entries.jobs.iter().map(|entry| entry.acks).sum();
        let rejects: u32 = entries.jobs.iter().map(|entry| entry.rejects).sum();
        let found = (counts.acked, counts.dead, counts.dropped);
        if found != (acks.into(), rejects.into(), 0) {
            return Err(format!(
                "{acks} acked and {rejects} rejected, but {counts:?}"
            ));
        }
        Ok(())
    }
}

/// A delivery and its tag, whose settlements are entered.
#[derive(Clone)]
pub(super) struct Tracked {
    tag: DeliveryTag<usize>,
    ledger: Ledger,
    pub(super) job: usize,
    /// Number of deliveries of the job before this one, charged or not.
    pub(super) attempt: usize,
    number: usize,
    is_retry: bool,
}

impl std::fmt::Debug for Tracked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.number)
    }
}

impl Job for Tracked {
    type Tag = Self;

    fn tag(&self) -> Self {
        self.clone()
    }
}

impl Settle for Tracked {
    type Error = DeliveryError;
    type Future = Entering;

    fn settle(self, verdict: Verdict, reason: Reason) -> Entering {
        if !self.is_retry {
            self.ledger.lock().policy_calls[self.number] += 1;
        }
        Entering {
            settlement: self.tag.clone().settle(verdict, reason),
            tracked: self,
            verdict,
        }
    }

    async fn keep_alive(&self) -> Result<Lease, DeliveryError> {
        self.tag.keep_alive().await
    }

    fn deliveries(&self) -> Option<u32> {
        self.tag.deliveries()
    }

    fn redelivered(&self) -> Option<bool> {
        self.tag.redelivered()
    }

    fn capabilities(&self) -> Capabilities {
        self.tag.capabilities()
    }
}

/// A settlement that is entered in the poll in which the broker has it.
pub(super) struct Entering {
    settlement: Settlement<usize>,
    tracked: Tracked,
    verdict: Verdict,
}

impl Future for Entering {
    type Output = Result<(), Unsettled<Tracked, DeliveryError>>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let result = ready!(Pin::new(&mut self.settlement).poll(cx));
        let Self {
            tracked, verdict, ..
        } = &*self;
        Poll::Ready(match result {
            Ok(()) => {
                tracked.ledger.settled(tracked.job, *verdict);
                Ok(())
            }
            Err(unsettled) => Err(unsettled.map_tag(|tag| Tracked {
                tag,
                is_retry: true,
                ..tracked.clone()
            })),
        })
    }
}
