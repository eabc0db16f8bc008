//! What a broker knows, behind its one lock.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::Waker,
    time::Duration,
};

use slab::Slab;
use tokio::time::Instant;

use super::{
    Death, Error, SettleFault,
    jobs::{Jobs, Taken},
};
use crate::{Lease, Reason, Verdict};

/// A broker: its state, and the lock that is held for one step of it, never over an await.
#[derive(Debug)]
pub(super) struct Server<P>(Mutex<State<P>>);

impl<P> Server<P> {
    pub(super) fn new() -> Self {
        Self(Mutex::new(State {
            queues: Vec::new(),
            channels: Slab::new(),
            last_number: 0,
            severed: 0,
            refusals: 0,
        }))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State<P>> {
        // What panics while it is held, a payload's `clone`, leaves nothing half-done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
pub(super) struct State<P> {
    pub(super) queues: Vec<QueueState<P>>,
    pub(super) channels: Slab<Channel>,
    last_number: u64,
    /// Connections with numbers up to this one are lost.
    severed: u64,
    pub(super) refusals: u32,
}

#[derive(Debug)]
pub(super) struct QueueState<P> {
    pub(super) config: Config,
    pub(super) jobs: Jobs<P>,
    pub(super) faults: Faults,
    /// Channels that wait for a job, for a place, or for a time.
    waiting: Vec<(usize, Waker)>,
    /// Who waits until the queue is empty.
    pub(super) emptied: Vec<Waker>,
}

/// How a queue was declared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Config {
    pub(super) name: Arc<str>,
    pub(super) dead_letter: Option<usize>,
    pub(super) lease: Option<Duration>,
}

#[derive(Debug, Default)]
pub(super) struct Faults {
    pub(super) again: u32,
    pub(super) last: u32,
    pub(super) delay: Duration,
}

/// A consumer's share of a connection.
#[derive(Debug)]
pub(super) struct Channel {
    number: u64,
    connection: u64,
    queue: usize,
    prefetch: usize,
    unacked: usize,
    end: Option<End>,
    closed: Option<Waker>,
    /// The deliveries whose lease was lost.
    lapsed: Vec<u64>,
}

/// Why a channel is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// Its consumer gave it up.
    GivenUp,
    /// Its connection was lost.
    Lost,
}

/// What a tag answers for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Address {
    pub(super) queue: usize,
    pub(super) key: usize,
    pub(super) number: u64,
    channel: usize,
    channel_number: u64,
}

/// What there is for a consumer.
#[derive(Debug)]
pub(super) enum Next<P> {
    Job(Taken<P>, Address),
    /// Nothing before this time, if there is any, or the consumer's waker is woken.
    Wait(Option<Instant>),
    Ended(End),
}

/// What is to be done when the lock is released.
#[derive(Debug)]
#[must_use = "wakers are to be woken"]
pub(super) struct Step<T, P> {
    output: T,
    wakers: Wakers,
    /// What is no longer needed, and may panic when it is dropped.
    garbage: Option<P>,
}

impl<T, P> Step<T, P> {
    fn new(output: T, wakers: Wakers) -> Self {
        Self {
            output,
            wakers,
            garbage: None,
        }
    }

    /// Wakes who waits; the lock must not be held.
    pub(super) fn finish(self) -> T {
        self.wakers.wake();
        drop(self.garbage);
        self.output
    }
}

/// Wakers, without an allocation for the first.
#[derive(Debug, Default)]
pub(super) struct Wakers {
    first: Option<Waker>,
    others: Vec<Waker>,
}

impl Wakers {
    fn push(&mut self, waker: Waker) {
        match &self.first {
            None => self.first = Some(waker),
            Some(_) => self.others.push(waker),
        }
    }

    /// Wakes them; the lock must not be held.
    pub(super) fn wake(self) {
        self.first
            .into_iter()
            .chain(self.others)
            .for_each(Waker::wake);
    }
}

impl<P> QueueState<P> {
    fn wait(&mut self, channel: usize, waker: &Waker) {
        match self.waiting.iter_mut().find(|(it, _)| *it == channel) {
            Some((_, it)) => it.clone_from(waker),
            None => self.waiting.push((channel, waker.clone())),
        }
    }

    fn wake(&mut self, channel: usize, wakers: &mut Wakers) {
        if let Some(index) = self.waiting.iter().position(|(it, _)| *it == channel) {
            wakers.push(self.waiting.swap_remove(index).1);
        }
    }

    /// Wakes every consumer, so that none that is woken and not polled keeps a job from another.
    fn wake_all(&mut self, wakers: &mut Wakers) {
        self.waiting
            .drain(..)
            .for_each(|(_, waker)| wakers.push(waker));
    }

    fn wake_if_empty(&mut self, wakers: &mut Wakers) {
        if self.jobs.is_empty() {
            self.emptied.drain(..).for_each(|waker| wakers.push(waker));
        }
    }
}

impl<P> State<P> {
    fn next_number(&mut self) -> u64 {
        self.last_number += 1;
        self.last_number
    }

    pub(super) fn declare(&mut self, config: Config) -> usize {
        self.queues.push(QueueState {
            jobs: Jobs::new(config.lease),
            config,
            faults: Faults::default(),
            waiting: Vec::new(),
            emptied: Vec::new(),
        });
        self.queues.len() - 1
    }

    pub(super) fn find(&self, name: &str) -> Option<usize> {
        self.queues.iter().position(|it| *it.config.name == *name)
    }

    // === connections and channels ===

    pub(super) fn connect(&mut self) -> Result<u64, Error> {
        match self.refusals.checked_sub(1) {
            None => Ok(self.next_number()),
            Some(left) => {
                self.refusals = left;
                Err(Error::ConnectionRefused)
            }
        }
    }

    /// Returns whether `connection` was lost with all others.
    pub(super) fn is_severed(&self, connection: u64) -> bool {
        connection <= self.severed
    }

    pub(super) fn open(&mut self, connection: u64, queue: usize, prefetch: usize) -> usize {
        let number = self.next_number();
        self.channels.insert(Channel {
            number,
            connection,
            queue,
            prefetch,
            unacked: 0,
            end: None,
            closed: None,
            lapsed: Vec::new(),
        })
    }

    /// Closes the channels of one connection, or of all, as lost.
    pub(super) fn sever(&mut self, connection: Option<u64>) -> Step<(), P> {
        if connection.is_none() {
            self.severed = self.last_number;
        }
        let of_connection =
            |channel: &Channel| connection.is_none_or(|it| channel.connection == it);
        let channels = self.channels.iter().filter(|(_, it)| of_connection(it));
        let keys: Vec<_> = channels.map(|(key, _)| key).collect();
        let mut wakers = Wakers::default();
        for key in keys {
            self.close_into(key, End::Lost, &mut wakers);
        }
        Step::new((), wakers)
    }

    pub(super) fn close(&mut self, key: usize) -> Step<(), P> {
        let mut wakers = Wakers::default();
        self.close_into(key, End::GivenUp, &mut wakers);
        Step::new((), wakers)
    }

    /// Closes a channel whose subscription is dropped.
    pub(super) fn forget(&mut self, key: usize) -> Step<(), P> {
        let step = self.close(key);
        self.channels.remove(key);
        step
    }

    fn close_into(&mut self, key: usize, end: End, wakers: &mut Wakers) {
        let channel = &mut self.channels[key];
        if channel.end.is_some() {
            return;
        }
        channel.end = Some(end);
        channel.unacked = 0;
        channel
            .closed
            .take()
            .into_iter()
            .for_each(|it| wakers.push(it));
        let queue = &mut self.queues[channel.queue];
        queue.wake(key, wakers);
        queue.jobs.give_back_all(key);
        if queue.jobs.has_ready() {
            queue.wake_all(wakers);
        }
    }

    pub(super) fn poll_closed(&mut self, key: usize, waker: &Waker) -> Option<End> {
        let channel = &mut self.channels[key];
        if channel.end.is_none() {
            channel.closed = Some(waker.clone());
        }
        channel.end
    }

    // === jobs ===

    pub(super) fn publish(&mut self, queue: usize, payload: P) -> Step<(), P> {
        let queue = &mut self.queues[queue];
        queue.jobs.push(payload, None);
        let mut wakers = Wakers::default();
        queue.wake_all(&mut wakers);
        Step::new((), wakers)
    }

    pub(super) fn next(&mut self, key: usize, waker: &Waker) -> Step<Next<P>, P>
    where
        P: Clone,
    {
        let queue = self.channels[key].queue;
        let mut wakers = self.pass_time(queue);
        let number = self.next_number();
        let (channel, queue_state) = (&mut self.channels[key], &mut self.queues[queue]);
        if let Some(end) = channel.end {
            return Step::new(Next::Ended(end), wakers);
        }
        let lapses = queue_state.config.lease.and(queue_state.jobs.deadline());
        let taken = match channel.unacked < channel.prefetch {
            true => queue_state.jobs.take(key, number),
            false => None,
        };
        let Some(taken) = taken else {
            queue_state.wait(key, waker);
            return Step::new(Next::Wait(queue_state.jobs.deadline()), wakers);
        };
        channel.unacked += 1;
        if queue_state.config.lease.is_some() && lapses.is_none() {
            // Others may wait without a timer, and this lease is now the first to end.
            queue_state.wake_all(&mut wakers);
        }
        let address = Address {
            queue,
            key: taken.key,
            number,
            channel: key,
            channel_number: channel.number,
        };
        Step::new(Next::Job(taken, address), wakers)
    }

    /// Does what was to be done by now.
    pub(super) fn pass_time(&mut self, queue: usize) -> Wakers {
        let mut wakers = Wakers::default();
        let queue = &mut self.queues[queue];
        if !queue.jobs.has_deadline() {
            return wakers;
        }
        let now = Instant::now();
        let mut is_changed = queue.jobs.ready_due(now);
        while let Some(held) = queue.jobs.take_lapsed(now) {
            let channel = &mut self.channels[held.channel];
            channel.unacked -= 1;
            channel.lapsed.push(held.number);
            is_changed = true;
        }
        if is_changed {
            queue.wake_all(&mut wakers);
        }
        wakers
    }

    /// Returns what a settlement is to wait for before it is made.
    pub(super) fn settle_delay(&self, queue: usize) -> Duration {
        self.queues[queue].faults.delay
    }

    pub(super) fn settle(
        &mut self,
        address: Address,
        verdict: Verdict,
        reason: Reason,
    ) -> Step<Result<(), Refusal>, P> {
        let mut wakers = self.pass_time(address.queue);
        if let Err(error) = self.check(address) {
            let result = match verdict {
                // Nothing was to be said, and nothing can be.
                Verdict::Abandon if error != Error::AlreadySettled => Ok(()),
                _ => Err(Refusal {
                    error,
                    again: false,
                }),
            };
            return Step::new(result, wakers);
        }
        let queue = &mut self.queues[address.queue];
        if verdict != Verdict::Abandon
            && let Some(fault) = queue.faults.next()
        {
            let again = fault == SettleFault::Again;
            let error = Error::Injected;
            return Step::new(Err(Refusal { error, again }), wakers);
        }
        let garbage = self.carry_out(address, verdict, reason, &mut wakers);
        Step {
            output: Ok(()),
            wakers,
            garbage,
        }
    }

    /// Carries out a verdict on a job that is held, and returns a payload that is to be dropped.
    fn carry_out(
        &mut self,
        address: Address,
        verdict: Verdict,
        reason: Reason,
        wakers: &mut Wakers,
    ) -> Option<P> {
        let Address { key, channel, .. } = address;
        let number = self.next_number();
        let queue = &mut self.queues[address.queue];
        let mut garbage = None;
        match verdict {
            Verdict::Ack => garbage = Some(queue.jobs.ack(key)),
            Verdict::Retry { after: Some(delay) } if !delay.is_zero() => {
                if queue.jobs.delay(key, delay, number) {
                    queue.wake_all(wakers);
                }
            }
            Verdict::Retry { .. } | Verdict::Release => {
                let charge = verdict != Verdict::Release;
                queue.jobs.give_back(key, charge);
                queue.wake_all(wakers);
            }
            Verdict::Reject => {
                garbage = self.reject(address, reason, number, wakers);
            }
            Verdict::Abandon => {
                if let Some(held) = queue.jobs.held(key, address.number) {
                    held.abandoned = true;
                }
                // It counts against the prefetch until it is taken back.
                return None;
            }
        }
        let queue = &mut self.queues[address.queue];
        queue.wake_if_empty(wakers);
        let place = &mut self.channels[channel];
        place.unacked -= 1;
        if place.unacked + 1 == place.prefetch {
            queue.wake(channel, wakers);
        }
        garbage
    }

    fn reject(
        &mut self,
        address: Address,
        reason: Reason,
        number: u64,
        wakers: &mut Wakers,
    ) -> Option<P> {
        let queue = &mut self.queues[address.queue];
        let dead_letter = queue.config.dead_letter;
        let (payload, deliveries) = queue.jobs.reject(address.key, dead_letter.is_some());
        let Some(dead_letter) = dead_letter else {
            return Some(payload);
        };
        let death = Arc::new(Death {
            queue: Arc::clone(&queue.config.name),
            reason,
            deliveries,
            number,
        });
        let dead_letter = &mut self.queues[dead_letter];
        dead_letter.jobs.push(payload, Some(death));
        dead_letter.wake_all(wakers);
        None
    }

    pub(super) fn keep_alive(&mut self, address: Address) -> Step<Result<Lease, Error>, P> {
        let wakers = self.pass_time(address.queue);
        let lease = match self.check(address) {
            Ok(()) => match self.queues[address.queue].jobs.prolong(address.key) {
                true => Ok(Lease::Held),
                false => Err(Error::NoLease),
            },
            Err(Error::LeaseLost | Error::StaleTag) => Ok(Lease::Lost),
            Err(error) => Err(error),
        };
        Step::new(lease, wakers)
    }

    /// Returns why a delivery can't be answered any more, if so.
    fn check(&mut self, address: Address) -> Result<(), Error> {
        let jobs = &mut self.queues[address.queue].jobs;
        match jobs.held(address.key, address.number) {
            Some(held) if held.abandoned => return Err(Error::AlreadySettled),
            Some(_) => return Ok(()),
            None => {}
        }
        let channel = self.channels.get(address.channel);
        let channel = channel.filter(|it| it.number == address.channel_number);
        Err(match channel.filter(|it| it.end.is_none()) {
            None => Error::StaleTag,
            Some(it) if it.lapsed.contains(&address.number) => Error::LeaseLost,
            Some(_) => Error::AlreadySettled,
        })
    }
}

/// Why a settlement failed, and whether it can be made again.
#[derive(Clone, Copy, Debug)]
pub(super) struct Refusal {
    pub(super) error: Error,
    pub(super) again: bool,
}

impl Faults {
    fn next(&mut self) -> Option<SettleFault> {
        for (left, fault) in [
            (&mut self.again, SettleFault::Again),
            (&mut self.last, SettleFault::Last),
        ] {
            if *left > 0 {
                *left -= 1;
                return Some(fault);
            }
        }
        None
    }
}
