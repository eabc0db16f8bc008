//! [`State`] of a broker, behind its one lock.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use slab::Slab;
use tokio::time::Instant;

use super::{
    entry::Taken,
    faults::Faults,
    jobs::Jobs,
    properties::{Headers, Properties},
    step::{Step, Wakers},
};

use crate::{
    settle::Capabilities,
    waiters::{Waiter, Waiters},
};

/// The state of a broker behind a lock, which is held for one step and never over an await.
#[derive(Debug)]
pub(super) struct Server<P>(Mutex<State<P>>);

impl<P> Server<P> {
    pub(super) fn new() -> Self {
        Self(Mutex::new(State {
            queues: Vec::new(),
            channels: Slab::new(),
            last_number: 0,
            last_message_id: 0,
            severed: 0,
            refusals: 0,
        }))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State<P>> {
        // Only the `clone` of a payload can panic under the lock, and it leaves nothing half-done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
pub(super) struct State<P> {
    pub(super) queues: Vec<QueueState<P>>,
    pub(super) channels: Slab<Channel>,
    pub(super) last_number: u64,
    last_message_id: u64,
    /// Connections with numbers up to this one are lost.
    pub(super) severed: u64,
    pub(super) refusals: u32,
}

#[derive(Debug)]
pub(super) struct QueueState<P> {
    pub(super) config: Config,
    pub(super) jobs: Jobs<P>,
    pub(super) faults: Faults,
    /// Channels that wait for a job, for a place in their prefetch, or for a time.
    waiting: Vec<(usize, Waiter)>,
    /// Those that wait until the queue is empty.
    pub(super) emptied: Waiters,
}

/// Settings of a queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Config {
    pub(super) name: Arc<str>,
    pub(super) dead_letter: Option<usize>,
    pub(super) suspects: Option<usize>,
    pub(super) lease: Option<Duration>,
}

/// A declared queue, shared by its handles.
pub(super) struct Declared<P> {
    pub(super) index: usize,
    pub(super) config: Config,
    pub(super) server: Arc<Server<P>>,
}

impl<P> Declared<P> {
    pub(super) fn capabilities(&self) -> Capabilities {
        let mut capabilities = Capabilities::none().free_release().delay();
        if self.config.dead_letter.is_some() {
            capabilities = capabilities.dead_letter();
        }
        if self.config.lease.is_some() {
            capabilities = capabilities.keep_alive();
        }
        capabilities
    }
}

/// Channel of one consumer over a connection.
#[derive(Debug)]
pub(super) struct Channel {
    pub(super) number: u64,
    pub(super) connection: u64,
    pub(super) queue: usize,
    pub(super) prefetch: usize,
    pub(super) unacked: usize,
    pub(super) end: Option<End>,
    pub(super) closed: Option<Waiter>,
    /// Wakers of delayed settlements by their number; the settlements fail when the channel is closed.
    pub(super) settling: Vec<(u64, Waiter)>,
    /// The deliveries whose lease was lost.
    pub(super) lapsed: Vec<u64>,
}

/// Reason why a channel is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// Its consumer gave it up.
    GivenUp,
    /// Its connection was lost.
    Lost,
}

/// Address of the delivery that a tag settles.
#[derive(Clone, Copy, Debug)]
pub(super) struct Address {
    pub(super) queue: usize,
    pub(super) key: usize,
    pub(super) number: u64,
    pub(super) channel: usize,
    pub(super) channel_number: u64,
}

/// Result of a consumer's poll for the next job.
#[derive(Debug)]
pub(super) enum Next<P> {
    Job(Taken<P>, Address),
    /// No job before this time (if there is one) or before the consumer's waker is woken.
    Wait(Option<Instant>),
    Ended(End),
}

impl<P> QueueState<P> {
    fn wait(&mut self, channel: usize, waiter: &Waiter) {
        if !self.waiting.iter().any(|(it, _)| *it == channel) {
            self.waiting.push((channel, Arc::clone(waiter)));
        }
    }

    pub(super) fn wake(&mut self, channel: usize, wakers: &mut Wakers) {
        if let Some(index) = self.waiting.iter().position(|(it, _)| *it == channel) {
            wakers.push(self.waiting.swap_remove(index).1);
        }
    }

    /// Wakes every consumer: one that is woken but not polled must not keep a job from the others.
    pub(super) fn wake_all(&mut self, wakers: &mut Wakers) {
        self.waiting
            .drain(..)
            .for_each(|(_, waker)| wakers.push(waker));
    }

    pub(super) fn wake_if_empty(&mut self, wakers: &mut Wakers) {
        if self.jobs.is_empty() {
            self.emptied.drain().for_each(|waker| wakers.push(waker));
        }
    }
}

impl<P> State<P> {
    pub(super) fn next_number(&mut self) -> u64 {
        self.last_number += 1;
        self.last_number
    }

    pub(super) fn declare(&mut self, config: Config) -> usize {
        self.queues.push(QueueState {
            jobs: Jobs::new(config.lease),
            config,
            faults: Faults::default(),
            waiting: Vec::new(),
            emptied: Waiters::default(),
        });
        self.queues.len() - 1
    }

    pub(super) fn find(&self, name: &str) -> Option<usize> {
        self.queues.iter().position(|it| *it.config.name == *name)
    }

    pub(super) fn publish(
        &mut self,
        queue: usize,
        payload: P,
        headers: Option<Headers>,
    ) -> Step<(), P> {
        self.last_message_id += 1;
        let properties = Properties {
            message_id: self.last_message_id,
            published: Instant::now(),
            headers,
        };
        let queue = &mut self.queues[queue];
        queue.jobs.push(payload, properties, None);
        let mut wakers = Wakers::default();
        queue.wake_all(&mut wakers);
        Step::new((), wakers)
    }

    /// Takes the next job of a channel; if there is none, it enters `waiter`.
    pub(super) fn next(&mut self, key: usize, waiter: Option<&Waiter>) -> Step<Next<P>, P>
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
            if let Some(waiter) = waiter {
                queue_state.wait(key, waiter);
            }
            return Step::new(Next::Wait(queue_state.jobs.deadline()), wakers);
        };
        channel.unacked += 1;
        if queue_state.config.lease.is_some() && lapses.is_none() {
            // Others may wait without a timer, and this lease is now the first one to end.
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

    /// Makes jobs ready whose delay is over, and takes jobs back whose lease is over.
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
}
