//! Opening and closing of connections and channels.

use std::sync::Arc;

use super::{
    error::{ConnectError, SubscriptionError},
    state::{Channel, End, State},
    step::{Step, Wakers},
};
use crate::{consumer::Probe, waiters::Waiter};

impl<P> State<P> {
    pub(super) fn connect(&mut self) -> Result<u64, ConnectError> {
        match self.refusals.checked_sub(1) {
            None => Ok(self.next_number()),
            Some(left) => {
                self.refusals = left;
                Err(ConnectError::Refused)
            }
        }
    }

    /// Returns whether `connection` was lost together with all others.
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
            settling: Vec::new(),
            lapsed: Vec::new(),
        })
    }

    /// Closes the channels of one connection, or of all connections (`None`), as lost.
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
        let settling = channel.settling.drain(..).map(|(_, waker)| waker);
        let waiting = channel.closed.take().into_iter().chain(settling);
        waiting.for_each(|waker| wakers.push(waker));
        let queue = &mut self.queues[channel.queue];
        queue.wake(key, wakers);
        queue.jobs.give_back_all(key);
        if queue.jobs.has_ready() {
            queue.wake_all(wakers);
        }
    }

    pub(super) fn is_closed(&self, key: usize) -> bool {
        self.channels[key].end.is_some()
    }

    /// Returns the reason if a channel is closed, and enters `waiter` otherwise.
    pub(super) fn poll_closed(&mut self, key: usize, waiter: &Waiter) -> Option<End> {
        let channel = &mut self.channels[key];
        if channel.end.is_none() {
            channel.closed.get_or_insert_with(|| Arc::clone(waiter));
        }
        channel.end
    }

    /// Returns the counts of an open channel and its queue.
    pub(super) fn probe(&mut self, key: usize) -> Step<Result<Probe, SubscriptionError>, P> {
        let queue = self.channels[key].queue;
        let wakers = self.pass_time(queue);
        let (channel, queue) = (&self.channels[key], &self.queues[queue]);
        if channel.end.is_some() {
            return Step::new(Err(SubscriptionError::Disconnected), wakers);
        }
        let counts = queue.jobs.counts();
        let abandoned = queue.jobs.abandoned(key);
        let mut probe = Probe::new()
            .waiting(counts.ready as u64)
            .unsettled((channel.unacked - abandoned) as u64)
            .detail("delayed", counts.delayed as u64)
            .detail("abandoned", abandoned as u64);
        if queue.config.lease.is_some() {
            probe = probe.leases();
        }
        Step::new(Ok(probe), wakers)
    }
}
