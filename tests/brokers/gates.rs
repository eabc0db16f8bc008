//! A gate has the number of the prefetch, also before there is a subscription.

use std::{future::ready, task::Context};

use tower::{Layer, Service, limit::ConcurrencyLimitLayer, service_fn};
use tower_sentinel::broker::{nats::Pull, rabbitmq::Queue, redis::ConsumerGroup};

fn permits(gate: &ConcurrencyLimitLayer) -> usize {
    let service = gate.layer(service_fn(|()| ready(Ok::<_, ()>(()))));
    let mut cx = Context::from_waker(std::task::Waker::noop());
    // A service that is ready and not yet called holds its permit.
    let mut ready = Vec::new();
    loop {
        let mut clone = service.clone();
        if clone.poll_ready(&mut cx).is_pending() {
            return ready.len();
        }
        ready.push(clone);
    }
}

#[test]
fn a_gate_has_the_number_of_the_prefetch() {
    assert_eq!(permits(&Queue::classic("q").prefetch(3).gate()), 3);
    assert_eq!(permits(&Queue::quorum("q").gate()), 64);
    assert_eq!(permits(&Pull::new("s", "c").prefetch(3).gate()), 3);
    assert_eq!(permits(&Pull::new("s", "c").gate()), 64);
    let group = ConsumerGroup::new("stream", "group");
    assert_eq!(permits(&group.clone().prefetch(3).gate()), 3);
    assert_eq!(permits(&group.gate()), 64);
}
