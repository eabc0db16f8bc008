//! Probe of a pull consumer.

use std::{sync::Arc, time::Duration};

use async_nats::jetstream::consumer::{Info, PullConsumer};

use super::{channel::Channel, error::SubscriptionError, liveness::unacked_limit, repeat::repeat};
use crate::consumer::{Probe, ProbeError};

/// Requests the state of the consumer until there is a response; `received` jobs wait here.
///
/// Jobs that wait for others don't wait for a `standby`.
pub(super) async fn probe(
    channel: Arc<Channel>,
    consumer: Arc<PullConsumer>,
    received: usize,
    is_standby: bool,
) -> Result<Probe, ProbeError> {
    let asking = || consumer.get_info();
    let asked = repeat(|| channel.is_connected(), Duration::MAX, true, asking).await;
    match asked {
        Ok(info) => Ok(read(&info, received, is_standby)),
        Err(Some(error)) => Err(match SubscriptionError::deleted(&error) {
            Some(deleted) => ProbeError::new(deleted),
            None => ProbeError::new(error),
        }),
        Err(None) => Err(ProbeError::new(SubscriptionError::Unreachable {
            silence: Duration::MAX,
        })),
    }
}

fn read(info: &Info, received: usize, is_standby: bool) -> Probe {
    let unacked = info.num_ack_pending;
    let mut probe = Probe::new()
        .leases()
        .detail("unacked by all workers", unacked as u64)
        .detail("requests of all workers", info.num_waiting as u64);
    probe.waiting = match (info.paused, is_standby) {
        (false, true) => None,
        // A paused consumer delivers nothing, on purpose.
        (true, _) => Some(received as u64),
        (false, false) => Some(info.num_pending + received as u64),
    };
    match unacked_limit(info) {
        Some(limit) => probe.hindrance(format!(
            "max_ack_pending is reached: {unacked} of {limit} jobs are unacked or delayed"
        )),
        None => probe,
    }
}
