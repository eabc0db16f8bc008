//! Settlement of deliveries: verdicts are carried out or refused.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use super::{
    death::Death,
    error::DeliveryError,
    faults::SettleFault,
    jobs::Rejection,
    state::{Address, State},
    step::{Step, Wakers},
};
use crate::{
    broker::dead_letter::SUSPECT_OF,
    settle::{Lease, Reason, Verdict},
    waiters::Waiter,
};

/// A settlement that failed: its error, and whether it can be repeated (`again`).
#[derive(Clone, Copy, Debug)]
pub(super) struct Refusal {
    pub(super) error: DeliveryError,
    pub(super) again: bool,
}

impl<P> State<P> {
    /// Returns the delay of settlements of this queue.
    pub(super) fn settle_delay(&self, queue: usize) -> Duration {
        self.queues[queue].faults.delay
    }

    /// Enters `waiter`, to be woken when the channel of the delivery is closed.
    pub(super) fn watch(
        &mut self,
        address: Address,
        settlement: u64,
        waiter: &Waiter,
    ) -> Result<(), DeliveryError> {
        self.check(address)?;
        // Invariant: a delivery that can be settled has its channel.
        let settling = &mut self.channels[address.channel].settling;
        if !settling.iter().any(|(it, _)| *it == settlement) {
            settling.push((settlement, Arc::clone(waiter)));
        }
        Ok(())
    }

    /// Undoes [`watch`](Self::watch).
    pub(super) fn unwatch(&mut self, address: Address, settlement: u64) {
        let channel = self.channels.get_mut(address.channel);
        if let Some(channel) = channel.filter(|it| it.number == address.channel_number) {
            channel.settling.retain(|(it, _)| *it != settlement);
        }
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
                // It would have sent nothing anyway.
                Verdict::Abandon if error != DeliveryError::AlreadySettled => Ok(()),
                _ => Err(Refusal {
                    error,
                    again: false,
                }),
            };
            return Step::new(result, wakers);
        }
        let queue = &mut self.queues[address.queue];
        let fault = match verdict {
            Verdict::Abandon => None,
            _ => queue.faults.next(),
        };
        if let Some(fault) = fault {
            let again = fault == SettleFault::Again;
            let error = DeliveryError::Injected;
            return Step::new(Err(Refusal { error, again }), wakers);
        }
        let garbage = self.carry_out(address, verdict, reason, &mut wakers);
        Step {
            output: Ok(()),
            wakers,
            garbage,
        }
    }

    /// Carries out a verdict on a job that is held, and returns its payload if that is to be dropped.
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
            Verdict::Retry { .. } | Verdict::Release { .. } => {
                let charge = matches!(verdict, Verdict::Retry { .. });
                let is_next = match verdict.delay() {
                    Some(delay) => queue.jobs.delay(key, delay, number, charge),
                    None => {
                        queue.jobs.give_back(key, charge);
                        true
                    }
                };
                if is_next {
                    queue.wake_all(wakers);
                }
            }
            Verdict::Reject => {
                garbage = self.reject(address, reason, number, wakers);
            }
            Verdict::Abandon => {
                if let Some(held) = queue.jobs.held(key, address.number) {
                    held.abandoned = true;
                }
                // It counts toward the prefetch until it is taken back.
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
        let suspects = queue.config.suspects.filter(|_| reason.is_suspect());
        let (to, destination) = match (suspects, queue.config.dead_letter) {
            (Some(suspects), _) => (Rejection::Suspect, Some(suspects)),
            (None, Some(dead_letter)) => (Rejection::DeadLetter, Some(dead_letter)),
            (None, None) => (Rejection::Dropped, None),
        };
        let (payload, mut properties, deliveries) = queue.jobs.reject(address.key, to);
        let Some(destination) = destination else {
            return Some(payload);
        };
        let queue = Arc::clone(&queue.config.name);
        let origin = properties.remove(SUSPECT_OF).map(Arc::from);
        if let Rejection::Suspect = to {
            properties.set(SUSPECT_OF, queue.to_string());
        }
        let death = Arc::new(Death {
            queue: origin.unwrap_or(queue),
            reason,
            deliveries,
            time: SystemTime::now(),
            number,
        });
        let destination = &mut self.queues[destination];
        destination.jobs.push(payload, properties, Some(death));
        destination.wake_all(wakers);
        None
    }

    pub(super) fn keep_alive(&mut self, address: Address) -> Step<Result<Lease, DeliveryError>, P> {
        let wakers = self.pass_time(address.queue);
        let lease = match self.check(address) {
            Ok(()) => match self.queues[address.queue].jobs.prolong(address.key) {
                true => Ok(Lease::Held),
                false => Err(DeliveryError::NoLease),
            },
            Err(DeliveryError::LeaseLost | DeliveryError::Stale) => Ok(Lease::Lost),
            Err(error) => Err(error),
        };
        Step::new(lease, wakers)
    }

    /// Returns an error if the delivery can't be settled any more.
    fn check(&mut self, address: Address) -> Result<(), DeliveryError> {
        let jobs = &mut self.queues[address.queue].jobs;
        match jobs.held(address.key, address.number) {
            Some(held) if held.abandoned => return Err(DeliveryError::AlreadySettled),
            Some(_) => return Ok(()),
            None => {}
        }
        let channel = self.channels.get(address.channel);
        let channel = channel.filter(|it| it.number == address.channel_number);
        Err(match channel.filter(|it| it.end.is_none()) {
            None => DeliveryError::Stale,
            Some(it) if it.lapsed.contains(&address.number) => DeliveryError::LeaseLost,
            Some(_) => DeliveryError::AlreadySettled,
        })
    }
}
