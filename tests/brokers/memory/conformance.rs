//! The embedded broker, with all that it can do and with as little as it can be.

use std::{future::ready, time::Duration};

use tower_sentinel::{
    broker::memory::{
        Broker, ConnectError, Deliveries, Delivery, DeliveryError, DeliveryTag, Queue,
        SubscriptionError,
    },
    settle::Capabilities,
};

use crate::conformance::{Backlog, Connector, DeadLetter, TestBroker, verdicts::MEMORY};

/// `FULL` with a lease and a dead-letter queue, and else without.
struct Memory<const FULL: bool> {
    broker: Broker<String>,
    queue: Queue<String>,
}

impl<const FULL: bool> TestBroker for Memory<FULL> {
    type Subscription = Deliveries<String>;
    type SubscriptionError = SubscriptionError;
    type ConnectError = ConnectError;
    type Job = Delivery<String>;
    type Tag = DeliveryTag<String>;
    type DeliveryError = DeliveryError;

    const COUNTS_DELIVERIES: bool = true;
    const ACK_IS_CONFIRMED: bool = true;
    const REDELIVERY: Option<Duration> = match FULL {
        true => Some(Duration::from_secs(2)),
        false => None,
    };
    const MANY: usize = 10_000;

    fn server() -> (&'static str, (u32, u32)) {
        (MEMORY, (0, 0))
    }

    fn capabilities() -> Capabilities {
        let capabilities = Capabilities::none().free_release().delay();
        match FULL {
            true => capabilities.dead_letter().keep_alive(),
            false => capabilities,
        }
    }

    async fn start() -> Self {
        let broker = Broker::new();
        let mut queue = broker.queue("jobs");
        if FULL {
            queue = queue.dead_letter("dead");
        }
        if let Some(lease) = Self::REDELIVERY {
            queue = queue.lease(lease);
        }
        let queue = queue.declare();
        Self { broker, queue }
    }

    async fn stop(self) {}

    async fn publish(&self, body: &str) {
        self.queue.publish(body.to_owned());
    }

    fn connector(&self, prefetch: usize) -> Connector<Deliveries<String>, ConnectError> {
        let queue = self.queue.clone();
        Box::new(move || Box::pin(ready(queue.subscribe(prefetch))))
    }

    async fn backlog(&self) -> Backlog {
        let counts = self.queue.counts();
        Backlog {
            unacked: counts.unacked,
            total: counts.ready + counts.delayed + counts.unacked,
        }
    }

    async fn dead_letters(&self) -> Vec<DeadLetter> {
        let letters = self
            .queue
            .dead_letters()
            .into_iter()
            .map(|letter| DeadLetter {
                body: letter.payload,
                kind: letter.death.reason.kind,
                message: letter.death.reason.message.clone(),
            });
        letters.collect()
    }

    async fn stall(&self) {
        self.queue.delay_settlements(Duration::from_secs(3_600));
    }

    async fn cut(&self) {
        self.queue.delay_settlements(Duration::ZERO);
        self.broker.drop_connections();
    }

    async fn kill(&self) {
        self.broker.refuse_connections(u32::MAX);
        self.cut().await;
    }

    async fn revive(&self) {
        self.broker.refuse_connections(0);
    }
}

mod full {
    use super::Memory;

    crate::conformance::scenarios!(tokio::test(start_paused = true), Memory<true>);
}

mod plain {
    use super::Memory;

    crate::conformance::scenarios!(tokio::test(start_paused = true), Memory<false>);
}
