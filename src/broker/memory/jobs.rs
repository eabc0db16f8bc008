//! [`Jobs`] of one queue: those that are ready, delayed, or held by a consumer.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, VecDeque},
    sync::Arc,
    time::Duration,
};

use slab::Slab;
use tokio::time::Instant;

use super::{
    death::{DeadLetter, Death},
    entry::{Entry, Held, Mark, Taken},
    properties::Properties,
};

/// Counts of a queue's jobs by their state; the number of published jobs is the sum of all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counts {
    /// Jobs that wait for a consumer.
    pub ready: usize,
    /// Jobs that were given back with a delay that is not over.
    pub delayed: usize,
    /// Jobs that are delivered and not settled.
    pub unacked: usize,
    /// Jobs acked so far.
    pub acked: u64,
    /// Jobs rejected into the dead-letter queue so far.
    pub dead: u64,
    /// Jobs rejected without a dead-letter queue so far.
    pub dropped: u64,
    /// Jobs moved to the queue of the suspects so far.
    pub suspects: u64,
}

/// End of a lease, unless it is prolonged or the job is settled before.
#[derive(Clone, Copy, Debug)]
struct LeaseEnd {
    at: Instant,
    key: usize,
    number: u64,
}

#[derive(Debug)]
pub(super) struct Jobs<P> {
    slab: Slab<Entry<P>>,
    /// Jobs that came back. They are delivered before those in `ready`.
    returned: VecDeque<usize>,
    ready: VecDeque<usize>,
    /// With a number that keeps the order of jobs that are due at the same time.
    delayed: BinaryHeap<Reverse<(Instant, u64, usize)>>,
    /// In the order of time, since all leases of a queue have the same length. Entries of settled jobs and
    /// prolonged leases are removed when they come to the front.
    leases: VecDeque<LeaseEnd>,
    lease: Option<Duration>,
    unacked: usize,
    acked: u64,
    dead: u64,
    dropped: u64,
    suspects: u64,
}

/// Destination of a rejected job.
#[derive(Clone, Copy, Debug)]
pub(super) enum Rejection {
    DeadLetter,
    Suspect,
    Dropped,
}

impl<P> Jobs<P> {
    pub(super) fn new(lease: Option<Duration>) -> Self {
        Self {
            slab: Slab::new(),
            returned: VecDeque::new(),
            ready: VecDeque::new(),
            delayed: BinaryHeap::new(),
            leases: VecDeque::new(),
            lease,
            unacked: 0,
            acked: 0,
            dead: 0,
            dropped: 0,
            suspects: 0,
        }
    }

    pub(super) fn counts(&self) -> Counts {
        Counts {
            ready: self.returned.len() + self.ready.len(),
            delayed: self.delayed.len(),
            unacked: self.unacked,
            acked: self.acked,
            dead: self.dead,
            dropped: self.dropped,
            suspects: self.suspects,
        }
    }

    /// Returns whether no job is left to be settled.
    pub(super) fn is_empty(&self) -> bool {
        self.slab.is_empty()
    }

    pub(super) fn has_ready(&self) -> bool {
        !(self.returned.is_empty() && self.ready.is_empty())
    }

    pub(super) fn push(&mut self, payload: P, properties: Properties, death: Option<Arc<Death>>) {
        let key = self.slab.insert(Entry {
            payload,
            properties,
            attempts: 0,
            redelivered: false,
            is_suspect: false,
            death,
            held: None,
        });
        self.ready.push_back(key);
    }

    /// Gives the next job to `channel`, as the delivery with this number.
    pub(super) fn take(&mut self, channel: usize, number: u64) -> Option<Taken<P>>
    where
        P: Clone,
    {
        let next = self.returned.front().or_else(|| self.ready.front());
        let key = *next?;
        let entry = &mut self.slab[key];
        // Foreign code, which may panic: nothing is changed before it.
        let payload = entry.payload.clone();
        let until = self.lease.map(end_after);
        entry.held = Some(Held {
            channel,
            number,
            until,
            abandoned: false,
        });
        let taken = Taken {
            payload,
            properties: entry.properties.clone(),
            key,
            deliveries: entry.attempts.saturating_add(1),
            redelivered: entry.redelivered,
            is_suspect: entry.is_suspect,
            death: entry.death.clone(),
        };
        if self.returned.pop_front().is_none() {
            self.ready.pop_front();
        }
        self.unacked += 1;
        if let Some(at) = until {
            self.push_lease(LeaseEnd { at, key, number });
        }
        Some(taken)
    }

    /// Returns the holder of the job, if it still is the delivery with this number.
    pub(super) fn held(&mut self, key: usize, number: u64) -> Option<&mut Held> {
        let held = self.slab.get_mut(key)?.held.as_mut()?;
        (held.number == number).then_some(held)
    }

    /// Returns the number of jobs that a channel holds and has abandoned.
    pub(super) fn abandoned(&self, channel: usize) -> usize {
        let held = self.slab.iter().filter_map(|(_, entry)| entry.held);
        held.filter(|held| held.channel == channel && held.abandoned)
            .count()
    }

    /// Removes a job that is held, and counts it as acked.
    pub(super) fn ack(&mut self, key: usize) -> P {
        self.acked += 1;
        self.remove(key).payload
    }

    /// Removes a job that is held, and counts it by its destination.
    pub(super) fn reject(&mut self, key: usize, to: Rejection) -> (P, Properties, u32) {
        match to {
            Rejection::DeadLetter => self.dead += 1,
            Rejection::Suspect => self.suspects += 1,
            Rejection::Dropped => self.dropped += 1,
        }
        let entry = self.remove(key);
        let deliveries = entry.attempts.saturating_add(1);
        (entry.payload, entry.properties, deliveries)
    }

    fn remove(&mut self, key: usize) -> Entry<P> {
        self.unacked -= 1;
        self.slab.remove(key)
    }

    /// Puts a job that was settled so behind the jobs that came back before.
    pub(super) fn give_back(&mut self, key: usize, charge: bool) {
        self.let_go(key, charge, false);
        self.returned.push_back(key);
    }

    /// Puts a job that is held aside for `delay`, and returns whether it is the next to be due.
    pub(super) fn delay(&mut self, key: usize, delay: Duration, number: u64, charge: bool) -> bool {
        let before = self.deadline();
        self.let_go(key, charge, false);
        let at = end_after(delay);
        self.delayed.push(Reverse((at, number, key)));
        before.is_none_or(|before| at < before)
    }

    /// Puts the jobs that `channel` holds to the front, in the order of delivery, and returns their number.
    pub(super) fn give_back_all(&mut self, channel: usize) -> usize {
        let held = self.slab.iter().filter_map(|(key, entry)| {
            let held = entry.held.filter(|held| held.channel == channel)?;
            Some((held.number, key))
        });
        let mut held: Vec<_> = held.collect();
        held.sort_unstable();
        for &(_, key) in held.iter().rev() {
            self.let_go(key, true, true);
            self.returned.push_front(key);
        }
        held.len()
    }

    fn let_go(&mut self, key: usize, charge: bool, is_suspect: bool) {
        let entry = &mut self.slab[key];
        entry.held = None;
        entry.redelivered = true;
        entry.is_suspect = is_suspect;
        entry.attempts = entry.attempts.saturating_add(u32::from(charge));
        self.unacked -= 1;
    }

    /// Prolongs the lease of a job that is held, and returns whether there is one.
    pub(super) fn prolong(&mut self, key: usize) -> bool {
        let Some(lease) = self.lease else {
            return false;
        };
        let at = end_after(lease);
        let Some(held) = self.slab[key].held.as_mut() else {
            return false;
        };
        held.until = Some(at);
        let number = held.number;
        self.push_lease(LeaseEnd { at, key, number });
        true
    }

    fn push_lease(&mut self, lease: LeaseEnd) {
        // Bounds the queue by the number of held jobs, also if the first of them lives long.
        if self.leases.len() > 2 * self.unacked + 32 {
            let slab = &self.slab;
            self.leases.retain(|lease| is_current(slab, lease));
        }
        self.leases.push_back(lease);
    }

    /// Returns whether time can change anything.
    pub(super) fn has_deadline(&self) -> bool {
        !(self.delayed.is_empty() && self.leases.is_empty())
    }

    /// Returns the time at which the next job is due or the next lease ends.
    pub(super) fn deadline(&mut self) -> Option<Instant> {
        while let Some(lease) = self.leases.front() {
            if is_current(&self.slab, lease) {
                break;
            }
            self.leases.pop_front();
        }
        let due = self.delayed.peek().map(|Reverse((at, ..))| *at);
        let lapses = self.leases.front().map(|lease| lease.at);
        match (due, lapses) {
            (Some(due), Some(lapses)) => Some(due.min(lapses)),
            (due, lapses) => due.or(lapses),
        }
    }

    /// Readies the jobs that are due, and returns whether there were any.
    pub(super) fn ready_due(&mut self, now: Instant) -> bool {
        let before = self.returned.len();
        while let Some(Reverse((at, _, key))) = self.delayed.peek().copied() {
            if at > now {
                break;
            }
            self.delayed.pop();
            self.returned.push_back(key);
        }
        self.returned.len() > before
    }

    /// Takes a job back whose lease is over, and returns its holder.
    pub(super) fn take_lapsed(&mut self, now: Instant) -> Option<Held> {
        self.deadline();
        let lease = *self.leases.front().filter(|lease| lease.at <= now)?;
        self.leases.pop_front();
        let held = self.slab[lease.key].held;
        self.let_go(lease.key, true, true);
        self.returned.push_back(lease.key);
        held
    }

    /// Returns the jobs that wait for a consumer, in their order.
    pub(super) fn waiting(&self) -> impl Iterator<Item = Mark> {
        let keys = self.returned.iter().chain(&self.ready);
        keys.map(|key| self.slab[*key].mark(*key))
    }

    /// Returns a job that waits for a consumer.
    pub(super) fn find(&self, mark: Mark) -> Option<(&Properties, Option<&Death>)> {
        let entry = self.slab.get(mark.key)?;
        let is_it = entry.held.is_none() && entry.mark(mark.key) == mark;
        is_it.then_some((&entry.properties, entry.death.as_deref()))
    }

    /// Removes a job that waits for a consumer.
    pub(super) fn take_out(&mut self, mark: Mark) -> Option<(P, Properties)> {
        self.find(mark)?;
        let is_it = |key: &usize| *key == mark.key;
        match self.returned.iter().position(is_it) {
            Some(index) => drop(self.returned.remove(index)),
            // `None` if it is delayed.
            None => drop(self.ready.remove(self.ready.iter().position(is_it)?)),
        }
        let entry = self.slab.remove(mark.key);
        Some((entry.payload, entry.properties))
    }

    /// Returns the dead letters that came from the queue with this name.
    pub(super) fn dead_letters(&self, name: &str) -> Vec<DeadLetter<P>>
    where
        P: Clone,
    {
        let letters = self.slab.iter().filter_map(|(_, entry)| {
            let death = entry.death.as_ref().filter(|death| *death.queue == *name)?;
            let payload = entry.payload.clone();
            let death = Arc::clone(death);
            Some(DeadLetter { payload, death })
        });
        let mut letters: Vec<_> = letters.collect();
        letters.sort_by_key(|letter| letter.death.number);
        letters
    }
}

/// Returns whether `lease` is still the end of its delivery's lease.
fn is_current<P>(slab: &Slab<Entry<P>>, lease: &LeaseEnd) -> bool {
    let held = slab.get(lease.key).and_then(|entry| entry.held);
    held.is_some_and(|held| held.number == lease.number && held.until == Some(lease.at))
}

/// Returns the time after `delay`, or 30 years from now if the clock has no such time.
fn end_after(delay: Duration) -> Instant {
    let now = Instant::now();
    let far = Duration::from_secs(86_400 * 365 * 30);
    now.checked_add(delay).unwrap_or_else(|| now + far)
}
